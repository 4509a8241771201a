"""A ledger that a disk, or anybody, changed says so: what it answers with is what was stored."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import BUCKET, ENVIRONMENT, WHAT, evidence, put, spawn, start
from test_known import PRINT, SHAPES, Store, earlier_failures, make_plan

from commands import call
from fp4tune.autotune.history import History
from fp4tune.autotune.keys import bucket_key
from fp4tune.autotune.plan import Report
from fp4tune.autotune.publication.publish import publish as publish_reports
from fp4tune.cache import codec, publish, schema, seal, state, writeahead
from fp4tune.cache.errors import Corrupt, StateError, Undecodable
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import (
    Audit,
    Build,
    Candidate,
    Environment,
    Evidence,
    Finding,
    FinishedStep,
    Forgotten,
    Probed,
    Stamp,
    Timing,
    Verdict,
)
from fp4tune.daemon import work
from fp4tune.daemon.config import DaemonConfig, ProbeOptions
from fp4tune.daemon.mend import damage, mend
from fp4tune.daemon.service import Service

FILES = (Stamp("/a.so", 1, 2, 3), Stamp("/b.so", 4, 5, 6))
READ = (
    "runs", "environments", "evidence", "findings", "timings", "verdicts", "builds", "audits",
    "probed", "steps", "forgotten", "generations",
)  # fmt: skip


def fill(place, runs: int = 3, each: int = 8) -> None:
    """A ledger with rows of every kind, of several runs."""
    put(place)
    with Ledger.open(place) as ledger:
        for number in range(runs):
            run = start(ledger, seed=2**63 + number)
            ledger.add_environment(replace(ENVIRONMENT, stamps=FILES))
            problem = {"m": 3, "n": 4096}
            for turn in range(each):
                detail = {"turn": turn, "text": "x" * random.Random(turn).randrange(200)}
                ledger.add_evidence(evidence(run, launches=turn, width=24, detail=detail))
                ledger.add_finding(
                    Finding(run, *WHAT, problem, "unwritten", "pdl", "exact", 2**64 - 1, 5)
                )
                ledger.add_timing(Timing(run, *WHAT, 12.5, 12, 13.0, 99, 3.5))
            ledger.add_verdict(Verdict(run, *WHAT, "strict", "unsafe", (), ("pdl: failed",)))
            ledger.add_build(Build(run, "marlin", 21.5))
            ledger.add_step(FinishedStep(run, *WHAT[:2], BUCKET, "serial", {"dead": {}}))
            ledger.add_probed(Probed(run, BUCKET, {"name": "H200"}, "m" * 64, {"entrants": {}}))
            ledger.finish_run(run)
        ledger.add_audit(Audit("c", "x.so", "/x.so", 90, "clean", "sass", "none"))
        ledger.forget(Forgotten("a wrong reference", backend="another", rows={"evidence": 1}))


def everything(place, readonly: bool) -> tuple[set[str], list[str]]:
    """What the ledger answers with, row by row, and what it says is damaged."""
    with Ledger.open(place, readonly=readonly) as ledger:
        found = {f"{kind} {row!r}" for kind in READ for row in getattr(ledger, kind)()}
        return found, ledger.damage().sentences


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    place = tmp_path_factory.mktemp("filled")
    fill(place)
    found, said = everything(place, readonly=True)
    assert not said and len(found) > 50
    return place / state.LEDGER, found


@pytest.mark.parametrize("flips", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_flipped_bits_change_nothing_without_a_word(filled, tmp_path, flips):
    whole, stored = filled
    data = bytearray(whole.read_bytes())
    rng = random.Random(flips)
    said, refused, same, quiet = 0, 0, 0, []
    for number in range(flips):
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / state.LEDGER).write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        try:
            found, sentences = everything(tmp_path, readonly=number % 4 > 0)
        except StateError:  # and nothing else
            refused += 1
            continue
        changed = found - stored
        if sentences:
            said += 1
            # A run that died is told from one that goes on by its lock, and that alone.
            assert not changed, bit
        elif found == stored:
            same += 1
        else:
            quiet.append((bit, sorted(found ^ stored)[:2]))
    assert not quiet
    assert said > flips / 20 and refused > flips / 50 and same > flips / 50


@pytest.mark.parametrize("table", [*schema.SEALED, "step", "forgotten", "contents"])
def test_any_column_of_any_table_is_under_a_seal(filled, tmp_path, table):
    whole, stored = filled
    path = tmp_path / state.LEDGER
    with closing(sqlite3.connect(whole)) as conn:
        names = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
    for name in names:
        shutil.copy(whole, path)
        with closing(sqlite3.connect(path)) as conn:
            conn.execute("PRAGMA ignore_check_constraints = ON")
            (rowid, value) = conn.execute(
                f"SELECT rowid, {name} FROM {table} ORDER BY rowid DESC"
            ).fetchone()
            other = value + 1000 if isinstance(value, (int, float)) else f"{value or ''}x"
            sql = f"UPDATE {table} SET {name} = ? WHERE rowid = ?"
            with conn:
                conn.execute(sql, (other, rowid))
        try:
            found, sentences = everything(tmp_path, readonly=True)
        except StateError:
            continue
        assert sentences and found <= stored, name
        assert table == "contents" or found != stored, name


def test_a_row_that_is_gone_and_one_that_is_doubled_are_missed(filled, tmp_path):
    whole, _ = filled
    path = tmp_path / state.LEDGER
    names = "run, fingerprint, backend, tactic, format, activation, out_dtype, groups, m_lo, m_hi, "
    names += "n, k, median_us, lo_us, hi_us, samples, host_us, detail, at, seal"
    for sql, why in (
        ("DELETE FROM evidence WHERE id = 2", "rows, and"),
        (f"INSERT INTO timing ({names}) SELECT {names} FROM timing WHERE id = 2", "1 of timing"),
    ):
        shutil.copy(whole, path)
        with closing(sqlite3.connect(path)) as conn, conn:
            conn.execute(sql)
        with Ledger.open(tmp_path, readonly=True) as ledger:
            runs = ledger.damage().runs
            assert len(runs) == 1 and why in next(iter(runs.values()))
            (run,) = runs
            assert ledger.damaged(run) and run in ledger.damage().sentences[0]
            assert not any(ledger.damaged(r.id) for r in ledger.runs() if r.id != run)


OF_ONE_RUN = (*schema.OF_RUNS, "contents")


@pytest.mark.parametrize(
    "which",
    [
        *(f"SELECT id FROM run ORDER BY started {order} LIMIT 1" for order in ("", "DESC")),
        "SELECT id FROM run",
    ],
)
def test_a_run_that_is_gone_with_all_it_had_is_missed(filled, tmp_path, which):
    path = tmp_path / state.LEDGER
    shutil.copy(filled[0], path)
    with closing(sqlite3.connect(path)) as conn, conn:
        runs = [row[0] for row in conn.execute(which)]
        for run in runs:
            for table in OF_ONE_RUN:
                conn.execute(f"DELETE FROM {table} WHERE run = ?", [run])
            conn.execute("DELETE FROM run WHERE id = ?", [run])
    _, said = everything(tmp_path, readonly=True)
    assert f"{len(runs) * 8} rows of finding are gone" in said


@pytest.mark.parametrize("table", ["audit", "forgotten", "environment"])
def test_rows_of_no_run_that_are_gone_are_missed(filled, tmp_path, table):
    path = tmp_path / state.LEDGER
    shutil.copy(filled[0], path)
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(f"DELETE FROM {table}")
    assert f"1 rows of {table} are gone" in everything(tmp_path, readonly=True)[1]


# -- the log of a process that was killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A ledger whose writer was killed, with all it wrote in the log; and what was stored."""
    place = tmp_path_factory.mktemp("killed")
    if (child := os.fork()) == 0:
        with Ledger.open(place / "as it was"):
            fill(place / "as it was", runs=2, each=4)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    shutil.copytree(place / "as it was", place / "read")
    stored, said = everything(place / "read", readonly=True)
    assert not said and len(stored) > 20
    return place / "as it was", stored


