"""The ledger keeps what it was given, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import BUCKET, ENVIRONMENT, WHAT, evidence, isolated, put, rows_for, spawn, start

from fp4tune.cache import codec, publish, reader, schema, snapshot, state
from fp4tune.cache.errors import (
    Busy,
    Corrupt,
    Foreign,
    Full,
    Missing,
    NewerSchema,
    ReadOnly,
    StateError,
)
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Build, Environment, Evidence, Finding, Layer, Stamp, Timing, Verdict

FILE = (Stamp("/x.so", 1, 2, 3),)


# -- rows


def test_every_kind_of_row_is_read_back_equal(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        run = start(ledger, seed=2**64 - 1)
        finding = Finding(
            run, *WHAT, {"m": 3, "n": 4096}, "unwritten", "pdl", "exact", 2**64 - 1, 5, {"a": 1}
        )
        timing = Timing(run, *WHAT, 12.5, 12.25, 13.0, 99, 3.5)
        verdict = Verdict(run, *WHAT, "strict", "unsafe", ({"kind": "scale"},), ("pdl: failed",))
        for row, add, find in (
            (evidence(run, launches=9, width=24), ledger.add_evidence, ledger.evidence),
            (finding, ledger.add_finding, ledger.findings),
            (timing, ledger.add_timing, ledger.timings),
            (verdict, ledger.add_verdict, ledger.verdicts),
        ):
            number = add(row)
            (found,) = find(run=run, bucket=BUCKET, fingerprints=[ENVIRONMENT.fingerprint])
            assert found.id == number and found.at > 0
            expected = codec.columns(row) | {"id": number, "at": found.at}
            assert codec.columns(found) == expected
            assert find(fingerprints=[]) == find(backend="humming") == find(run="other") == []
        ledger.add_build(Build(run, "marlin", 21.5))
        assert ledger.builds(run)[0].seconds == 21.5
        assert ledger.runs()[0].seed == 2**64 - 1
        (environment,) = ledger.environments()
        assert environment.facts == {"code": "ab"}


def test_stamps_are_those_of_the_last_look(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        ledger.add_environment(Environment("f" * 64, "marlin", "sm90", {"code": "ab"}, FILE))
        assert [e.stamps for e in ledger.environments()] == [FILE]
        moved = (Stamp("/y.so", 4, 5, 6),)
        ledger.add_environment(Environment("f" * 64, "marlin", "sm90", {"code": "ab"}, moved))
        assert [e.stamps for e in ledger.environments()] == [moved]


def test_several_rows_go_in_together_or_not_at_all(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        run = start(ledger)
        with pytest.raises(ValueError):
            ledger.add_all([evidence(run), evidence("no such run")])
        assert ledger.evidence() == []
        assert len(ledger.add_all([evidence(run), evidence(run)])) == 2


def test_a_status_without_a_word_for_it_is_refused():
    with pytest.raises(ValueError, match="fine"):
        Evidence("r", *WHAT, regime="serial", data="exact", status="fine")


def test_what_json_cannot_hold_is_refused(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        run = start(ledger)
        with pytest.raises(ValueError):
            ledger.add_evidence(evidence(run, seconds=float("nan")))
        with pytest.raises(ValueError):
            ledger.add_evidence(evidence(run, detail={"x": float("inf")}))


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.none() | st.booleans() | st.text(max_size=5) | NUMBERS


@given(st.dictionaries(st.text(max_size=5), JSON | st.lists(JSON, max_size=3), max_size=4))
def test_equal_json_has_one_spelling(value):
    backwards = dict(reversed(value.items()))
    assert codec.canonical(value) == codec.canonical(backwards)
    assert json.loads(codec.canonical(value)) == value


# -- several processes


def test_threads_and_processes_write_at_once(tmp_path):
    code = """
        import sys, threading
        from fp4tune.cache.ledger import Ledger
        from stores import evidence, start
        with Ledger.open(sys.argv[1]) as ledger:
            run = start(ledger)
            def work():
                for _ in range(20):
                    ledger.add_evidence(evidence(run))
            threads = [threading.Thread(target=work) for _ in range(3)]
            [t.start() for t in threads]; [t.join() for t in threads]
            ledger.finish_run(run)
    """
    workers = [spawn(code, tmp_path) for _ in range(3)]  # all three make the ledger, too
    assert [w.wait(60) for w in workers] == [0, 0, 0]
    with Ledger.open(tmp_path) as ledger:
        assert len(ledger.evidence()) == 180
        assert {r.status for r in ledger.runs()} == {"finished"}


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_it_reported(tmp_path):
    code = """
        import os, sys
        from fp4tune.cache.ledger import Ledger
        from stores import evidence, start
        ledger = Ledger.open(sys.argv[1])
        run = start(ledger)
        while True:
            number = ledger.add_evidence(evidence(run, detail={"x": "y" * 500}))
            os.write(1, b"%d\\n" % number)
    """
    random.seed(4)
    reported: set[int] = set()
    writers = [spawn(code, tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    for turn in range(20):
        victim = writers.pop(0)
        select.select([victim.stdout], [], [], 20)  # it got as far as writing
        threading.Event().wait(random.uniform(0, 0.05))
        if turn < 18:  # the next one starts while this one dies
            writers.append(spawn(code, tmp_path, stdout=subprocess.PIPE))
        victim.kill()
        whole, _, _ = victim.communicate(timeout=20)[0].rpartition(b"\n")
        reported |= {int(line) for line in whole.split()}
    with sqlite3.connect(tmp_path / state.LEDGER) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Ledger.open(tmp_path) as ledger:
        assert len(reported) > 20
        assert reported <= {row.id for row in ledger.evidence()}
        assert [r.status for r in ledger.runs()] == ["interrupted"] * 20
    assert not list(tmp_path.rglob("run-*.lock"))


def test_a_living_run_is_not_interrupted_by_another_opening(tmp_path):
    with Ledger.open(tmp_path) as first:
        run = start(first)
        with Ledger.open(tmp_path) as second:
            assert [r.status for r in second.runs()] == ["running"]
        with Ledger.open(tmp_path, readonly=True) as third:
            assert [r.status for r in third.runs()] == ["running"]
        first.finish_run(run)
        assert first.runs()[0].finished is not None
    with Ledger.open(tmp_path) as ledger:
        assert [r.status for r in ledger.runs()] == ["finished"]


# -- files that must not be touched


def database(path: Path, application_id: int, version: int, rows: int = 0) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE t (x)")
        conn.executemany("INSERT INTO t VALUES (?)", [("y" * 1000,)] * rows)
        conn.execute(f"PRAGMA application_id = {application_id}")
        conn.execute(f"PRAGMA user_version = {version}")
    conn.close()


def damage(path: Path, kind: str) -> type[StateError]:
    """Replace the database at `path` by something bad; returns the error it must give."""
    app = schema.APPLICATION_ID if path.name == state.LEDGER else snapshot.APPLICATION_ID
    data = path.read_bytes()
    path.unlink()
    if kind == "newer":
        database(path, app, 99)
        return NewerSchema
    if kind == "other program's":
        database(path, 0x1234, 1)
        return Foreign
    if kind == "no database":
        path.write_text("hello, this is a note of more than a hundred bytes " * 4)
        return Foreign
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "truncated header":
        path.write_bytes(data[:50])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage inside":
        path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))
    elif kind == "garbage in the schema":
        path.write_bytes(data[:100] + b"\xa5" * 3996 + data[4096:])
    return Corrupt


KINDS = (
    "newer",
    "other program's",
    "no database",
    "truncated",
    "truncated header",
    "empty",
    "garbage inside",
    "garbage in the schema",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readonly", [False, True])
def test_a_bad_ledger_is_refused_and_left_alone(tmp_path, kind, readonly):
    with Ledger.open(tmp_path) as ledger:
        run = start(ledger)
        ledger.add_all([evidence(run, detail={"x": "y" * 300}) for _ in range(100)])
        ledger.finish_run(run)
    path = tmp_path / state.LEDGER
    expected = damage(path, kind)
    before = path.read_bytes(), sorted(os.listdir(tmp_path))
    with pytest.raises(expected) as caught:
        Ledger.open(tmp_path, readonly=readonly)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert (path.read_bytes(), sorted(os.listdir(tmp_path))) == before


def test_a_newer_ledger_is_recognised_by_its_log_alone(tmp_path):
    """Its writer died: the new version number is in the write-ahead log, not yet in the file."""
    Ledger.open(tmp_path).close()
    path = tmp_path / state.LEDGER
    code = """
        import os, sqlite3, sys
        conn = sqlite3.connect(sys.argv[1] + "/ledger.db")
        conn.execute("PRAGMA user_version = 99")
        os.kill(os.getpid(), 9)
    """
    assert spawn(code, tmp_path).wait(20) == -signal.SIGKILL
    log = Path(f"{path}-wal")
    before = path.read_bytes(), log.read_bytes()
    with pytest.raises(NewerSchema):
        Ledger.open(tmp_path)
    assert (path.read_bytes(), log.read_bytes()) == before


def test_a_log_whose_ledger_was_deleted_is_not_replayed_into_a_new_one(tmp_path):
    code = """
        import os, sys
        from fp4tune.cache.ledger import Ledger
        from stores import evidence, start
        ledger = Ledger.open(sys.argv[1])
        ledger.add_evidence(evidence(start(ledger)))
        os.kill(os.getpid(), 9)
    """
    assert spawn(code, tmp_path).wait(20) == -signal.SIGKILL
    (tmp_path / state.LEDGER).unlink()
    with Ledger.open(tmp_path) as ledger:
        assert ledger.runs() == [] and ledger.evidence() == []


def test_a_second_look_by_a_process_takes_no_locks_from_its_first(tmp_path):
    """Closing any descriptor of a file drops the process's locks on it; then the next process that
    closes the ledger would remove the log that this one goes on to write."""
    elsewhere = """
        import sys
        from fp4tune.cache.ledger import Ledger
        Ledger.open(sys.argv[1], readonly=True).close()
    """
    with Ledger.open(tmp_path) as ledger:
        run = start(ledger)
        for readonly in (False, True):
            Ledger.open(tmp_path, readonly=readonly).close()
            assert spawn(elsewhere, tmp_path).wait(60) == 0
            ledger.add_evidence(evidence(run))
            assert Path(f"{ledger.path}-wal").exists()
        # As after a crash: what is kept is what lies under the ledger's names.
        for path in tmp_path.glob("ledger.db*"):
            (tmp_path / "copy").mkdir(exist_ok=True)
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    with Ledger.open(tmp_path / "copy") as copy:
        assert len(copy.evidence()) == 2


def test_an_older_sqlite_utils_is_named(tmp_path, monkeypatch):
    import sqlite_utils

    monkeypatch.delattr(sqlite_utils, "Migrations")
    with pytest.raises(StateError, match="sqlite-utils 4.2"):
        Ledger.open(tmp_path)
    assert not (tmp_path / state.LEDGER).exists()


# -- publication


def test_generations_only_go_up_and_a_rollback_is_a_new_one(tmp_path):
    assert [put(tmp_path, tag) for tag in "abc"] == [1, 2, 3]
    assert publish.rollback(tmp_path) == 4
    found = reader.open(tmp_path)
    assert (found.generation, found.choose(3, 4096, 2048).tactic) == (4, "b")
    assert publish.rollback(tmp_path, to=1) == 5
    assert reader.open(tmp_path).choose(3, 4096, 2048).tactic == "a"
    with Ledger.open(tmp_path) as ledger:
        origins = [(g.number, g.status, g.origin) for g in ledger.generations()]
    assert origins[-2:] == [(4, "published", "rollback to 2"), (5, "published", "rollback to 1")]
    with pytest.raises(Missing):
        publish.rollback(tmp_path, to=99)


def test_generations_go_on_rising_when_the_ledger_is_lost(tmp_path):
    assert [put(tmp_path), put(tmp_path)] == [1, 2]
    (tmp_path / state.LEDGER).unlink()
    assert put(tmp_path) == 3


def test_the_published_file_is_plain_read_only_and_alone(tmp_path):
    put(tmp_path)
    path = tmp_path / state.CHOICES
    assert path.stat().st_mode & 0o777 == 0o444
    head = path.read_bytes()[:100]
    assert head[18:20] == b"\x01\x01"  # not WAL: 2 would be
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_same_rows_have_the_same_digest_apart_from_the_publication(tmp_path):
    def rows(place):
        loaded = snapshot.load(str(place / state.CHOICES)).tables
        return {name: found for name, found in loaded.items() if name != "meta"}

    choices, candidates = rows_for("a")
    publish.publish(tmp_path / "x", choices, candidates, [ENVIRONMENT])
    publish.publish(tmp_path / "y", choices[::-1], candidates[::-1], [ENVIRONMENT])
    one, other = rows(tmp_path / "x"), rows(tmp_path / "y")
    meta = {"meta": []}
    assert snapshot.digest(one | meta) == snapshot.digest(other | meta)
    other["choice"][0]["launches"] += 1
    assert snapshot.digest(one | meta) != snapshot.digest(other | meta)


def test_choices_that_contradict_each_other_are_not_published(tmp_path):
    choices, candidates = rows_for("a")
    with pytest.raises(ValueError, match="two choices"):
        publish.publish(tmp_path, choices + choices[:1], candidates, [ENVIRONMENT])
    with pytest.raises(ValueError, match="not judged safe"):
        publish.publish(tmp_path, choices, candidates[1:], [ENVIRONMENT])
    with pytest.raises(ValueError, match="environment"):
        publish.publish(tmp_path, choices, candidates, [])
    assert not (tmp_path / state.CHOICES).exists()


def test_a_publication_holds_its_own_rows_and_no_others(tmp_path):
    layer = Layer("sm90", "H200", "strict", "nvfp4", "bf16", "bf16", 1, 4096, 2048, "marlin")
    publish.publish(tmp_path, *rows_for("a"), [ENVIRONMENT], layers=[layer])
    assert reader.open(tmp_path).layout(4096, 2048) == "marlin"
    put(tmp_path, "b", n=8192)
    found = reader.open(tmp_path)
    assert found.layout(4096, 2048) is None
    assert [found.choose(3, n, 2048).status for n in (4096, 8192)] == ["unproven", "safe"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_damaged_publication_is_replaced(tmp_path, kind):
    put(tmp_path)
    path = tmp_path / state.CHOICES
    expected = damage(path, kind)
    before = path.read_bytes()
    if expected is Corrupt:
        assert put(tmp_path) == 2
        assert reader.open(tmp_path).generation == 2
    else:
        with pytest.raises(expected):
            put(tmp_path)
        assert path.read_bytes() == before


def test_a_publisher_killed_anywhere_leaves_a_whole_file(tmp_path):
    code = """
        import itertools, os, sys
        from stores import put
        from pathlib import Path
        for i in itertools.count():
            os.write(1, b"%d\\n" % put(Path(sys.argv[1]), str(i), layers=40))
    """
    random.seed(5)
    last = 0
    for _ in range(5):
        worker = spawn(code, tmp_path, stdout=subprocess.PIPE)
        select.select([worker.stdout], [], [], 20)
        threading.Event().wait(random.uniform(0, 0.2))
        worker.kill()
        said = worker.communicate(timeout=20)[0].rpartition(b"\n")[0].split()
        found = reader.open(tmp_path)
        assert found.generation >= max(map(int, said)) > last
        last = found.generation
    assert put(tmp_path) > last
    with Ledger.open(tmp_path) as ledger:
        statuses = {g.status for g in ledger.generations()}
    assert statuses <= {"published", "abandoned"}
    assert not list(tmp_path.glob(".*"))


# -- disks


def test_a_full_disk_leaves_the_old_publication(tmp_path):
    """A tmpfs of 1 MiB: the ledger and a small file fit, the next publication does not."""
    code = """
        import os, subprocess, sys
        from pathlib import Path
        place = Path(sys.argv[1])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
        from fp4tune.cache.errors import Full
        from fp4tune.cache import reader
        from fp4tune.cache.ledger import Ledger
        from stores import evidence, put, start
        put(place, "old")
        before = (place / "choices.db").read_bytes()
        for size in (300, 60, 4):  # KiB left over: fails in the snapshot, then in the ledger
            room = os.statvfs(place)
            (place / f"filler{size}").write_bytes(
                b"x" * max(0, room.f_bavail * room.f_frsize - size * 1024))
            try:
                put(place, "new", layers=400)
                sys.exit("published on a full disk")
            except Full as error:
                print(error)
            assert (place / "choices.db").read_bytes() == before
            assert not [p for p in os.listdir(place) if p.startswith(".")], os.listdir(place)
        for filler in place.glob("filler*"):
            filler.unlink()
        assert put(place, "new") > 1
        with Ledger.open(place) as ledger:
            run = start(ledger)
            numbers = []
            try:
                while True:
                    row = evidence(run, detail={"x": "y" * 3000})
                    numbers.append(ledger.add_evidence(row))
            except Full:
                assert [row.id for row in ledger.evidence()] == numbers
    """
    done = isolated(code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the disk is full") == 3


def test_a_page_limit_is_a_full_disk_too(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        run = start(ledger)
        ledger._conn.execute("PRAGMA max_page_count = 1")  # SQLite makes it the current size
        with pytest.raises(Full):
            for _ in range(100):
                ledger.add_evidence(evidence(run, detail={"x": "y" * 3000}))


def test_a_read_only_disk_is_named_and_can_still_be_read(tmp_path):
    put(tmp_path / "state")
    with Ledger.open(tmp_path / "state") as ledger:
        ledger.add_evidence(evidence(start(ledger)))
    code = """
        import os, subprocess, sys
        from pathlib import Path
        place = sys.argv[1] + "/state"
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        from fp4tune.cache.errors import ReadOnly
        from fp4tune.cache import reader
        from fp4tune.cache.ledger import Ledger
        from stores import put
        for attempt in (lambda: Ledger.open(place), lambda: put(Path(place))):
            try:
                attempt()
                sys.exit("wrote to a read-only disk")
            except ReadOnly as error:
                print(error)
        before = sorted(os.listdir(place))
        assert reader.open(place).choose(3, 4096, 2048).status == "safe"
        with Ledger.open(place, readonly=True) as ledger:
            assert len(ledger.evidence()) == 1
            assert ledger.runs()[0].status == "interrupted"
        assert sorted(os.listdir(place)) == before
    """
    done = isolated(code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_ledger_opened_to_read_cannot_be_written(tmp_path):
    Ledger.open(tmp_path).close()
    with Ledger.open(tmp_path, readonly=True) as ledger, pytest.raises(ReadOnly):
        start(ledger)
    with pytest.raises(Missing):
        Ledger.open(tmp_path / "nowhere", readonly=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_writer_that_waits_too_long_says_who_is_in_the_way(tmp_path, monkeypatch):
    from fp4tune.cache import opening

    monkeypatch.setattr(opening, "TIMEOUT", 0.1)
    with Ledger.open(tmp_path) as one, Ledger.open(tmp_path) as other:
        one._conn.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy):
            start(other)
        one._conn.execute("ROLLBACK")
        start(other)
