"""The daemon's HTTP side attacked: is the health answered, and are others, all the while?

A daemon of the command line on TCP and on its health socket. Attackers are processes, as another
user (65534, where this runs as root) or as the same one: connections held half open (550, and 2,000
that are made anew as they are closed), request bodies a byte at a time, answers that nobody takes,
pipelines of thousands of requests, and all of it at once. Meanwhile, ten times a second and as the
user that probes of Kubernetes come from, /healthz and /readyz are asked on TCP and on the socket,
and /v1/choices on TCP: how many were answered with what, and after how long.

    python benchmarks/daemon_attack.py --out DIR --seconds 15
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _node as node
import psutil
from _machine import machine

ATTACK = r"""
import os, random, resource, select, socket, sys, time
place, kind = (sys.argv[1], int(sys.argv[2])), sys.argv[3]
count, uid = int(sys.argv[4]), sys.argv[5]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
if uid != "-":
    os.setuid(int(uid))
HALF = b"GET /v1/choices HTTP/1.1\r\nHost: x\r\n"
BODY = b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n"
ASK = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
held = []
print("attacking", flush=True)

def connected():
    one = socket.socket()
    one.settimeout(2)
    try:
        one.connect(place)
        one.sendall({"half": HALF, "renewed": HALF, "body": BODY}.get(kind, ASK * 200))
        one.setblocking(False)
        return one
    except OSError:
        one.close()
        return None

while True:
    while len(held) < count:
        one = connected()
        if one is None:
            time.sleep(0.01)
            break
        held.append(one)
    if kind == "half" and len(held) >= count:
        time.sleep(0.2)
        continue
    for one in list(held):
        try:
            if kind == "body":
                one.send(b"{")
            elif kind in ("unread", "pipeline"):
                one.send(ASK * 50)
            if kind != "unread":
                while one.recv(65536):
                    pass
                raise ConnectionError
        except BlockingIOError:
            pass
        except OSError:
            one.close()
            held.remove(one)
"""
KINDS = {
    "550 held half open": [("half", 550)],
    "2000 half open, made anew": [("renewed", 2000)],
    "500 bodies a byte at a time": [("body", 500)],
    "300 answers that nobody takes": [("unread", 300)],
    "100 pipelines": [("pipeline", 100)],
    "all of it at once": [
        ("half", 550), ("renewed", 2000), ("body", 500), ("unread", 300), ("pipeline", 100),
    ],
}  # fmt: skip


def asked(listen: str, path: str) -> tuple[int, float]:
    """(status, seconds); 0 where there was no answer in 5 seconds."""
    began = time.monotonic()
    try:
        status = node.get(listen, path, 5.0)[0]
    except Exception:  # whatever a cut connection looks like, it is no answer
        status = 0
    return status, time.monotonic() - began


def measured(targets: dict[str, tuple[str, str]], seconds: float) -> dict[str, Any]:
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in targets}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for name, (listen, path) in targets.items():
            found[name].append(asked(listen, path))
        time.sleep(0.1)
    return {
        name: {
            "asked": len(answers),
            "answered": dict(Counter(str(status) for status, _ in answers)),
            "median_ms": round(1e3 * statistics.median(took for _, took in answers), 1),
            "most_ms": round(1e3 * max(took for _, took in answers), 1),
        }
        for name, answers in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from test_daemon_evidence import put

    users = ["-", "65534"] if os.geteuid() == 0 else ["-"]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        put(place / "state", place / "site", ("fast", "1.0"))
        port = node.free_port()
        config = place / "daemon.toml"
        config.write_text(
            f'state = "{place}/state"\ngpus = ["none"]\n[http]\nlisten = "127.0.0.1:{port}"\n'
            f'health = "unix:{place}/health.sock"\n'
        )
        listen, private = f"127.0.0.1:{port}", f"unix:{place}/health.sock"
        targets = {
            "/healthz": (listen, "/healthz"),
            "/readyz": (listen, "/readyz"),
            "/v1/choices": (listen, "/v1/choices"),
            "/readyz on the socket": (private, "/readyz"),
        }
        daemon = subprocess.Popen(
            node.fp4tune("daemon", "--config", config), stderr=subprocess.DEVNULL
        )
        try:
            while asked(private, "/readyz")[0] != 200 and daemon.poll() is None:
                time.sleep(0.2)
            process = psutil.Process(daemon.pid)
            for name, kinds in [("nothing", []), *KINDS.items()]:
                for user in users if kinds else ["-"]:
                    attackers = [
                        subprocess.Popen(
                            [sys.executable, "-S", "-c", ATTACK, "127.0.0.1", str(port), kind,
                             str(count), user],
                            stdout=subprocess.PIPE,
                        )
                        for kind, count in kinds
                    ]  # fmt: skip
                    for one in attackers:
                        assert one.stdout is not None
                        one.stdout.readline()
                    time.sleep(1.0)
                    answers = measured(targets, options.seconds)
                    rounds.append(
                        {
                            "attack": name,
                            "as": "another user" if user != "-" else "the same user",
                            "answers": answers,
                            "daemon_connections": len(process.net_connections("tcp")),
                            "daemon_rss_mib": round(process.memory_info().rss / (1 << 20)),
                        }
                    )
                    print(json.dumps(rounds[-1]), flush=True)
                    for one in attackers:
                        one.kill()
                        one.wait()
            daemon.terminate()
            code = daemon.wait(20)
        finally:
            daemon.kill()
    result = {
        "machine": machine(),
        "load_of_one_minute": round(os.getloadavg()[0], 1),
        "limits": {"connections": 512, "connections_per_peer": 128},
        "rounds": rounds,
        "exit_code_after_sigterm": code,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "daemon-attack.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