@pytest.mark.parametrize("index", ["its index", "no index"])
@pytest.mark.parametrize("harm", ["a bit", "cut off", "gone"])
@pytest.mark.parametrize("readonly", [True, False])
def test_a_log_that_is_damaged_is_not_shortened_without_a_word(
    killed, tmp_path, harm, index, readonly
):
    whole, stored = killed
    if harm != "a bit" and index == "no index":
        pytest.skip("nothing says how long it was")
    rng = random.Random(harm)
    for turn in range(4):
        place = tmp_path / str(turn)
        shutil.copytree(whole, place)
        log = place / f"{state.LEDGER}-wal"
        data = bytearray(log.read_bytes())
        if harm == "a bit":
            bit = rng.randrange(8 * (len(data) - 2 * 4120))  # one in the last may be a torn write
            data[bit // 8] ^= 1 << bit % 8
        log.write_bytes(data[: rng.randrange(len(data))] if harm == "cut off" else data)
        if harm == "gone":
            log.unlink()
        if index == "no index":
            (place / f"{state.LEDGER}-shm").unlink()
        found, said = everything(place, readonly)
        assert any("the log was damaged" in each for each in said) or found == stored
        again, still = everything(place, readonly=True)
        assert again == found and still == said, "it is said until it is taken note of"
        for path in place.glob("*.damaged-*"):
            path.unlink()
        assert not any("the log" in each for each in everything(place, readonly=True)[1])


def test_a_log_that_lives_or_is_whole_is_left_alone(killed, tmp_path):
    whole, _ = killed
    shutil.copytree(whole, tmp_path / "killed")
    log = str(tmp_path / "killed" / state.LEDGER)
    assert not writeahead.has_lost(log)
    code = """
        import sys
        from fp4tune.cache.ledger import Ledger
        from stores import evidence, start
        with Ledger.open(sys.argv[1]) as ledger:
            ledger.add_evidence(evidence(start(ledger)))
            print("there", flush=True)
            sys.stdin.read()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with spawn(code, tmp_path / "alive", **pipes) as other:
        assert other.stdout.readline() == b"there\n"
        path = tmp_path / "alive" / state.LEDGER
        (tmp_path / "alive" / f"{state.LEDGER}-wal").stat()
        assert writeahead._lives(f"{path}-shm") and not writeahead.has_lost(str(path))
        other.communicate(b"")


def test_an_index_that_misses_a_row_hides_nothing(filled, tmp_path):
    """A flip in an index alone: opening a database does not look at it."""
    whole, stored = filled
    data = whole.read_bytes()
    key = b"f" * 64
    # In an index on the fingerprint a record has that and the row's number, and nothing else.
    places = [
        i
        for i in range(len(data))
        if data[i : i + 64] == key and data[i - 4 : i - 1] == b"\x04\x81\x0d"
    ]
    assert places
    for readonly in (True, False):
        broken = bytearray(data)
        broken[places[-1]] ^= 1
        (tmp_path / state.LEDGER).write_bytes(broken)
        with Ledger.open(tmp_path, readonly=readonly) as ledger:
            prints = [ENVIRONMENT.fingerprint]
            found = [ledger.evidence(fingerprints=prints), ledger.findings(fingerprints=prints)]
            assert [len(each) for each in found] == [24, 24]
    assert everything(tmp_path, readonly=True)[0] == stored  # it was mended by who may write


# -- what becomes of a run that is damaged


def harm(place, sql: str) -> None:
    with closing(sqlite3.connect(place / state.LEDGER)) as conn, conn:
        conn.execute("PRAGMA ignore_check_constraints = ON")
        conn.execute(sql)


HARMS = (
    "UPDATE evidence SET launches = launches + 1 WHERE status = 'passed' AND id = 2",
    "UPDATE run SET seed = '9'",
    "UPDATE probed SET method = 'another'",
    "UPDATE timing SET median_us = 0.5 WHERE id = 1",
    "UPDATE contents SET rows = rows - 1",
    "DELETE FROM verdict",
    "DELETE FROM evidence WHERE id = 2",
)


@pytest.mark.parametrize("sql", HARMS)
def test_a_damaged_run_is_set_aside_with_a_sentence_and_its_failures_count(tmp_path, sql):
    store = Store(tmp_path, status="failed")
    with Ledger.open(tmp_path) as ledger:
        ledger.add_verdict(Verdict(store.run, PRINT, "x", "default", BUCKET, "strict", "unsafe"))
    assert store.recall().entries
    failed = earlier_failures(tmp_path, make_plan(seed=6, seed_given=True))
    assert failed
    harm(tmp_path, sql)
    assert not store.recall().entries, "it is measured anew"
    with Ledger.open(tmp_path) as ledger:
        history = History(make_plan(), ledger, tmp_path)
        history.recall({store.problem: ["x"]}, {"x": PRINT}, {store.problem: False})
        left = history.damaged or ledger.damage().runs
        assert set(left) == {store.run} and left[store.run]
    assert earlier_failures(tmp_path, make_plan(seed=6, seed_given=True)) == failed
    assert not earlier_failures(tmp_path, make_plan(again=True))
    Store(tmp_path, plan=make_plan(again=True))  # all of it measured anew
    assert not earlier_failures(tmp_path, make_plan(seed=6, seed_given=True))
    assert store.recall().entries


def test_a_failure_that_is_itself_damaged_is_not_made_up(tmp_path):
    store = Store(tmp_path, status="failed")
    harm(tmp_path, "UPDATE evidence SET regime = 'graph' WHERE status = 'failed' AND m_hi > 0")
    found = earlier_failures(tmp_path, make_plan(seed=6, seed_given=True))
    assert all(row.regime == "streams" for rows in found.values() for row in rows)
    assert not store.recall().entries


def test_nothing_is_published_of_a_damaged_run(tmp_path):
    store = Store(tmp_path)
    candidate = Candidate(
        "cpu", "cpu", "strict", BUCKET, "x", "default", "plain", "safe", fingerprint=PRINT
    )
    report = Report(store.run, 1, store.plan.target, candidates=[candidate])
    report.environments.append(Environment(PRINT, "x", "cpu", {}))
    harm(tmp_path, HARMS[0])
    with pytest.raises(Corrupt, match=f"run {store.run} is damaged.*probe again"):
        publish_reports([report], tmp_path)
    assert not (tmp_path / state.CHOICES).exists()


def test_an_export_takes_of_a_damaged_run_what_failed_and_says_so(tmp_path):
    pytest.importorskip("pyarrow")
    from fp4tune.fleet import export

    fill(tmp_path)
    before = export.rows_of(tmp_path)
    assert not before.skipped
    harm(tmp_path, "UPDATE evidence SET launches = 7 WHERE id = 1")
    tables = export.rows_of(tmp_path)
    (bad,) = {row["run"] for row in before.rows["evidence"] if row["id"] == 1}
    counts = {name: len(rows) for name, rows in tables.rows.items()}
    assert counts["finding"] == 24 and counts["run"] == 3
    assert counts["evidence"] == counts["timing"] == 16 and counts["verdict"] == 2
    assert all(bad in reason for reasons in tables.skipped.values() for reason in reasons)
    harm(tmp_path, f"UPDATE run SET level = 'x' WHERE id = '{bad}'")
    tables = export.rows_of(tmp_path)
    assert {row["run"] for row in tables.rows["finding"]} == {r["id"] for r in tables.rows["run"]}
    assert any(bad in reason for reason in tables.skipped["run"])


def test_commands_say_what_is_damaged(tmp_path):
    fill(tmp_path)
    harm(tmp_path, "UPDATE finding SET kind = 'x' WHERE id = 3")
    shown = json.loads(call("show", "--state", tmp_path, "--json").stdout)
    assert len(shown["damaged"]) == 1 and len(shown["findings"]) == 23
    assert "is set aside" in call("show", "--state", tmp_path).stdout
    assert "is set aside" in call("doctor", "--state", tmp_path).stdout
    answer = call("reproduce", 3, "--state", tmp_path)
    assert answer.exit_code == 2 and "there is no finding 3" in answer.stderr
    assert "is set aside" in answer.stderr and "Traceback" not in answer.output


def test_a_damaged_generation_is_none_to_go_back_to(tmp_path):
    for tag in "abc":
        put(tmp_path, tag)
    harm(tmp_path, "UPDATE generation SET content = x'00' WHERE number = 2")
    for file in tmp_path.glob("choices-*.db"):
        file.unlink()
    with pytest.raises(StateError):
        publish.rollback(tmp_path, to=2)
    assert put(tmp_path, "d") == 4


# -- the daemon


def test_layers_that_lost_their_evidence_are_to_be_measured_anew(tmp_path):
    store = Store(tmp_path)
    assert damage(tmp_path) == ([], [])
    harm(tmp_path, HARMS[0])
    sentences, again = damage(tmp_path)
    assert store.run in sentences[0] and again == [SHAPES[0]]
    published = [Candidate("cpu", "C", "strict", BUCKET, "x", "default", "plain", "safe")]
    published = [replace(c, bucket=bucket_key(store.problem)) for c in published]
    assert not work.units([], ProbeOptions(), published)
    assert [unit.layer for unit in work.units([], ProbeOptions(), published, again)] == again
    Store(tmp_path)
    sentences, again = damage(tmp_path)
    assert sentences and again == [], "it was measured anew"


def test_of_a_ledger_that_cannot_be_read_the_rows_that_are_whole_are_saved(tmp_path):
    fill(tmp_path, runs=3, each=40)
    stored, _ = everything(tmp_path, readonly=True)
    path = tmp_path / state.LEDGER
    data = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as conn:
        size = conn.execute("PRAGMA page_size").fetchone()[0]
        sql = "SELECT pageno FROM dbstat WHERE name = 'evidence' AND pagetype = 'leaf'"
        try:
            pages = [row[0] for row in conn.execute(sql)]
        except sqlite3.OperationalError:
            pytest.skip("this SQLite does not say what lies on which page")
    page = pages[len(pages) // 2] - 1
    data[page * size : page * size + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(Corrupt):
        Ledger.open(tmp_path)
    (said,) = [line for line in mend(tmp_path) if state.LEDGER in line]
    assert "were saved" in said and "moved aside" in said
    found, sentences = everything(tmp_path, readonly=True)
    assert found < stored and len(found) > len(stored) / 2 and sentences
    with Ledger.open(tmp_path) as ledger:
        assert len(ledger.findings()) == 120 and 0 < len(ledger.evidence()) < 120
        assert ledger.generation_content(1) is not None


@pytest.mark.slow
def test_the_daemon_notices(tmp_path, monkeypatch):
    pytest.importorskip("psutil")
    Store(tmp_path)
    service = Service(DaemonConfig(state=str(tmp_path), gpus=("none",)))
    service.start()
    try:

        def until(done) -> None:
            deadline = time.monotonic() + 120
            while not done():
                assert time.monotonic() < deadline, service.problem
                service.tick()
                time.sleep(0.02)

        until(lambda: service.revalidated)
        assert not service.board.health["damaged"]
        harm(tmp_path, HARMS[0])
        service._look_after = 0.0  # as after some seconds
        until(lambda: service.damaged)
        assert "is set aside" in service.board.health["damaged"][0]
        assert service.board.numbers["damaged"] == 1 and "1 damaged" in service.status
        assert service.again == {SHAPES[0]}
        with Ledger.open(tmp_path) as ledger:
            finding = Finding(ledger.runs()[0].id, PRINT, *WHAT[1:], {}, "odd", "pdl", "exact", 1)
            ledger.add_finding(finding)
        harm(tmp_path, "UPDATE finding SET kind = 'even'")
        assert json.loads(service.board.findings()) == {"findings": [], "problem": ""}
    finally:
        service.stop()


# -- ledgers of before


def older(path, version: int) -> None:
    """A ledger as an earlier fp4tune left it, with a run's rows in it."""
    from sqlite_utils import Database, Migrations

    migrations = Migrations("fp4tune-ledger")
    for name, step in list(schema.MIGRATIONS.items())[:version]:
        migrations(name=name)(step)
    conn = sqlite3.connect(path, isolation_level=None)
    migrations.apply(Database(conn, execute_plugins=False))
    conn.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {version}")

    def insert(table, values):
        names = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
        known = {name: value for name, value in values.items() if name in names}
        conn.execute(
            f"INSERT INTO {table} ({', '.join(known)}) VALUES ({', '.join('?' * len(known))})",
            tuple(known.values()),
        )

    insert("environment", {**codec.columns(ENVIRONMENT), "first_seen": 1})
    for stamp in FILES:
        insert("stamp", {"fingerprint": ENVIRONMENT.fingerprint, **codec.columns(stamp)})
    run = {"id": "r", "started": 1, "finished": 2, "status": "finished", "seed": "7"}
    run |= {"level": "quick", "profile": "strict", "device": "{}", "argv": "[]", "versions": "{}"}
    insert("run", run)
    for number in range(5):
        insert("evidence", {**codec.columns(evidence("r", launches=number)), "at": 1})
        insert("verdict", {**codec.columns(Verdict("r", *WHAT, "strict", "safe")), "at": 2.5})
    insert("generation", {"number": 3, "at": 1, "status": "published", "origin": "publish"})
    conn.close()


def test_a_migration_keeps_the_name_that_ledgers_have_on_record():
    assert [*schema.MIGRATIONS][:4] == ["first", "bounds", "audits", "probed"]


@pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
def test_an_older_ledger_is_read_as_it_is_and_sealed_by_who_writes(tmp_path, version):
    older(tmp_path / state.LEDGER, version)
    if version < 5:
        before, said = everything(tmp_path, readonly=True)
        assert len(before) == 1 + 1 + 5 + 5 + 1 and not said
    with Ledger.open(tmp_path) as ledger:
        assert version >= 5 or not ledger.damage().sentences
        (run,) = (row.id for row in ledger.runs()) if version < 5 else ("r",)
        if version < 5:
            ledger.add_evidence(evidence(run))
            assert not ledger.damaged(run)
    if version < 5:
        after, said = everything(tmp_path, readonly=True)
        assert before < after and not said
        with closing(sqlite3.connect(tmp_path / state.LEDGER)) as conn, conn:
            conn.execute("UPDATE evidence SET launches = 99 WHERE id = 1")
        assert everything(tmp_path, readonly=True)[1]


def test_what_was_damaged_before_there_were_seals_is_damaged_then(tmp_path):
    path = tmp_path / state.LEDGER
    older(path, 4)
    with closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("UPDATE evidence SET detail = '{' WHERE id = 2")
    found, _ = everything(tmp_path, readonly=True)
    assert sum("evidence " in each for each in found) == 4
    with Ledger.open(tmp_path) as ledger:
        assert len(ledger.evidence()) == 4 and "1 of evidence" in ledger.damaged("r")


# -- seals and decoding by themselves

VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8) | st.binary(max_size=8)
ROWS = st.dictionaries(st.sampled_from("abcdef"), VALUES, min_size=1)


