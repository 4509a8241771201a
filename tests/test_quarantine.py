"""What failed in production is not chosen again: here at once, elsewhere through the spool."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ENVIRONMENT, put, spawn
from test_reader import bucket, choice, publish_rows
from typer.testing import CliRunner

import fp4tune
from fp4tune import cli
from fp4tune.cache import dropbox, quarantine, quarantine_store, reader
from fp4tune.cache.errors import Missing, StateError
from fp4tune.cache.rows import Candidate, Environment

N, K = 4096, 2048


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Look at the spool at every call, and forget what other tests quarantined."""
    monkeypatch.setattr(reader, "INTERVAL", 0.0)
    monkeypatch.setattr(reader, "_own", ())
    monkeypatch.setattr(reader, "_readers", [])


def store(place: Path, *layouts: tuple[str, str]) -> Path:
    """Two buckets in which `layouts` (backend, layout) are safe, best first."""
    rows, candidates = [], []
    for lo, hi in ((1, 16), (17, 32)):
        for rank, (name, layout) in enumerate(layouts):
            row = choice(bucket(lo, hi), name, layout=layout)
            if rank == 0:
                rows.append(row)
            else:
                candidates.append(
                    Candidate(
                        "sm90", "H200", "strict", row.bucket, name, "t1", layout, "safe", rank,
                        fingerprint=ENVIRONMENT.fingerprint,
                    )
                )  # fmt: skip
    publish_rows(place, rows, candidates)
    return place


SWIZZLED = (("cutlass", "swizzled"), ("marlin", "marlin"), ("cudnn", "swizzled"))


def test_the_next_safe_one_takes_over_at_once_and_says_why(tmp_path):
    place = store(tmp_path / "s", *SWIZZLED)
    found, pinned = reader.open(place), reader.open(place, pin=True)
    told = fp4tune.report_fault("cutlass", 3, N, K, reason="NaN in the logits")
    assert told.shared and told.shared.startswith(str(place))
    for one in (found, pinned):
        decision = one.choose(3, N, K)
        assert (decision.backend, decision.status) == ("marlin", "safe")
        assert decision.recorded_backend == "cutlass"
        assert decision.reason == "cutlass is quarantined: NaN in the logits"
        assert one.choose(3, N, K, layout="swizzled").backend == "cudnn"
        assert [d.backend for d in one.alternatives(3, N, K)] == ["marlin", "cudnn"]
    for name in ("marlin", "cudnn"):
        fp4tune.report_fault(name, 3, N, K)
    decision = found.choose(3, N, K)
    assert (decision.status, decision.backend) == ("quarantined", "torch-dequant")
    assert found.alternatives(3, N, K) == ()


@pytest.mark.parametrize(
    "scope, taken",
    [
        ("backend", {(3, N), (20, N), (3, 64)}),
        ("layer", {(3, N), (20, N)}),
        ("bucket", {(3, N)}),
    ],
)
def test_a_quarantine_reaches_as_far_as_it_says(tmp_path, scope, taken):
    rows = [choice(bucket(1, 16)), choice(bucket(17, 32)), choice(bucket(1, 16, n=64))]
    publish_rows(tmp_path / "s", rows)
    found = reader.open(tmp_path / "s")
    fp4tune.report_fault("marlin", 3, N, K, scope=scope)
    answers = {(m, n): found.choose(m, n, K).status for m, n in ((3, N), (20, N), (3, 64))}
    assert {at for at, status in answers.items() if status == "quarantined"} == taken


def test_a_tactic_may_be_quarantined_alone(tmp_path):
    store(tmp_path / "s", *SWIZZLED)
    found = reader.open(tmp_path / "s")
    fp4tune.report_fault("cutlass", 3, N, K, tactic="other")
    assert found.choose(3, N, K).backend == "cutlass"
    fp4tune.report_fault("cutlass", 3, N, K, tactic="t1")
    assert found.choose(3, N, K).backend == "marlin"


def test_it_ends_with_the_environment_it_was_seen_in(tmp_path):
    place = store(tmp_path / "s", *SWIZZLED)
    found = reader.open(place)
    fp4tune.report_fault("cutlass", 3, N, K)
    assert found.choose(3, N, K).backend == "marlin"
    newer = Environment("e" * 64, "cutlass", "sm90", {"code": "cd"})
    rows = [replace(choice(bucket(1, 16), "cutlass"), fingerprint=newer.fingerprint)]
    publish_rows(place, rows, environments=[newer])
    assert found.choose(3, N, K).backend == "cutlass"


