"""The daemon under all that goes wrong on a node: are choices always served, is nothing lost?

A daemon on the CPU with real probes, its state on a small tmpfs in a mount namespace of its own. At
random, by a seed: kill -9 of the daemon and of a probe, a full disk, clock jumps, choices.db and
ledger.db deleted or damaged, a backend's wheel replaced (which starts a probe), 200 clients at
once, malformed requests. Meanwhile an engine's reader asks without a pause. For the last third the
daemon is not killed, so that its memory can be looked at. Every run is appended to the result, and
a run that is cut short leaves what it saw until then.

A probe is killed whole: a worker that is killed alone is a crash of its backend, as far as a probe
can tell, and the verdict says so.

    python benchmarks/daemon_soak.py --out DIR --minutes 60
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _clock as clock
import _node as node
import psutil

from fp4tune.cache import quarantine_store, reader, state
from fp4tune.cache.errors import StateError

INSIDE = "SOAK_INSIDE"
CHILD = "SOAK_CHILD"
SIZE = "64m"
CLIENTS = 200
TOKEN = "soak-token-of-some-length"
PATHS = (
    "/readyz", "/healthz", "/metrics", "/v1/choices", "/v1/findings",
    "/v1/choices?m=3&n=128&k=256",
)  # fmt: skip
MALFORMED = (
    b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/7\r\n\r\n", b"A" * 100_000,
    b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n" + b"[" * 9000,
    b"GET /v1/choices?m=%ff&n=\0 HTTP/1.1\r\nHost: x\r\n\r\n",
)  # fmt: skip


class Soak:
    def __init__(self, place: Path, seed: int, minutes: float, save: Any) -> None:
        self.place, self.seconds, self.save = place, minutes * 60, save
        self.state, self.site, self.clock = place / "state", place / "site", place / "clock"
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.http: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.skipped: list[str] = []
        self.gaps: list[float] = []
        self.unopened: list[float] = []
        self.rss: list[tuple[float, int, int]] = []
        self.memory: list[tuple[float, int, int]] = []
        self.version = 0
        self.rows = 0
        self.stop = threading.Event()
        self.may_kill = True
        self.began = time.monotonic()
        listen = f"unix:{place}/d.sock"
        token = place / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        config = place / "daemon.toml"
        config.write_text(
            f'state = "{self.state}"\ngpus = ["cpu"]\n[probe]\nshapes = ["128,256"]\nmax_m = 4\n'
            'level = "quick"\nactivations = ["bf16"]\n'
            'backends = ["torch-dequant", "wheel-resident"]\n[watch]\nseconds = 1\n'
            "[idle]\nquiet_seconds = 1\n[limits]\nlayer_seconds = 600\n"
            f'[http]\nlisten = "{listen}"\ntoken_file = "{token}"\n'
        )
        env = node.environ(self.site, **{CHILD: "1"})
        library = clock.library(place)
        if library is None:
            self.skipped.append("clock jumps: there is no C compiler")
        else:
            self.jump(0)
            env |= clock.variables(library, self.clock)
        self.jumps = library is not None
        self.daemon = node.Daemon(config, listen, env, place / "daemon.log")

    def fail(self, sentence: str) -> None:
        if len(self.wrong) < 100:
            self.wrong.append(f"{time.monotonic() - self.began:.0f} s: {sentence}")

    # -- the node's life

    def replace_wheel(self) -> None:
        self.version += 1
        node.install(node.wheel(self.place / "wheels", f"1.{self.version}"), self.site)

    def jump(self, seconds: int) -> None:
        clock.jump(self.clock, seconds)

    def kill_daemon(self) -> None:
        self.daemon.kill()
        self.daemon.start()

    def kill_probe(self) -> bool:
        assert self.daemon.process is not None
        found = _children(self.daemon.process.pid)
        mine = [process for process in found if _command(process).startswith("probe")]
        for process in mine:
            _kill(process.pid)
        return bool(mine)

    def fill_disk(self) -> None:
        filler = self.state / "filler"
        try:
            with open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * (1 << 20))
        except OSError:
            pass
        time.sleep(self.random.uniform(2, 10))
        filler.unlink(missing_ok=True)

    def delete_choices(self) -> None:
        (self.state / state.CHOICES).unlink(missing_ok=True)

    def damage_choices(self) -> None:
        path = self.state / state.CHOICES
        data = bytearray(path.read_bytes()) if path.exists() else bytearray(b"x" * 100)
        for _ in range(50):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        fresh = self.state / "damaged"
        fresh.write_bytes(data[: self.random.randrange(1, len(data) + 1)])
        os.replace(fresh, path)

    def damage_ledger(self) -> bool:
        self.look_at_ledger()
        path = self.state / state.LEDGER
        if not path.exists():
            return False
        with open(path, "r+b") as file:
            file.write(bytes(self.random.randrange(256) for _ in range(4096)))
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        self.rows = 0
        return True

    def delete_ledger(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.state / state.LEDGER}{suffix}").unlink(missing_ok=True)
        self.rows = 0

    def clock_jump(self) -> None:
        self.jump(clock.somewhere(self.random))

    def clients(self) -> None:
        """CLIENTS requests at once, each answered with what it should be."""
        if not self.up(30):
            return
        pool = ThreadPoolExecutor(CLIENTS)
        before = self.daemon.process
        paths = [self.random.choice(PATHS) for _ in range(CLIENTS)]
        answers = list(pool.map(lambda path: self.daemon.get(path, 60), paths))
        pool.shutdown()
        if self.daemon.process is not before or not self.daemon.alive:
            return
        for path, (status, document) in zip(paths, answers, strict=True):
            self.http[f"{path.partition('?')[0]} {status}"] += 1
            allowed = (200, 503) if path == "/readyz" else (200,)
            if status not in allowed:
                self.fail(f"{path} was answered with {status}: {str(document)[:200]}")
            if path == "/v1/choices" and status == 200 and not document["choices"]:
                self.fail("/v1/choices was empty")

    def malformed(self) -> None:
        if not self.up(30):
            return
        for raw in MALFORMED:
            try:
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(20)
                    client.connect(self.daemon.listen[5:])
                    client.sendall(raw)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
            except TimeoutError:
                self.fail(f"{raw[:30]!r} was left hanging")
            except OSError:
                pass
            self.http["malformed"] += 1

    def fault(self) -> None:
        """A fault in production, reported and lifted again."""
        if not self.up(30):
            return
        body = json.dumps({"backend": "wheel-resident", "m": 3, "n": 128, "k": 256})
        connection = node.Unix(self.daemon.listen[5:], timeout=30)
        try:
            connection.request("POST", "/v1/faults", body, {"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            document = json.loads(answer.read())
            self.http[f"/v1/faults {answer.status}"] += 1
            if answer.status == 201:
                time.sleep(3)
                quarantine_store.lift(
                    document["quarantine"]["id"], quarantine_store.place(self.state)
                )
        except (OSError, ValueError, StateError):
            self.http["/v1/faults 0"] += 1
        finally:
            connection.close()

    def up(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop.is_set():
            if self.daemon.get("/healthz", 5)[0]:
                return True
            time.sleep(0.1)
        return False

    # -- what must hold

    def reading(self) -> None:
        """An engine's reader, opened once, that asks without a pause; and one opened anew."""
        long_lived = reader.open(self.state)
        gone: float | None = None
        while not self.stop.wait(0.05):
            found = long_lived.choose(3, 128, 256)
            self.read[found.status] += 1
            if found.status not in ("safe", "stale", "quarantined"):
                self.fail(f"the reader said {found.status}: {found.reason}")
            try:
                fresh = reader.open(self.state).choose(3, 128, 256)
                if fresh.status not in ("safe", "stale", "quarantined"):
                    self.fail(f"a new reader said {fresh.status}: {fresh.reason}")
                if gone is not None:
                    self.unopened.append(time.monotonic() - gone)
                    gone = None
            except StateError:
                gone = gone or time.monotonic()
                self.read["could not be opened"] += 1

    def serving(self) -> None:
        """How long nobody answers, and what memory and descriptors the daemon has."""
        last = time.monotonic()
        next_look = 0.0
        while not self.stop.wait(0.1):
            status, document = self.daemon.get("/v1/choices", 20)
            now = time.monotonic()
            if status == 200:
                if now - last > 1:
                    self.gaps.append(now - last)
                last = now
                if not document["choices"]:
                    self.fail("/v1/choices was empty")
            if now >= next_look and self.daemon.alive:
                next_look = now + 5
                assert self.daemon.process is not None
                pid = self.daemon.process.pid
                self.memory.append(
                    (now - self.began, psutil.Process(pid).memory_info().rss, _descriptors(pid))
                )

    def look_at_ledger(self) -> None:
        """Rows of evidence only ever become more."""
        path = self.state / state.LEDGER
        try:
            with sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=20) as db:
                (rows,) = db.execute("SELECT count(*) FROM evidence").fetchone()
            if rows < self.rows:
                self.fail(f"the ledger had {self.rows} rows of evidence, and has {rows}")
            self.rows = rows
            self.read["looks at the ledger"] += 1
        except sqlite3.Error:
            self.read["ledger could not be read"] += 1

    # -- the run

    def run(self) -> None:
        self.state.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(self.state)],
            capture_output=True,
        )
        small = mounted.returncode == 0
        if not small:
            self.skipped.append("full disk: a tmpfs cannot be mounted here")
        self.site.mkdir()
        self.replace_wheel()
        self.daemon.start()
        took, _ = self.daemon.until("/readyz", lambda status, d: status == 200, 900)
        first = round(took, 1)
        print(f"ready after {first} s", flush=True)
        threads = [threading.Thread(target=t, daemon=True) for t in (self.reading, self.serving)]
        for thread in threads:
            thread.start()
        self.began = time.monotonic()
        actions: list[tuple[str, Any, float]] = [
            ("kill -9 of the daemon", self.kill_daemon, 3),
            ("kill -9 of a probe", self.kill_probe, 4),
            ("wheel replaced", self.replace_wheel, 3),
            ("choices.db deleted", self.delete_choices, 2),
            ("choices.db damaged", self.damage_choices, 2),
            ("ledger.db damaged", self.damage_ledger, 0.5),
            ("ledger.db deleted", self.delete_ledger, 0.5),
            ("200 clients at once", self.clients, 3),
            ("malformed requests", self.malformed, 2),
            ("fault reported", self.fault, 1),
        ]
        if small:
            actions.append(("full disk", self.fill_disk, 2))
        if self.jumps:
            actions.append(("clock jump", self.clock_jump, 2))
        next_save = 0.0
        while time.monotonic() - self.began < self.seconds:
            elapsed = time.monotonic() - self.began
            self.may_kill = elapsed < self.seconds * 2 / 3
            possible = [a for a in actions if self.may_kill or a[0] != "kill -9 of the daemon"]
            name, act, _ = self.random.choices(possible, [w for *_, w in possible])[0]
            if act() is not False:
                self.done[name] += 1
                print(f"{elapsed:6.0f} s {name}", flush=True)
            self.look_at_ledger()
            if not self.daemon.alive:
                self.fail("the daemon ended by itself")
                self.daemon.start()
            if elapsed >= next_save:
                next_save = elapsed + 30
                self.save(self.result(first, "cut short"))
            time.sleep(self.random.uniform(1, 8))
        if self.jumps:
            self.jump(0)
        try:
            calm, _ = self.daemon.until(
                "/healthz",
                lambda s, d: (
                    s == 200
                    and d["ready"]
                    and not d["stale"]
                    and not d["problem"]
                    and all(g["pending"] == 0 and g["state"] == "free" for g in d["devices"])
                ),
                1200,
            )
        except TimeoutError as error:
            calm = None
            self.fail(f"it never came to rest: {error}")
        self.stop.set()
        for thread in threads:
            thread.join(60)
        code, took = self.daemon.stop()
        if code != 0 or took > 5:
            self.fail(f"SIGTERM: exit code {code} after {took:.1f} s")
        time.sleep(1)
        left = [process.pid for process in _children(0)]
        if left:
            self.fail(f"processes {left} were left behind")
        result = self.result(first, "finished")
        result["at_rest_after_s"] = calm and round(calm, 1)
        result["sigterm_s"] = round(took, 2)
        self.save(result)

    def result(self, first: float, how: str) -> dict[str, Any]:
        calm = [m for m in self.memory if m[0] > self.seconds * 2 / 3 + 20]
        quarter = max(1, len(calm) // 4)
        memory = None
        if len(calm) >= 8:
            memory = {
                "samples": len(calm),
                "first_quarter_mib": _mib(calm[:quarter]),
                "last_quarter_mib": _mib(calm[-quarter:]),
                "most_mib": round(max(m[1] for m in calm) / 2**20, 1),
                "descriptors": [calm[0][2], calm[-1][2]],
            }
        return {
            "run": how,
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, no GPU",
            "first_ready_s": first,
            "what_was_done": dict(sorted(self.done.items())),
            "skipped": self.skipped,
            "wrong": self.wrong,
            "requests": dict(sorted(self.http.items())),
            "reader": dict(sorted(self.read.items())),
            "seconds_without_an_answer": _spread(self.gaps),
            "seconds_a_new_reader_could_not_open": _spread(self.unopened),
            "memory_of_the_last_daemon": memory,
        }


def _mib(samples: list[tuple[float, int, int]]) -> float:
    return round(statistics.median(s[1] for s in samples) / 2**20, 1)


def _spread(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"times": 0}
    return {
        "times": len(values),
        "median": round(statistics.median(values), 1),
        "most": round(max(values), 1),
    }


def _children(daemon: int) -> list[psutil.Process]:
    """Every process that the daemon, this one or one before it, has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != daemon and process.environ().get(CHILD):
                found.append(process)
    return found


def _command(process: psutil.Process) -> str:
    """What a process runs: of the daemon's children without the words that start them."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        if "fp4tune.daemon.beside" in words:
            return " ".join(words[words.index("fp4tune.daemon.beside") + 4 :])
        return " ".join(words)
    return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    if INSIDE not in os.environ:
        can = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
        prefix = ["unshare", "-m"] if can else []
        os.environ[INSIDE] = "1"
        command = [*prefix, sys.executable, *sys.argv]
        os.execvp(command[0], command)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "daemon_soak.json"
    earlier = json.loads(path.read_text()) if path.exists() else []
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    place = Path(tempfile.mkdtemp(prefix="fp4tune-soak-"))

    def save(result: dict[str, Any]) -> None:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps([*earlier, {"seed": seed, **result}], indent=1) + "\n")
        os.replace(temporary, path)

    soak = Soak(place, seed, options.minutes, save)
    try:
        soak.run()
    finally:
        soak.stop.set()
        soak.daemon.kill()
        shutil.copy(place / "daemon.log", options.out / "daemon_soak.log")
        subprocess.run(["umount", "-l", str(place / "state")], capture_output=True)
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(soak.wrong, indent=1))
    sys.exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    main()
