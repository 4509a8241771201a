"""More attacks on what fp4tune keeps and takes in, of kinds that the tests do not know.

    python benchmarks/trust_more.py --out DIR [--items 1 3 6 7 8]

As root, so that other users can be impersonated. Each attack counts as `tried`, and as `failed`
where fp4tune did: where a report was lost, rows went without a word, a file of advisories changed
something, a process outlived its worker, a bundle was taken that should not have been or raised.
Each item runs in a process of its own; with all of them about a minute on a machine that is free.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import bombs
import fleets
import test_advisories
from _machine import machine
from strangers import OTHER, as_user
from test_damage import everything, fill
from test_quarantine import K, N
from trust_attacks import KINDS, KNOWN, Score, chosen, drop, entry, fresh

import fp4tune
from fp4tune import cli
from fp4tune.cache import dropbox, quarantine_store, reader, schema, state
from fp4tune.cache.errors import StateError
from fp4tune.cache.ledger import Ledger
from fp4tune.errors import Refused
from fp4tune.fleet import adopt, bundle, signing
from fp4tune.machine import processes
from fp4tune.probes.worker.supervisor import Worker, WorkerFailed

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="fp4tune-more-", dir=MEMORY)


# -- 1: reports


def reports() -> Score:
    score = Score()

    def honest(place: Path) -> None:
        as_user(lambda: fp4tune.report_fault("marlin", 3, N, K, state_dir=place), OTHER)

    def taken_up(place: Path) -> bool:
        dropbox.collect(place, KNOWN)
        return chosen(place) in ("cudnn", "torch-dequant")

    def many_users(box: Path) -> None:
        for user in range(80000, 80040):
            for number in range(5):
                name = f"{user}-{number}"
                each = {**entry("nobody").json(), "id": name, "n": number, "scope": "layer"}
                as_user(lambda: drop(box, each), user)  # noqa: B023

    def odd_ids(box: Path) -> None:
        for name in ("u65533.x", "others.x", "u-1.x", "u0.u0.x", "x" * 128, "everything", "a..b"):
            drop(box, {**entry("cudnn").json(), "id": name, "scope": "bucket"})

    def junk(box: Path) -> None:
        for number in range(500):
            for kind, make in KINDS.items():
                with contextlib.suppress(OSError):
                    make(box / f"{kind}-{number}.json".replace(" ", "-"))
            (box / f"folder-{number}.json").mkdir(exist_ok=True)
            with contextlib.suppress(OSError):
                (box / f"folder-{number}.json" / "x").touch()
            (box / ("n" * 240 + f"{number}.json")).touch()

    for attack in (many_users, odd_ids, junk):
        with fresh() as place:
            box = place / dropbox.FOLDER
            if attack is many_users:
                attack(box)
            else:
                as_user(lambda: attack(box))  # noqa: B023
            honest(place)
            score.count(f"{attack.__name__} before an honest report", taken_up(place))
    with (
        fresh() as place
    ):  # a second name, as a kernel without protected_hardlinks lets anyone make
        honest(place)
        (report,) = (place / dropbox.FOLDER).iterdir()
        os.link(report, place.parent / "kept")
        score.count("a second name of a report", taken_up(place))
    links = ("the store", "/", "/proc/self/fd", "itself")
    for to in links:
        with fresh() as place:
            shared = place.parent / "shared"
            shared.mkdir()
            shared.chmod(0o1777)
            box, kept = shared / "box", quarantine_store.place(place)
            where = {"the store": kept, "itself": str(box)}.get(to, to)
            as_user(lambda: box.symlink_to(where))  # noqa: B023
            before = sorted(os.listdir(kept))
            os.environ[dropbox.VARIABLE] = str(box)
            dropbox.collect(place, KNOWN)
            del os.environ[dropbox.VARIABLE]
            held = sorted(os.listdir(kept)) == before and chosen(place) == "marlin"
            score.count(f"a link to {to} as a drop box", held)
    return score


# -- 3: the ledger


def ledgers() -> Score:
    score = Score()
    rng = random.Random(3)
    with folder() as name:
        base = Path(name)
        if os.fork() == 0:
            with Ledger.open(base / "killed"):
                fill(base / "killed", runs=2, each=6)
                os.kill(os.getpid(), signal.SIGKILL)
        os.wait()
        shutil.copytree(base / "killed", base / "whole")
        stored, _ = everything(base / "whole", readonly=False)

        def count(what: str, place: Path) -> None:
            try:
                found, said = everything(place, readonly=rng.random() < 0.5)
                held = found == stored or bool(said)
            except StateError:
                held = True
            except Exception as error:
                what, held = f"{what}: {type(error).__name__}", False
            score.count(what, held)
            shutil.rmtree(place)

        for suffix in ("-wal", "-shm"):
            data = (base / "killed" / f"{state.LEDGER}{suffix}").read_bytes()
            for how in ("a bit", "cut off", "gone"):
                for _ in range(1 if how == "gone" else 60):
                    place = shutil.copytree(base / "killed", base / "copy")
                    broken = bytearray(data)
                    bit = rng.randrange(8 * len(data))
                    broken[bit // 8] ^= 1 << bit % 8
                    path = place / f"{state.LEDGER}{suffix}"
                    path.write_bytes(broken if how == "a bit" else data[: rng.randrange(len(data))])
                    if how == "gone":
                        path.unlink()
                    count(f"{suffix}: {how}", place)
        data = (base / "whole" / state.LEDGER).read_bytes()
        pages = len(data) // 4096
        for how in ("swapped", "over another", "zeroed", "cut off"):
            for _ in range(60):
                (base / "copy").mkdir()
                broken = bytearray(data)
                one, two = (
                    slice(4096 * n, 4096 * n + 4096) for n in rng.sample(range(1, pages), 2)
                )
                broken[one] = bytes(4096) if how == "zeroed" else data[two]
                if how == "swapped":
                    broken[two] = data[one]
                cut = rng.randrange(len(data)) if how == "cut off" else len(data)
                (base / "copy" / state.LEDGER).write_bytes(broken[:cut])
                count(f"pages {how}", base / "copy")
        run = "(SELECT id FROM run ORDER BY started {} LIMIT 1)"
        of_run = [
            f"DELETE FROM {table} WHERE run = {run}" for table in (*schema.OF_RUNS, "contents")
        ]
        for sql in (
            *([*of_run, f"DELETE FROM run WHERE id = {run}"] for _ in "x"),
            *([f"DELETE FROM {table}"] for table in schema.NUMBERED),
            [
                "UPDATE finding SET id = id + 9999 WHERE id = 1",
                "UPDATE finding SET id = 1 WHERE id = 2",
            ],
            ["UPDATE finding SET seal = NULL"],
        ):
            for order in ("ASC", "DESC"):
                (base / "copy").mkdir()
                (base / "copy" / state.LEDGER).write_bytes(data)
                with contextlib.closing(sqlite3.connect(base / "copy" / state.LEDGER)) as conn:
                    for each in sql:
                        conn.execute(each.format(order))
                    conn.commit()
                count(sql[-1], base / "copy")
    return score


# -- 6: advisories


def advice() -> Score:
    score = Score()
    with folder() as name:
        base = Path(name)
        node = base / "node"
        node.mkdir()
        made = test_advisories.document

        def count(what: str, text: str | bytes, keys: Any = None, taken: bool = False) -> None:
            path = base / "advice.json"
            path.write_bytes(
                text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            )
            before = test_advisories.everything(node)
            try:
                adopt.adopt(str(path), node, keys)
                held = taken
            except (Refused, StateError) as error:
                held = not taken and str(error).isprintable() and len(str(error)) < 600
            except BaseException as error:
                what, held = f"{what}: {type(error).__name__}", False
            score.count(what, held and (taken or test_advisories.everything(node) == before))

        plain = json.dumps(made())
        numbers = ("1e400", "9" * 4000, "9" * 5000, "1000.0", "true", "NaN", "-Infinity", '"1000"')
        for number in numbers:
            count(f"serial {number[:9]}", plain.replace('"serial": 1000', f'"serial": {number}'))
        for value in ("NaN", "1e999", "[" * 5000 + "]" * 5000):
            odd = json.dumps(made(advisories=[test_advisories.advisory(evidence=["@"])]))
            count(f"evidence {value[:9]}", odd.replace('"@"', value))
        for what, text in {
            "a mark": "\ufeff" + plain, "UTF-16": plain.encode("utf-16"), "twice": plain * 2,
            "Latin": plain.encode() + b"\xe9", "a nul": plain + "\0", "nothing": "", "null": "null",
            "gzip": gzip.compress(plain.encode()), "zip": bombs.zipped({}, b"{}"),
        }.items():  # fmt: skip
            count(what, text)
        looks = (
            "\ud800",
            "\u202e",
            "\x1b[2J",
            "fаst",
            "ｆast",
            "fast\u0301",
            "fast\n",
            " fast",
            "f\u200b",
        )
        for text in looks:
            advisory = test_advisories.advisory(backend=text)
            count(f"backend {text!a}", json.dumps(made(advisories=[advisory])))
        private, public = fleets.key(base / "key")
        other, _ = fleets.key(base / "other")
        keys = signing.keys(public)
        signed = signing.sign(made(3000), private)
        text = json.dumps(signed)
        order = 2**252 + 27742317777372353535851937790883648493
        raw = bytes.fromhex(signed["signature"])
        again = (int.from_bytes(raw[32:], "little") + order).to_bytes(32, "little")
        for what, forged in {
            "a second serial": text[:-1] + ', "serial": 9000}',
            "a second signature": text[:-1] + f', "signature": "{"0" * 128}"' + "}",
            "no signature in the end": text[:-1] + ', "key": null, "signature": null}',
            "capitals": json.dumps({**signed, "signature": signed["signature"].upper()}),
            "another key": json.dumps(signing.sign(made(5000), other)),
            "a malleable signature": json.dumps({**signed, "signature": (raw[:32] + again).hex()}),
            "the neutral key": json.dumps(
                {**signed, "key": "01" + "00" * 31, "signature": "01" + "00" * 63}
            ),
        }.items():
            count(what, forged, keys)
        count("the signed one itself", text, keys, taken=True)
        count(
            "the same with an older number in front", '{"serial": 9, ' + text[1:], keys, taken=True
        )
    return score


# -- 7: workers

SLEEP = 'os.execve("/bin/sleep", ["sleep", "600"], {})'
WORKERS = {
    "another name, deaf": f"""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                open("/proc/self/comm", "w").write("kworker/0:1")
                {SLEEP}
            os._exit(0)
    """,
    "a thread that forks on": f"""
        def on():
            while True:
                if os.fork() == 0:
                    os.setsid()
                    {SLEEP}
                time.sleep(0.05)
        threading.Thread(target=on, daemon=True).start()
    """,
    "stopped": """
        found = subprocess.Popen(["setsid", "sleep", "600"])
        os.kill(found.pid, signal.SIGSTOP)
    """,
    "a namespace of its own": """
        subprocess.Popen(["setsid", "-f", "unshare", "-p", "-f", "sleep", "600"])
    """,
    "all that keep it killed": f"""
        def parent(pid):
            return int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(0.3)
                keeper = parent(os.getpid())
                for pid in (parent(keeper), keeper):
                    os.kill(pid, 9)
                {SLEEP}
            os._exit(0)
        time.sleep(600)
    """,
    "forged on every descriptor": """
        for fd in range(3, 1100):
            for text in (b"", b"0" * 32):
                try:
                    told = b'{"id": 1, "event": "done", "result": "forged"}'
                    os.write(fd, b"\\n" + text + told + b"\\n")
                except OSError:
                    pass
    """,
    "600 MB printed": """
        for _ in range(300):
            os.write(1, b"x" * (1 << 20)), os.write(2, b"x" * (1 << 20))
    """,
}


def workers() -> Score:
    """Each in a process that ends as the command does; what is left of it is looked for."""
    score = Score()
    head = "import os, signal, subprocess, threading, time\n"
    head += "from fp4tune.probes.zoo.floor import Right\n"
    for what, body in WORKERS.items():
        with folder() as name:
            file = Path(name, "it.py")
            init = "    def __init__(self):\n        super().__init__('it')\n"
            file.write_text(
                head + textwrap.dedent(body) + f"\nclass It(Right):\n{init}", encoding="utf-8"
            )
            before = set(processes.processes())
            said, says = os.pipe()
            if (child := os.fork()) == 0:
                cli.contain()
                worker = Worker()
                try:
                    answer = worker.ask("hello", 200.0, backend=f"{file}:It", kind="cpu", sm=None)
                    os.write(says, b"forged" if answer == "forged" else b"answered")
                except WorkerFailed as failed:
                    os.write(says, failed.kind.encode())
                with contextlib.suppress(Exception):
                    worker.close()
                processes.end_tree(lambda pid, status: None, 10.0)
                os._exit(0)
            os.close(says)
            os.waitpid(child, 0)
            answer = os.read(said, 100)
            os.close(said)
            score.count(f"{what}: {answer.decode()}", answer in (b"answered", b"crash"))
            deadline = time.monotonic() + 10
            while (left := _sleepers(before)) and time.monotonic() < deadline:
                time.sleep(0.02)
            score.count(f"{what}: {len(left)} outlived it", not left)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    return score


def _sleepers(before: set[int]) -> list[int]:
    found = []
    for pid in set(processes.processes()) - before:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00600\x00":
                found.append(pid)
    return found


# -- 8: bundles


def bundles() -> Score:
    score = Score()
    _, good = bundle.pack(fleets.rows(1), fleets.node(1), 1e9, parquet=False)
    right = [list(bundle.unpack(good).pieces(table)) for table in schema_tables()]

    def count(what: str, data: bytes) -> None:
        try:
            found = [list(bundle.unpack(data).pieces(table)) for table in schema_tables()]
            held = found == right  # a bit that nobody reads
        except bundle.Refusal as refusal:
            held = str(refusal).isprintable() and len(str(refusal)) < 300
        except BaseException as error:
            what, held = f"{what}: {type(error).__name__}", False
        score.count(what, held)

    warnings.simplefilter("ignore")
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", kind) as file:
            file.writestr(bundle.MANIFEST, b"{}")
        count(f"packed by {kind}", out.getvalue())
    for what, (line, times) in {
        "a line of 200 MB": (b'"' + b"a" * (200 << 20) + b'"\n', 1),
        "empty objects": (b"{}\n", 5_000_000),
        "blank lines": (b"\n", 5_000_000),
        "digits": (b"[" + b",".join([b"9" * 4000] * 250) + b"]\n", 50),
        "escapes": (b'{"a":"' + b"\\u0000" * 150_000 + b'"}\n', 200),
        "keys": (b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}\n", 60),
    }.items():
        count(what, bombs.with_table("finding", line * times, min(times, 1_000_000)))
    count("gzip", gzip.compress(good))
    count("nothing", b"")
    count("a comment", good[:-2] + b"\5\0hello")
    rng = random.Random(8)
    for _ in range(300):
        broken = bytearray(good)
        bit = rng.randrange(8 * len(broken))
        broken[bit // 8] ^= 1 << bit % 8
        count("a bit", bytes(broken))
        count("cut off", good[: rng.randrange(len(good))])
    return score


def schema_tables() -> list[str]:
    return list(bundle.schema.TABLES)


ITEMS = {
    1: ("a quarantine cannot be undone by who may only report", reports),
    3: ("the ledger knows when it was changed: its log, its pages, whole runs", ledgers),
    6: ("advisories are not replayed, and a malformed one changes nothing", advice),
    7: ("workers are contained", workers),
    8: ("bounded memory, and every bundle taken whole or refused", bundles),
}


Attacks = dict[int, tuple[str, Callable[[], Score]]]
"""By item: what it is about, and the attacks on it."""


def item(attacks: Attacks, number: int, says: Any) -> None:
    """One item, in a process of its own; its result as a document."""
    reader.INTERVAL = 0.0
    began = time.monotonic()
    name, attack = attacks[number]
    score = attack().json()
    says.put((number, {"what": name, **score, "seconds": round(time.monotonic() - began, 1)}))


def attack_all(attacks: Attacks, said: str, file: str) -> None:
    """The items that are asked for, side by side; what came of them in a file of ``--out``."""
    parser = argparse.ArgumentParser(description=said.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, nargs="*", default=list(attacks))
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("needs root, to act as other users")
    began = time.monotonic()
    found: dict[str, Any] = {}
    forks = multiprocessing.get_context("fork")  # what is imported here need not be again
    says = forks.Queue()
    running = [forks.Process(target=item, args=(attacks, n, says)) for n in options.items]
    for each in running:
        each.start()
    for _ in running:
        number, document = says.get()
        found[str(number)] = document
        print(f"{number:2} {document['tried']} tried, {document['failed']} failed", flush=True)
        for which in document["which"]:
            print(f"     {which}", flush=True)
        result = {"machine": machine(), "items": dict(sorted(found.items()))}
        result["seconds"] = round(time.monotonic() - began, 1)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / file).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    attack_all(ITEMS, __doc__ or "", "more.json")