def test_other_processes_hear_of_it_and_of_its_lifting(tmp_path):
    place = store(tmp_path / "s", *SWIZZLED)
    code = """
        import sys, time
        from fp4tune.cache import reader
        reader.INTERVAL = 0.01
        found = reader.open(sys.argv[1], pin=True)
        for wanted in ("cutlass", "marlin", "cutlass"):
            until = time.monotonic() + 20
            while found.choose(3, 4096, 2048).backend != wanted:
                assert time.monotonic() < until, wanted
                time.sleep(0.005)
            print(wanted, flush=True)
    """
    other = spawn(code, place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "cutlass\n"
    kept = reader.open(place)
    told = fp4tune.report_fault("cutlass", 3, N, K)
    assert kept.choose(3, N, K).backend == "marlin"
    assert other.stdout.readline() == "marlin\n"
    quarantine_store.lift(told.quarantine.id, quarantine_store.place(place))
    out, err = other.communicate(timeout=30)
    assert (other.returncode, out) == (0, "cutlass\n"), err


def test_a_fork_keeps_what_was_known_and_may_report_itself(tmp_path):
    code = """
        import os, sys
        from fp4tune.cache import reader
        import fp4tune
        found = reader.open(sys.argv[1])
        fp4tune.report_fault("cutlass", 3, 4096, 2048)
        child = os.fork()
        if child == 0:
            ok = found.choose(3, 4096, 2048).backend == "marlin"
            fp4tune.report_fault("marlin", 3, 4096, 2048)
            os._exit(0 if ok and found.choose(3, 4096, 2048).backend == "cudnn" else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    assert spawn(code, store(tmp_path / "s", *SWIZZLED)).wait(30) == 0


def test_where_nothing_can_be_written_this_process_alone_knows_and_says_so(
    tmp_path, monkeypatch, caplog
):
    place = store(tmp_path / "s", *SWIZZLED)
    (place / quarantine_store.FOLDER).write_text(
        "no folder"
    )  # root may write anywhere, but not in this
    found = reader.open(place)
    told = fp4tune.report_fault("cutlass", 3, N, K)
    assert told.shared is None and found.choose(3, N, K).backend == "marlin"
    assert "in this process only" in caplog.text
    monkeypatch.setattr(reader, "_own", ())
    assert reader.open(place).choose(3, N, K).backend == "cutlass"
    monkeypatch.setenv(dropbox.VARIABLE, str(tmp_path / "elsewhere"))
    assert fp4tune.report_fault("cutlass", 3, N, K).shared
    monkeypatch.setattr(reader, "_own", ())
    assert reader.open(place).choose(3, N, K).backend == "cutlass", "a drop box is nobody's word"
    (place / quarantine_store.FOLDER).unlink()
    assert len(dropbox.collect(place, {"cutlass"})) == 1
    assert reader.open(place).choose(3, N, K).backend == "marlin"


def test_it_works_without_any_state(own_state, monkeypatch):
    monkeypatch.setattr(reader.state, "SYSTEM", str(own_state / "system"))
    monkeypatch.setenv("XDG_STATE_HOME", str(own_state / "home"))
    assert fp4tune.report_fault("cutlass", 3, N, K).shared is None


@pytest.mark.parametrize(
    "bad",
    [
        {"backend": ""},
        {"backend": "../x"},
        {"backend": None},
        {"backend": "a b"},
        {"scope": "galaxy"},
        {"format": "\x1b[31m"},
    ],
)
def test_what_cannot_be_a_fault_is_one_sentence(bad):
    with pytest.raises(ValueError) as caught:
        fp4tune.report_fault(**{"backend": "marlin", "m": 1, "n": N, "k": K, **bad})
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


# -- the spool is what others write


def good(**other) -> dict:
    entry = quarantine.make("cutlass", quarantine.Reach(3, N, K), reason="x").json()
    return {**entry, **other}


HOSTILE = {
    "text": b"hello",
    "nothing": b"",
    "bytes": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "deep": b"[" * 4000,
    "foreign field": json.dumps(good(command="rm")).encode(),
    "missing field": json.dumps({"id": "a"}).encode(),
    "terminal codes": json.dumps(good(reason="\x1b]0;x\x07")).encode(),
    "path as a name": json.dumps(good(backend="../../etc")).encode(),
    "number as a name": json.dumps(good(backend=7)).encode(),
    "huge number": json.dumps(good(n=1 << 70)).encode(),
    "truth as a number": json.dumps(good(n=True)).encode(),
    "not a number": json.dumps(good(at=float("nan"))).encode(),
    "too long": json.dumps(good(reason="x" * 5000)).encode(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_not_ours_is_ignored_with_a_warning(tmp_path, kind, caplog):
    place = store(tmp_path / "s", *SWIZZLED)
    folder = place / quarantine_store.FOLDER
    folder.mkdir()
    content = HOSTILE[kind]
    try:
        name = json.loads(content)["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        name = "a"
    (folder / f"{name}.json").write_bytes(content)
    assert reader.open(place).choose(3, N, K).backend == "cutlass"
    assert "is ignored" in caplog.text and "\x1b" not in caplog.text


def test_links_pipes_and_folders_in_the_spool_are_ignored(tmp_path):
    place = store(tmp_path / "s", *SWIZZLED)
    folder = place / quarantine_store.FOLDER
    folder.mkdir()
    entry = good()
    (tmp_path / "real").write_text(json.dumps(entry))
    (folder / f"{entry['id']}.json").symlink_to(tmp_path / "real")
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    (folder / ".unfinished").write_text("{")
    found, ignored = quarantine_store.read(str(folder))
    assert found == [] and len(ignored) == 3
    assert reader.open(place).choose(3, N, K).backend == "cutlass"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.text(max_size=20))
def test_no_content_and_no_name_breaks_the_reading(content, name):
    with tempfile.TemporaryDirectory() as place:
        plain = "".join(c for c in name if c.isalnum()) or "a"
        try:
            (Path(place) / f"{plain}.json").write_bytes(content)
        except OSError:
            return
        assert quarantine_store.read(place)[0] == []


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["cutlass", "marlin", "cudnn", "other"]),
            st.sampled_from(quarantine.SCOPES),
            st.integers(0, 40),
        ),
        max_size=6,
    )
)
def test_a_quarantine_never_makes_a_backend_chosen_that_was_not_proven(reports):
    """It only takes away: whatever is answered is the fallback, or safe and not quarantined."""
    with tempfile.TemporaryDirectory() as place:
        root = store(Path(place), *SWIZZLED)
        for name, scope, m in reports:
            entry = quarantine.make(name, quarantine.Reach(m, N, K, scope))
            quarantine_store.write(entry, quarantine_store.place(root))
        found = reader.open(root)
        for m in (1, 16, 17, 32):
            gone = {
                name
                for name, scope, at in reports
                if scope != "bucket" or (at in range(1, 17)) == (m in range(1, 17)) and 0 < at < 33
            }
            left = [name for name, _ in SWIZZLED if name not in gone]
            decision = found.choose(m, N, K)
            expected = (left[0], "safe") if left else ("torch-dequant", "quarantined")
            assert (decision.backend, decision.status) == expected


# -- pinned generations


def test_ranks_agree_on_the_generation_of_the_first(tmp_path, monkeypatch):
    monkeypatch.delenv(reader.VARIABLE, raising=False)
    put(tmp_path, "a")
    first = reader.pin(tmp_path)
    put(tmp_path, "b")
    late, free = reader.open(tmp_path, pin=True), reader.open(tmp_path)
    assert [r.choose(3, N, K).tactic for r in (first, late, free)] == ["a", "a", "b"]
    assert os.environ[reader.VARIABLE] == "1"
    code = """
        import sys
        from fp4tune.cache import reader
        print(reader.open(sys.argv[1], pin=True).choose(3, 4096, 2048).tactic)
    """
    child = spawn(code, tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=30)[0] == "a\n"
    assert reader.open(tmp_path, generation=2).choose(3, N, K).tactic == "b"


def test_a_generation_that_is_gone_is_said(tmp_path, monkeypatch):
    for tag in range(12):
        put(tmp_path, str(tag))
    assert len(list(tmp_path.glob("choices-*.db"))) == 8
    assert reader.open(tmp_path, generation=6).choose(3, N, K).tactic == "5"
    with pytest.raises(Missing, match="generation 2 is not kept"):
        reader.open(tmp_path, generation=2)
    monkeypatch.setenv(reader.VARIABLE, "soon")
    with pytest.raises(StateError, match="no generation"):
        reader.open(tmp_path, pin=True)
    assert reader.open(tmp_path).generation == 12


def test_a_pinned_generation_is_not_one_of_a_lost_history(tmp_path):
    put(tmp_path, "old")
    for path in [*tmp_path.glob("choices.db"), *tmp_path.glob("ledger*")]:
        path.unlink()
    new = put(tmp_path, "new")
    assert put(tmp_path, "newer") > new
    assert reader.open(tmp_path, generation=new).choose(3, N, K).tactic == "new"


# -- the command


def run(*arguments, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, ["quarantine", *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout if code == 0 else done.stderr


def test_the_command_lists_adds_and_lifts(tmp_path):
    place = store(tmp_path / "s", *SWIZZLED)
    here = ("--state", place)
    assert json.loads(run("list", *here, "--json")) == {"quarantines": [], "ignored": []}
    added = json.loads(run("add", "cutlass", *here, "--reason", "seen NaN", "--json"))
    assert added["by"] == "operator" and added["scope"] == "backend"
    assert added["fingerprint"] == ENVIRONMENT.fingerprint
    assert reader.open(place).choose(3, N, K).backend == "marlin"
    assert "cutlass" in run("list", *here) and "seen NaN" in run("list", *here)
    run("lift", added["id"], *here)
    assert reader.open(place).choose(3, N, K).backend == "cutlass"
    assert "no quarantine" in run("lift", added["id"], *here, code=2)
    shape = ("--layer", "4096,2048", "--m", 3)
    assert json.loads(run("add", "cudnn", *here, *shape, "--json"))["scope"] == "bucket"
    assert "there is no backend 'cutlas'" in run("add", "cutlas", *here, code=2)
    assert "say which layer" in run("add", "cutlass", "--m", 3, *here, code=2)
    run("add", "cutlass", *here)
    run("add", "marlin", *here)
    asked = CliRunner().invoke(cli.app, ["choose", "3", str(N), str(K), *map(str, here)])
    assert asked.exit_code == 1 and "quarantined" in asked.stdout
