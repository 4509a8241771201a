"""A fresh node acted out, on the CPU: everything real but the GPU and systemd.

The one-shot unit's command probes and publishes; the daemon's readiness endpoint turns ready; an
engine's reader in a read-only mount gets its choice; a wheel is replaced, the daemon notices, the
old choice is no longer claimed, and a new generation appears; the wheel is rolled back, and what
was proven with it is chosen again without a probe.

    python benchmarks/fresh_node.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _node as node

SHAPE = ("--shape", "128,256", "--max-m", "4", "--activation", "bf16", "--level", "quick")
QUESTION = "m=3&n=128&k=256"
READ = """
import json, sys
from fp4tune.cache import reader
found = reader.open(sys.argv[1], pin=True).choose(3, 128, 256)
heavy = sorted({"torch", "sqlite_utils", "typer"} & set(sys.modules))
try:
    open(sys.argv[1] + "/written", "w")
    writable = True
except OSError as error:
    writable = error.strerror
print(json.dumps({"backend": found.backend, "status": found.status, "reason": found.reason,
                  "generation": found.generation, "writable": writable, "imported": heavy}))
"""
MOUNT = 'mount --bind "$1" "$2" && mount -o remount,ro,bind "$2" && shift && exec "${@:2}"'


def as_engine(state: Path, mount: Path, env: dict[str, str]) -> dict[str, Any]:
    """What the reader answers in a read-only mount of the state directory."""
    mount.mkdir(exist_ok=True)
    command = ["unshare", "-m", "bash", "-c", MOUNT, "bash", str(state), str(mount)]
    done = subprocess.run(
        [*command, sys.executable, "-c", READ, str(mount)], env=env, capture_output=True, text=True
    )
    if done.returncode != 0:
        return {"skipped": done.stderr.strip()[-300:]}
    return {"mount": "read-only, in a mount namespace of its own", **json.loads(done.stdout)}


def act(place: Path, seconds: float) -> list[dict[str, Any]]:
    acts: list[dict[str, Any]] = []
    began = time.monotonic()

    def note(what: str, **more: Any) -> None:
        acts.append({"at_s": round(time.monotonic() - began, 1), "what": what, **more})
        print(json.dumps(acts[-1]), flush=True)

    state, site = place / "state", place / "site"
    site.mkdir(parents=True)
    one = node.wheel(place / "wheels", "1.0")
    two = node.wheel(place / "wheels", "2.0", used=240)
    env = node.environ(site)
    node.install(one, site)
    listen = f"127.0.0.1:{node.free_port()}"
    backends = ("torch-dequant", "wheel-resident")
    config = place / "daemon.toml"
    config.write_text(
        f'state = "{state}"\ngpus = ["cpu"]\n[probe]\nshapes = ["128,256"]\nmax_m = 4\n'
        f'level = "quick"\nactivations = ["bf16"]\nbackends = {json.dumps(backends)}\n'
        f'[watch]\nseconds = 1\n[idle]\nquiet_seconds = 1\n[http]\nlisten = "{listen}"\n'
    )
    chosen = [part for name in backends for part in ("--backend", name)]
    done = subprocess.run(
        node.fp4tune("probe", "--gpu", "none", *SHAPE, *chosen, "--state", state, "--json"),
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    (report,) = json.loads(done.stdout)
    note("the one-shot unit's command probed and published", exit_code=done.returncode,
         generation=report["generation"],
         choices=sorted({(c["backend"], c["status"]) for c in report["choices"]}))  # fmt: skip

    daemon = node.Daemon(config, listen, env, place / "daemon.log")
    daemon.start()
    seen: list[int] = []
    while not seen or seen[-1] != 200:
        status, _ = daemon.get("/readyz")
        if not seen or seen[-1] != status:
            seen.append(status)
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"never ready: {seen}")
        time.sleep(0.05)
    note("the readiness endpoint turned ready", statuses=seen)
    note("the engine's reader", **as_engine(state, place / "mount", env))
    _, answer = daemon.get(f"/v1/choices?{QUESTION}")
    note("the daemon's answer", backend=answer["backend"], status=answer["status"])
    first = answer["generation"]

    node.install(two, site)
    replaced = time.monotonic()
    note("the wheel was replaced: 1.0 by 2.0, which leaves out the last 16 of k")
    note("the engine's reader, at once", **as_engine(state, place / "mount", env))
    took, document = daemon.until("/v1/choices", lambda s, d: s == 200 and d["withdrawn"], seconds)
    note("the daemon noticed, and the old choice is no longer claimed",
         seconds_after=round(time.monotonic() - replaced, 1),
         generation=document["generation"], withdrawn=document["withdrawn"],
         choices=sorted({(c["backend"], c["status"]) for c in document["choices"]}))  # fmt: skip
    note("the engine's reader", **as_engine(state, place / "mount", env))
    second = document["generation"]
    took, document = daemon.until(
        "/v1/choices", lambda s, d: s == 200 and d["generation"] > second, seconds
    )
    note("probed again; a new generation appeared", generation=document["generation"],
         seconds_after=round(time.monotonic() - replaced, 1), withdrawn=document["withdrawn"],
         choices=sorted({(c["backend"], c["status"]) for c in document["choices"]}))  # fmt: skip
    third = document["generation"]
    note("the engine's reader", **as_engine(state, place / "mount", env))
    _, found = daemon.get("/v1/findings")
    note("why", findings=sorted(
        {(f["backend"], f["kind"]) for f in found["findings"] if f["backend"] == "wheel-resident"}
    ))  # fmt: skip

    node.install(one, site)
    replaced = time.monotonic()
    _, before = daemon.get("/metrics")
    took, document = daemon.until(
        "/v1/choices",
        lambda s, d: (
            s == 200
            and d["generation"] > third
            and any(
                c["backend"] == "wheel-resident" and c["status"] == "safe" for c in d["choices"]
            )
        ),
        seconds,
    )
    _, after = daemon.get("/metrics")
    note("the wheel was rolled back: what was proven with it is chosen again",
         seconds_after=round(time.monotonic() - replaced, 1), generation=document["generation"],
         probes_meanwhile=probes(after) - probes(before))  # fmt: skip
    note("the engine's reader", **as_engine(state, place / "mount", env))
    code, took = daemon.stop()
    note("SIGTERM", exit_code=code, seconds=round(took, 2), generations=[first, second, third])
    return acts


def probes(metrics: str) -> float:
    lines = (line for line in metrics.splitlines() if line.startswith("fp4tune_probes_total"))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="most for any one step")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fp4tune-node-") as place:
        acts = act(Path(place), options.seconds)
        text = json.dumps(acts).replace(place, "NODE")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, no GPU",
        "acts": json.loads(text),
    }
    (options.out / "fresh_node.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
