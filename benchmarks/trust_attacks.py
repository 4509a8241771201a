"""A state attacked by other users of the node: what each attack got, item by item.

    python benchmarks/trust_attacks.py --out DIR

As root, on a state of root's own in a folder that everyone can enter; the attackers are processes
of users 65534 and 65533, and of root where a pod would be. Each attack counts as `tried`, and as
`failed` where fp4tune did: where what was quarantined was chosen, a writer was held up, a file was
waited for, or a published generation could not be rolled back to. About a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import stores
from _machine import machine
from strangers import OTHER, STRANGER, Staying, as_user
from test_quarantine import SWIZZLED, K, N, store

import fp4tune
from fp4tune.cache import (
    dropbox,
    facts,
    gpulock,
    publish,
    quarantine,
    quarantine_store,
    reader,
    state,
)
from fp4tune.cache.errors import StateError
from fp4tune.cache.ledger import Ledger
from fp4tune.daemon.config import DaemonConfig
from fp4tune.daemon.mend import mend
from fp4tune.daemon.service import Service
from fp4tune.fleet import export, taken
from fp4tune.machine import holders

KNOWN = {name for name, _ in SWIZZLED}
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Files by the ten thousand are made there: a disk would be what is measured."""
PATIENCE = 20.0
"""Seconds after which something counts as waited for."""


class Score:
    """What was tried of one item, and what failed, in words."""

    def __init__(self) -> None:
        self.tried = 0
        self.failed: list[str] = []
        self.details: dict[str, Any] = {}

    def count(self, what: str, held: bool) -> None:
        self.tried += 1
        if not held:
            self.failed.append(what)

    def json(self) -> dict[str, Any]:
        return {"tried": self.tried, "failed": len(self.failed), "which": self.failed[:20],
                **self.details}  # fmt: skip


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    """A state of root's with three backends, the best of which is quarantined."""
    with tempfile.TemporaryDirectory(prefix="fp4tune-attacks-", dir=MEMORY) as base:
        os.chmod(base, 0o755)
        place = store(Path(base) / "state", *SWIZZLED)
        dropbox.prepare(place)
        quarantine_store.write(entry("cutlass", by="operator"), quarantine_store.place(place))
        yield place


def entry(backend: str, **other: Any) -> quarantine.Quarantine:
    return quarantine.make(backend, quarantine.Reach(3, N, K), **other)