@given(ROWS, st.data())
def test_no_two_rows_have_one_seal(row, data):
    sealed = {**row, seal.SEAL: seal.of("t", row)}
    assert seal.fits("t", sealed) and not seal.fits("u", sealed)
    name = data.draw(st.sampled_from(sorted(row)))
    other = data.draw(VALUES)
    assert seal.fits("t", {**sealed, name: other}) == (
        (type(other), other) == (type(row[name]), row[name])
    )


@given(st.lists(ROWS, max_size=5), st.randoms())
def test_a_sum_of_seals_knows_no_order(rows, rng):
    seals = [seal.of("t", row) for row in rows]
    shuffled = list(seals)
    rng.shuffle(shuffled)
    total = seal.added(seal.NOTHING, seals)
    assert total == seal.added(seal.NOTHING, shuffled)
    if seals:
        assert total != seal.added(seal.NOTHING, seals[1:])


KINDS = (Evidence, Finding, Timing, Verdict, Build, Audit, Probed, FinishedStep, Environment)


@given(st.sampled_from(KINDS), st.data())
def test_a_row_decodes_or_is_undecodable_whatever_it_holds(kind, data):
    odd = VALUES | st.sampled_from(("{}", "[]", "[1]", '{"a": 1}', "{" * 2000, "[" * 100_000))
    values = {name: data.draw(odd) for name in codec.names(kind) if data.draw(st.booleans())}
    try:
        codec.decode(kind, values)
    except Undecodable as error:
        assert "\n" not in str(error)
