#!/usr/bin/env python3
"""A fleet of simulated nodes with known faults: how long the merge takes, and who is blamed.

    python benchmarks/fleet_scale.py --out DIR [--nodes 10000] [--gpus 4] [--seed 1]

Every node exports one signed bundle with the rows of a real probe: for each GPU, each of three
backends, two buckets and three regimes. Planted, at rates per launch of 1, 0.1, 1e-2, 1e-3, 1e-4:

* bad GPUs (half of them fail everywhere, half with one backend only), and bad library builds;
* in one cohort a third of the nodes fails for a reason that no fingerprint says: nobody's fault;
* transients: single failures on good GPUs, which should convict nobody; and slow GPUs.

Beside the good bundles lie forged and truncated ones. Measured: generation; `fp4tune fleet merge`
as a process of its own, with the peak of the memory of it and its children; `fleet report`; and of
the attribution its precision, its recall by rate, and what it left undetermined.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fp4tune.fleet import bundle, report

RATES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
BACKENDS = ("alpha", "beta", "gamma")
ARCHS = (("sm90", "NVIDIA H200"), ("sm120", "NVIDIA RTX PRO 6000"))
IMAGES = 3
REGIMES = ("serial", "streams", "pdl-raw")
BUCKETS = ((1, 16), (17, 64))
PROBLEMS, REPEATS = 500, 2
"""Different problems of each (bucket, regime), and launches of each."""
BAD_PER_RATE = 20
SLOW = (1.05, 1.1, 1.3)
SLOW_PER_FACTOR = 15
TRANSIENTS = 20
FORGERIES = ("rows changed", "hash mended", "unknown key", "unsigned", "foreign word", "escaping")
EACH_FORGERY = 20
TRUNCATED = 100


def sha(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def plants(nodes: int, gpus: int, seed: int) -> dict:
    """What is wrong with whom, decided by the seed."""
    rng = random.Random(seed)
    places = [
        (n, g) for n in rng.sample(range(nodes), min(nodes, 800)) for g in (rng.randrange(gpus),)
    ]
    bad, slow, transient = {}, {}, {}
    for rate in RATES:
        for number in range(BAD_PER_RATE):
            only = rng.choice(BACKENDS) if number % 2 else None
            bad[places.pop()] = rate, only
    for factor in SLOW:
        for _ in range(SLOW_PER_FACTOR):
            slow[places.pop()] = factor
    for _ in range(TRANSIENTS):
        transient[places.pop()] = (rng.choice(BACKENDS), rng.choice(REGIMES))
    cohorts = [(a, i, b) for a in range(len(ARCHS)) for i in range(IMAGES) for b in BACKENDS]
    rng.shuffle(cohorts)
    libraries = {cohorts.pop(): (rate, rng.choice(REGIMES)) for rate in RATES}
    return {
        "bad": bad,
        "slow": slow,
        "transient": transient,
        "libraries": libraries,
        "hidden": (cohorts.pop(), rng.choice(REGIMES)),
    }


def binomial(rng: random.Random, n: int, p: float) -> int:
    """Successes in n trials: by the gaps between them, or one by one where they are many."""
    if p <= 0:
        return 0
    if p >= 0.3:
        return sum(rng.random() < p for _ in range(n)) if p < 1 else n
    count, at, scale = 0, -1, math.log1p(-p)
    while True:
        at += 1 + int(math.log(1.0 - rng.random()) / scale)
        if at >= n:
            return count
        count += 1


def node_rows(node: int, gpus: int, planted: dict, seed: int) -> dict:
    """One node's tables."""
    rng = random.Random(f"{seed}/{node}")
    a, image = node % len(ARCHS), (node // len(ARCHS)) % IMAGES
    arch, model = ARCHS[a]
    at = 1.7e9 + node
    rows: dict[str, list] = {t: [] for t in ("run", "environment", "evidence", "finding", "timing")}
    rows |= {"verdict": [], "choice": []}
    hidden_cohort, hidden_regime = planted["hidden"]
    hidden = random.Random(f"hidden/{seed}/{node}").random() < 1 / 3
    prints = {b: sha(arch, image, b) for b in BACKENDS}
    for b in BACKENDS:
        facts = {"code": sha("code", arch, image, b), "device": {"gpu": model, "driver": "580.1"}}
        rows["environment"].append(
            {
                "fingerprint": prints[b],
                "backend": b,
                "arch": arch,
                "facts": json.dumps(facts, sort_keys=True, separators=(",", ":")),
                "first_seen": at,
            }
        )
    number = 0
    for g in range(gpus):
        run, uuid = f"run-{node:06d}-{g}", f"GPU-{node:06d}-{g}"
        rows["run"].append(
            {
                "id": run,
                "started": at,
                "finished": at + 60,
                "status": "finished",
                "seed": str(node),
                "level": "standard",
                "profile": "strict",
                "device": json.dumps({"name": model, "uuid": uuid}),
                "versions": "{}",
            }
        )
        bad_rate, bad_only = planted["bad"].get((node, g), (0.0, None))
        own = rng.gauss(0, 0.004) + math.log(planted["slow"].get((node, g), 1.0))
        for index, b in enumerate(BACKENDS):
            gpu_rate = bad_rate if bad_only in (None, b) else 0.0
            lib_rate, lib_regime = planted["libraries"].get((a, image, b), (0.0, ""))
            for m_lo, m_hi in BUCKETS:
                what = {
                    "run": run,
                    "fingerprint": prints[b],
                    "backend": b,
                    "tactic": "default",
                    "format": "nvfp4",
                    "activation": "bf16",
                    "out_dtype": "bf16",
                    "groups": 1,
                    "m_lo": m_lo,
                    "m_hi": m_hi,
                    "n": 4096,
                    "k": 4096,
                }
                failed = False
                for regime in REGIMES:
                    rate = gpu_rate
                    if lib_regime == regime:
                        # Chips differ: the same fault shows up to half as often again.
                        rate = max(rate, min(1.0, lib_rate * math.exp(rng.gauss(0, 0.3))))
                        rate = 1.0 if lib_rate == 1 else rate
                    if hidden and (a, image, b) == hidden_cohort and regime == hidden_regime:
                        rate = max(rate, 0.1)
                    bad = binomial(rng, PROBLEMS * REPEATS, rate)
                    if planted["transient"].get((node, g)) == (b, regime) and m_lo == 1:
                        bad = max(bad, 1)
                    problems = min(bad, binomial(rng, PROBLEMS, 1 - (1 - rate) ** REPEATS) or 1)
                    detail = "{}"
                    if bad:
                        failed = True
                        detail = json.dumps({"bad_launches": bad, "bad_problems": problems})
                    number += 1
                    rows["evidence"].append(
                        {
                            "id": number,
                            **what,
                            "regime": regime,
                            "data": "exact",
                            "status": "failed" if bad else "passed",
                            "launches": PROBLEMS * REPEATS,
                            "problems": PROBLEMS,
                            "width": 24,
                            "seconds": 0.25,
                            "detail": detail,
                            "at": at,
                        }
                    )
                    if bad:
                        rows["finding"].append(
                            {
                                "id": number,
                                **what,
                                "problem": "{}",
                                "kind": "wrong",
                                "regime": regime,
                                "data": "exact",
                                "seed": "1",
                                "launch": 1,
                                "condition": None,
                                "detail": "{}",
                                "at": at,
                            }
                        )
                median = 10.0 * (1 + index) * m_hi**0.2 * math.exp(own + rng.gauss(0, 0.005))
                rows["timing"].append(
                    {
                        "id": number,
                        **what,
                        "median_us": round(median, 3),
                        "lo_us": round(median * 0.99, 3),
                        "hi_us": round(median * 1.01, 3),
                        "samples": 9,
                        "host_us": 5.0,
                        "detail": "{}",
                        "at": at,
                    }
                )
                rows["verdict"].append(
                    {
                        "id": number,
                        **what,
                        "profile": "strict",
                        "status": "unsafe" if failed else "safe",
                        "conditions": "[]",
                        "reasons": "[]",
                        "bounds": "{}",
                        "at": at,
                    }
                )
    for m_lo, m_hi in BUCKETS:
        rows["choice"].append(
            {
                "arch": arch,
                "gpu": model,
                "profile": "strict",
                "format": "nvfp4",
                "activation": "bf16",
                "out_dtype": "bf16",
                "groups": 1,
                "m_lo": m_lo,
                "m_hi": m_hi,
                "n": 4096,
                "k": 4096,
                "backend": "alpha",
                "tactic": "default",
                "layout": "plain",
                "status": "safe",
                "conditions": "[]",
                "median_us": 10.0,
                "launches": PROBLEMS * REPEATS,
                "problems": PROBLEMS,
                "fingerprint": prints["alpha"],
                "default_backend": None,
            }
        )
    return rows


def generate(numbers: range, gpus: int, seed: int, planted: dict, folder: str, key: str) -> int:
    """Write these nodes' bundles; returns their bytes."""
    total = 0
    for node in numbers:
        rows = node_rows(node, gpus, planted, seed)
        name = f"{node:06d}{bundle.SUFFIX}"
        _, data = bundle.pack(rows, sha("node", node)[:32], 1.7e9 + node, None, Path(key))
        Path(folder, name).write_bytes(data)
        total += len(data)
    return total


def forge(folder: str, gpus: int, seed: int, planted: dict, keys: tuple[str, str]) -> int:
    """Bundles that must not get in; returns how many."""
    import io
    import zipfile

    rng = random.Random(seed)
    own, other = map(Path, keys)
    node = 2_000_000
    for kind in FORGERIES:
        for _ in range(EACH_FORGERY):
            node += 1
            rows = node_rows(node, gpus, planted, seed)
            if kind == "foreign word":
                rows["verdict"][0]["status"] = "perfect"
            if kind == "escaping":
                rows["environment"][0]["arch"] = "../../tmp/x"
            signer = {"unknown key": other, "unsigned": None}.get(kind, own)
            # Without Parquet: the packer's own check would refuse these rows.
            members, manifest = raw(rows, node, signer)
            if kind in ("rows changed", "hash mended"):
                name = "evidence.ndjson"
                members[name] = members[name].replace(b'"status":"passed"', b'"status":"failed"')
                if kind == "hash mended":
                    manifest["files"][name]["sha256"] = hashlib.sha256(members[name]).hexdigest()
                    manifest["content"] = content_of(members)
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr(bundle.MANIFEST, json.dumps(manifest))
                for member, data in members.items():
                    file.writestr(member, data)
            Path(folder, f"forged-{node}{bundle.SUFFIX}").write_bytes(out.getvalue())
    good = sorted(Path(folder).glob(f"0*{bundle.SUFFIX}"))
    for number in range(TRUNCATED):
        data = rng.choice(good).read_bytes()
        cut = data[: rng.randrange(0, len(data))]
        Path(folder, f"cut-{number:04d}{bundle.SUFFIX}").write_bytes(cut)
    return len(FORGERIES) * EACH_FORGERY + TRUNCATED


def content_of(members: dict[str, bytes]) -> str:
    """The content hash of a bundle, made as docs/fleet.md says."""
    lines = (
        f"{name.removesuffix('.ndjson')} {sha256(data)}\n" for name, data in sorted(members.items())
    )
    return sha256("".join(lines).encode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def raw(rows: dict, node: int, signer: Path | None) -> tuple[dict[str, bytes], dict]:
    from fp4tune import __version__
    from fp4tune.cache.codec import canonical
    from fp4tune.fleet import schema, signing

    members = {
        f"{t}.ndjson": "".join(sorted(canonical(r) + "\n" for r in rows[t])).encode()
        for t in schema.TABLES
    }
    manifest = {
        "format": schema.FORMAT,
        "schema": schema.VERSION,
        "fp4tune": __version__,
        "node": sha("node", node)[:32],
        "hostname": None,
        "created": 1.7e9,
        "content": content_of(members),
        "rows": {t: len(rows[t]) for t in schema.TABLES},
        "files": {
            n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
            for n, d in members.items()
        },
    }
    return members, signing.sign(manifest, signer) if signer else signing.unsigned(manifest)


def make_keys(folder: Path) -> tuple[Path, Path, Path]:
    """A fleet's private key, a stranger's, and the file of trusted public keys."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = []
    for name in ("fleet.pem", "stranger.pem"):
        key = Ed25519PrivateKey.generate()
        text = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        (folder / name).write_bytes(text)
        made.append(key)
    public = made[0].public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (folder / "trusted.pem").write_bytes(public)
    return folder / "fleet.pem", folder / "stranger.pem", folder / "trusted.pem"


def measured(command: list[str]) -> tuple[dict, str]:
    """What a command took (seconds, of the processors too, and the most memory that its processes
    had together), and what it printed."""
    start, before = time.monotonic(), os.times()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = 0

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            most = max(most, sum(map(resident, family(process.pid))))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    seconds = time.monotonic() - start
    watcher.join()
    if process.returncode not in (0, 1):
        raise SystemExit(f"{command} ended with {process.returncode}")
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    costs = {"seconds": round(seconds, 1), "cpu_seconds": round(used, 1), "peak_mib": most >> 20}
    return {**costs, "load": round(os.getloadavg()[0], 1)}, out


def family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                text = Path(f"/proc/{parent}/task/{task}/children").read_text()
                found += [int(child) for child in text.split()]
        except OSError:
            continue
    return found


def resident(pid: int) -> int:
    """Bytes of a process, its part of what it shares counted once (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def judge(found: dict, planted: dict) -> dict:
    """Who was blamed rightly, wrongly, or not at all."""
    bad = {f"GPU-{n:06d}-{g}": rate for (n, g), (rate, _) in planted["bad"].items()}
    said = {row["device"] for row in found["suspect_gpus"]}
    libraries = {
        sha(ARCHS[a][0], image, b): rate
        for (a, image, b), (rate, _) in planted["libraries"].items()
    }
    blamed = {row["fingerprint"] for row in found["suspect_builds"]}
    slow = {f"GPU-{n:06d}-{g}": f for (n, g), f in planted["slow"].items()}
    told_slow = {row["device"] for row in found["slow_gpus"]}
    right = len(said & bad.keys()) + len(blamed & libraries.keys())
    total = len(said) + len(blamed)
    hidden_a, hidden_i, hidden_b = planted["hidden"][0]
    hidden = sha(ARCHS[hidden_a][0], hidden_i, hidden_b)
    in_open = {d for row in found["undetermined"] for d in row["devices"]}

    def by_rate(plants: dict, blamed: set) -> dict:
        return {
            f"{rate:g}": {
                "planted": sum(r == rate for r in plants.values()),
                "found": sum(r == rate and name in blamed for name, r in plants.items()),
            }
            for rate in RATES
        }

    return {
        "attributions": total,
        "precision": right / total if total else None,
        "wrong": sorted((said - bad.keys()) | (blamed - libraries.keys())),
        "gpus_by_rate": by_rate(bad, said),
        "libraries_by_rate": by_rate(libraries, blamed),
        "bad_gpus_undetermined": len((bad.keys() - said) & in_open),
        "undetermined_series": len(found["undetermined"]),
        "hidden_condition_left_undetermined": hidden not in blamed,
        "transients": {
            "planted": len(planted["transient"]),
            "blamed": len(said & {f"GPU-{n:06d}-{g}" for n, g in planted["transient"]}),
        },
        "slow": {
            f"{factor:g}": {
                "planted": sum(f == factor for f in slow.values()),
                "found": sum(f == factor and name in told_slow for name, f in slow.items()),
            }
            for factor in SLOW
        },
        "slow_wrong": len(told_slow - slow.keys()),
    }


def machine() -> dict:
    name = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{
            p: importlib.metadata.version(p)
            for p in ("pyarrow", "duckdb", "fsspec", "cryptography")
        },
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for bundles and store; else temporary")
    options = parser.parse_args()
    where = options.keep or Path(tempfile.mkdtemp(prefix="fleet-scale-"))
    where.mkdir(parents=True, exist_ok=True)
    folder, store = where / "bundles", where / "store"
    folder.mkdir(exist_ok=True)
    planted = plants(options.nodes, options.gpus, options.seed)
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "nodes": options.nodes,
        "gpus_per_node": options.gpus,
        "seed": options.seed,
        "launches_per_row": PROBLEMS * REPEATS,
        "problems_per_row": PROBLEMS,
    }
    own, other, trusted = make_keys(where)
    start = time.monotonic()
    step = 250
    with ProcessPoolExecutor() as pool:
        parts = [range(a, min(a + step, options.nodes)) for a in range(0, options.nodes, step)]
        futures = [
            pool.submit(generate, p, options.gpus, options.seed, planted, str(folder), str(own))
            for p in parts
        ]
        result["bundle_bytes"] = sum(f.result() for f in futures)
    impostors = forge(str(folder), options.gpus, options.seed, planted, (str(own), str(other)))
    result["generate_seconds"] = round(time.monotonic() - start, 1)
    fp4tune = [sys.executable, "-m", "fp4tune.cli", "fleet"]
    command = [*fp4tune, "merge", str(folder), "--into", str(store), "--keys", str(trusted)]
    costs, out = measured([*command, "--json"])
    merged = json.loads(out)
    reasons: dict[str, int] = {}
    for row in merged["refused"]:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    result["merge"] = {
        **costs,
        "added": len(merged["added"]),
        "rows": merged["rows"],
        "refused": len(merged["refused"]),
        "impostors": impostors,
        "reasons": dict(sorted(reasons.items())),
    }
    costs, out = measured([*command, "--json"])
    again = json.loads(out)
    result["merge_again"] = {**costs, "added": len(again["added"])}
    costs, out = measured([*fp4tune, "report", str(store), "--json"])
    found = json.loads(out)
    assert found["digest"] == report.report(str(store))["digest"]
    result["report"] = costs
    result["store_bytes"] = sum(p.stat().st_size for p in store.rglob("*.parquet"))
    result["attribution"] = judge(found, planted)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (options.out / "fleet-scale.json").write_text(text)
    print(text)
    if not options.keep:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