def drop(box: Path, document: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        (box / f"{document['id']}.json").write_text(json.dumps(document))


def chosen(place: Path) -> str:
    reader._own, reader._readers[:] = (), []
    return reader.open(place).choose(3, N, K).backend


# -- 1: quarantines


def quarantines() -> Score:
    score = Score()

    def empty(box: Path) -> None:
        for number in range(4096):
            with contextlib.suppress(OSError):
                (box / f"{os.getuid()}-0{number}.json").touch()

    def junk(box: Path) -> None:
        for number in range(300):
            name = f"{os.getuid()}-{number}.json"
            (box / f"f{name}").symlink_to("/etc/shadow")
            os.mkfifo(box / f"p{name}")
            (box / f"d{name}").mkdir()
            (box / f"b{name}").write_bytes(random.Random(number).randbytes(300))
            (box / f".{name}").write_text("{")

    def same_id(box: Path) -> None:
        known = [p.stem for p in (box.parent / quarantine_store.FOLDER).iterdir()]
        for name in known:
            drop(box, {**entry("cudnn").json(), "id": name, "scope": "bucket"})
            drop(box, {**entry("cudnn").json(), "id": f"u0.{name}", "scope": "bucket"})

    def many(box: Path) -> None:
        for number in range(3000):
            drop(
                box,
                {
                    **entry("nobody").json(),
                    "id": f"{os.getuid()}-n{number}",
                    "n": number,
                    "scope": "layer",
                },
            )

    def invented(box: Path) -> None:
        for number in range(1000):
            drop(box, entry(f"invented-{number}").json())

    def future(box: Path) -> None:
        for number in range(200):
            drop(
                box,
                {
                    **entry("cudnn", reason="later").json(),
                    "id": f"{os.getuid()}-z{number}",
                    "at": 9e10,
                },
            )

    def node_wide(box: Path) -> None:
        for scope in ("node", "everything", "*"):
            drop(box, {**entry("all").json(), "scope": scope})

    def removes(box: Path) -> None:
        kept = box.parent / quarantine_store.FOLDER
        for path in [*kept.iterdir(), kept, box.parent / state.CHOICES, box]:
            for act in (os.unlink, os.rmdir, lambda p: os.rename(p, f"{p}-"),
                        lambda p: os.chmod(p, 0o777), lambda p: os.truncate(p, 0)):  # fmt: skip
                with contextlib.suppress(OSError):
                    act(path)

    def lifts(box: Path) -> None:
        for path in (box.parent / quarantine_store.FOLDER).iterdir():
            with contextlib.suppress(StateError):
                quarantine_store.lift(path.stem, str(path.parent))

    attacks = (empty, junk, same_id, many, invented, future, node_wide, removes, lifts)
    for attack in attacks:
        for users in ((STRANGER,), (STRANGER, OTHER), (STRANGER, *range(70000, 70006))):
            with fresh() as place:
                began = time.monotonic()
                for user in users:
                    as_user(lambda: attack(place / dropbox.FOLDER), user)  # noqa: B023
                    score.count(f"{attack.__name__} by {user}", chosen(place) != "cutlass")
                dropbox.collect(place, KNOWN)
                held = chosen(place) in ("marlin", "cudnn", "torch-dequant")
                score.count(f"{attack.__name__} by {len(users)}, taken up", held)
                score.details["slowest_seconds"] = round(
                    max(score.details.get("slowest_seconds", 0.0), time.monotonic() - began), 1
                )
    for owner in (0, STRANGER):  # the spool of an earlier fp4tune
        with fresh() as place:
            kept = place / quarantine_store.FOLDER
            os.chmod(kept, 0o1777)
            os.chown(kept, owner, owner)
            as_user(lambda: empty(kept))  # noqa: B023
            score.count(f"an earlier spool of user {owner}", chosen(place) == "marlin")
            dropbox.collect(place, KNOWN)
            score.count(f"the same, taken over, of {owner}", chosen(place) == "marlin")
    with fresh() as place:  # a flood beside an honest report, with the daemon there
        service = Service(DaemonConfig(state=str(place), gpus=("none",)))
        service.start()
        service.tick()
        as_user(lambda: many(place / dropbox.FOLDER))
        as_user(lambda: fp4tune.report_fault("marlin", 3, N, K, state_dir=place), OTHER)
        began = time.monotonic()
        while chosen(place) != "cudnn" and time.monotonic() < began + PATIENCE:
            service.tick()
        score.count("an honest report in a flood", chosen(place) == "cudnn")
        score.details["report_in_a_flood_seconds"] = round(time.monotonic() - began, 2)
        service.stop()
    return score


# -- 2: locks


def hold(place: Path, how: int) -> list[int]:
    found = []
    for folder, _, names in os.walk(place):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                continue
            found.append(fd)
            for lock, kind in ((fcntl.flock, how), (fcntl.lockf, fcntl.LOCK_SH)):
                with contextlib.suppress(OSError):
                    lock(fd, kind | fcntl.LOCK_NB)
    return found


def handed_on(place: Path, how: int) -> None:
    hold(place, how)
    if os.fork() == 0:
        time.sleep(PATIENCE)
        os._exit(0)


def flickering(place: Path, how: int) -> None:
    """Hold and let go, thousands of times a second, in a process of its own."""
    fds = hold(place, how)
    if os.fork() == 0:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            for fd in fds:
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, how | fcntl.LOCK_NB)
                    fcntl.flock(fd, fcntl.LOCK_UN)
        os._exit(0)


def writes(place: Path) -> dict[str, Callable[[], object]]:
    def turn() -> None:
        with gpulock.Turn(gpulock.path(place, "GPU-1")) as mine:
            assert all(mine.kept() for _ in range(3))

    def run() -> None:
        with Ledger.open(place) as ledger:
            ledger.finish_run(ledger.start_run(seed=1, level="quick", profile="s", device={}))

    def lock(kind: str) -> Callable[[], None]:
        def take() -> None:
            with state.exclusive(state.lock_file(place, kind, "cpu")):
                pass

        return take

    return {
        "publish": lambda: stores.put(place, "new"),
        "rollback": lambda: publish.rollback(place),
        "a run in the ledger": run,
        "a GPU's lock": turn,
        "quarantine": lambda: quarantine_store.write(
            entry("marlin"), quarantine_store.place(place)
        ),
        "take up reports": lambda: dropbox.collect(place, KNOWN),
        **{f"the lock {kind}": lock(kind) for kind in ("probe", "build", "daemon", "join")},
    }


def locks() -> Score:
    score = Score()
    slowest = 0.0
    for how in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        for attack in (hold, handed_on, flickering):
            with fresh() as place:
                gpulock.prepare(place, ["GPU-1", gpulock.CPU])
                for act in writes(place).values():
                    act()
                with Ledger.open(place), Staying(lambda: attack(place, how)):  # noqa: B023
                    for name, act in writes(place).items():
                        began = time.monotonic()
                        try:
                            act()
                            taken = time.monotonic() - began
                            slowest = max(slowest, taken)
                            held = taken < PATIENCE / 2
                        except (StateError, AssertionError):
                            held = False
                        kind = "alone" if how == fcntl.LOCK_EX else "shared"
                        score.count(f"{name} while {attack.__name__} {kind}", held)
                    engine = gpulock.share(place, ["GPU-1"], wait=PATIENCE)
                    score.count("an engine's start", bool(engine.held or engine.problems))
                    engine.close()
    score.details["slowest_seconds"] = round(slowest, 2)
    return score


# -- 4: files


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def bound(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo, "socket": bound, "folder": Path.mkdir, "device": endless, "link loop": loop,
    "a terabyte": huge,
}  # fmt: skip
NAMES = (
    state.CHOICES, state.LEDGER, "ledger.db-wal", "ledger.db-shm", "ledger.db-journal",
    "advisories.json", "prior.json", "node", "choices-1.db", "publish.lock",
    "quarantine/x.json", "reports/x.json", "locks/publish.lock", "gpu-cpu.lock",
)  # fmt: skip


def uses(place: Path) -> None:
    """What commands and the daemon do with a state; each may refuse, in a sentence."""
    for act in (
        lambda: reader.open(place).choose(3, N, K),
        lambda: facts.gather(place),
        lambda: Ledger.open(place, readonly=True).close(),
        lambda: Ledger.open(place).close(),
        lambda: quarantine_store.read(quarantine_store.place(place)),
        lambda: dropbox.collect(place, KNOWN),
        lambda: taken.load(place),
        lambda: export.node_id(place),
        lambda: gpulock.prepare(place, [gpulock.CPU]),
        lambda: gpulock.share(place, [gpulock.CPU], wait=0).close(),
        lambda: stores.put(place, "new"),
        lambda: publish.rollback(place),
        lambda: mend(place),
    ):
        with contextlib.suppress(StateError):
            act()


def in_time(act: Callable[[], object]) -> str:
    """Empty where a process that does this ends by itself in time, without an error."""
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            os.write(says, f"{type(error).__name__}: {error}"[:300].encode())
            os._exit(1)
    os.close(says)
    until = time.monotonic() + PATIENCE
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(said)
            return "it was waited for"
        time.sleep(0.005)
    text = os.read(said, 400).decode(errors="replace")
    os.close(said)
    return text or ("" if done[1] == 0 else f"it ended with {done[1]}")


def files_() -> Score:
    score = Score()
    for name in NAMES:
        for kind, make in KINDS.items():
            with fresh() as place:
                path = place / name
                path.parent.mkdir(exist_ok=True)
                for there in [path, *path.parent.glob(f"{path.name}-*")]:
                    if there.is_file():
                        there.unlink()
                make(path)
                why = in_time(lambda: uses(place))  # noqa: B023
                score.count(f"{kind} as {name}: {why}", not why)
    for kind in ("pipe", "device"):
        with fresh() as place:
            (place / state.CHOICES).unlink()
            KINDS[kind](place / state.CHOICES)
            score.count(f"the daemon and a {kind}", daemon_ends(place))
    return score


def daemon_ends(place: Path) -> bool:
    """Whether a daemon of this state serves and ends on SIGTERM."""
    config = place.parent / "daemon.toml"
    config.write_text(f'state = "{place}"\ngpus = ["none"]\n[http]\nlisten = "none"\n')
    command = [sys.executable, "-m", "fp4tune.cli", "daemon", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        line = daemon.stderr.readline()
        daemon.terminate()
        try:
            return daemon.wait(PATIENCE) == 0 and "state" in line
        except subprocess.TimeoutExpired:
            daemon.kill()
            return False


# -- 12: a state that is removed


def removed() -> Score:
    score = Score()

    def folder(place: Path) -> None:
        place.rename(place.with_name("away"))

    def by_a_file(place: Path) -> None:
        folder(place)
        place.write_text("")

    def by_a_link(place: Path) -> None:
        folder(place)
        place.symlink_to("nowhere")

    def by_a_pipe(place: Path) -> None:
        folder(place)
        os.mkfifo(place)

    def by_another(place: Path) -> None:
        folder(place)
        place.mkdir()

    def choices(place: Path) -> None:
        for path in place.glob("choices*.db"):
            path.unlink()

    for harm in (folder, by_a_file, by_a_link, by_a_pipe, by_another, choices):
        with fresh() as place:
            service = Service(DaemonConfig(state=str(place), gpus=("none",)))
            service.start()
            service.revalidated = True
            service.tick()
            ready = service.board.ready
            harm(place)
            service._look_after = 0.0
            service.tick()
            score.count(f"removed: {harm.__name__}", ready and not service.board.ready)
            service.stop()
    return score


# -- 13: what can be rolled back to


def rollbacks(sequences: int) -> Score:
    from test_rollback import LEDGER_STEPS, Faults

    score = Score()
    random_ = random.Random(13)
    attempts = failures = 0
    keep, linked = publish.KEEP, publish.LINKED
    publish.KEEP, publish.LINKED = 4, 2
    try:
        for _ in range(sequences):
            with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
                place = Path(folder)
                published = [(stores.put(place, "first"), "first")]
                for turn in range(10):
                    faults = Faults(random_.randrange(30), random_.randint(0, 12))
                    before = {name: getattr(os, name) for name in Faults.CALLS}
                    steps = {name: getattr(Ledger, name) for name in LEDGER_STEPS}
                    for name, call in before.items():
                        setattr(os, name, faults.wrapped(call))
                    for name, call in steps.items():
                        setattr(Ledger, name, faults.wrapped(call))
                    attempts += 1
                    try:
                        published.append((stores.put(place, f"t{turn}"), f"t{turn}"))
                    except (StateError, OSError):
                        failures += 1
                    finally:
                        for name, call in before.items():
                            setattr(os, name, call)
                        for name, call in steps.items():
                            setattr(Ledger, name, call)
                    found = reader.open(place)
                    if found.choose(3, N, K).tactic != published[-1][1]:
                        published.append((found.generation, found.choose(3, N, K).tactic))
                for number, tag in published[-4:]:
                    try:
                        publish.rollback(place, number)
                        held = reader.open(place).choose(3, N, K).tactic == tag
                    except StateError:
                        held = False
                    score.count(f"rollback to {number}", held)
    finally:
        publish.KEEP, publish.LINKED = keep, linked
    score.details |= {"publications": attempts, "of_which_failed": failures}
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=40, help="Of publications that fail.")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("needs root, to act as other users")
    reader.INTERVAL = 0.0
    holders._COMPUTES = "a library of no name"  # the attackers are forked from what has torch
    began = time.monotonic()
    result: dict[str, Any] = {"machine": machine(), "items": {}}
    for number, name, attack in (
        (1, "a quarantine cannot be undone by who may only report", quarantines),
        (2, "locks that only their owner can take", locks),
        (4, "only regular files, never waiting", files_),
        (12, "a state that is removed is not ready", removed),
        (13, "what can be rolled back to stays", lambda: rollbacks(options.sequences)),
    ):
        start = time.monotonic()
        score = attack().json()
        result["items"][str(number)] = {
            "what": name, **score, "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
        print(f"{number:2} {name}: {score['tried']} tried, {score['failed']} failed", flush=True)
        for which in score["which"]:
            print(f"     {which}")
    result["seconds"] = round(time.monotonic() - began, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attacks.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
