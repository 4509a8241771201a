"""One file, link, limit or clock that an attacker found a way through with."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sqlite3
import stat
import time
from pathlib import Path

import pytest
from reports import KNOWN, alone, ban, chosen, collect, drop, entry_for, place  # noqa: F401
from strangers import OTHER, STRANGER, as_user, shared_place  # noqa: F401
from test_quarantine import SWIZZLED, K, N, store

from commands import call
from fp4tune.cache import dropbox, quarantine, quarantine_store, reader, snapshot, sqlitefile
from fp4tune.cache import state as states
from fp4tune.cache.errors import Corrupt, Missing, StateError
from fp4tune.cache.ledger import Ledger
from fp4tune.commands import emit
from fp4tune.daemon.mend import mend
from fp4tune.errors import Refused
from fp4tune.machine import files
from fp4tune.probes.models.patterns import NamePatterns, ends_soon
from fp4tune.witness import counts

WEEKS_AGO = time.time() - 30 * 86400


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder of somebody's, with what is old in it."""
    made = tmp_path / "victim"
    made.mkdir(mode=0o700)
    for name in ("important.json", "notes.txt", ".hidden"):
        (made / name).write_text("{}")
        os.utime(made / name, (WEEKS_AGO, WEEKS_AGO))
    (made / "empty").mkdir()
    return made


def looks(folder: Path) -> tuple[list[str], int]:
    return sorted(os.listdir(folder)), stat.S_IMODE(folder.stat().st_mode)


# -- reports


@pytest.mark.parametrize("key", ["self", "cls", "values", "__class__"])
def test_no_key_of_a_report_keeps_others_from_being_heard(place, key):  # noqa: F811
    box = place / dropbox.FOLDER
    for number in range(20):
        as_user(lambda n=number: drop(box, {key: 1, "id": f"x{n}"}))
    as_user(lambda: drop(box, entry_for("cutlass")), OTHER)
    assert any("cutlass" in said for said in collect(place)) and not list(box.iterdir())
    assert chosen(place) != "cutlass"
    assert call("quarantine", "list", "--state", str(place)).exit_code == 0
    with pytest.raises(ValueError, match="exactly its own fields"):
        quarantine.Quarantine(**{key: 1})


def test_a_box_that_is_a_link_is_not_emptied(tmp_path, victim):
    state = store(tmp_path / "state", *SWIZZLED)
    before = looks(victim)
    box = state / dropbox.FOLDER
    if box.exists():
        box.rmdir()
    box.symlink_to(victim)
    collect(state)
    assert looks(victim) == before


def test_a_folder_that_is_no_drop_box_is_not_emptied(tmp_path, victim, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    before = looks(victim)
    dropbox.Collector(state).once(KNOWN, 5.0)
    monkeypatch.setattr(dropbox, "FOLDER", "other")
    victim.rename(state / "other")
    dropbox.Collector(state).once(KNOWN, 5.0)
    assert looks(state / "other") == before


def test_old_counts_are_forgotten_in_a_drop_box_and_nowhere_else(tmp_path, victim):
    link = tmp_path / "link"
    link.symlink_to(victim)
    for folder in (link, victim):
        counts.forget_old(folder)
    assert "important.json" in os.listdir(victim)
    victim.chmod(0o1777)
    counts.forget_old(link)
    assert "important.json" in os.listdir(victim)
    counts.forget_old(victim)
    assert sorted(os.listdir(victim)) == [".hidden", "empty", "notes.txt"]


# -- quarantines that hold


@pytest.mark.parametrize("char", ["\U0001f600", "é", "\\", "x"])
def test_the_longest_reason_is_read_again(tmp_path, char):
    state = store(tmp_path / "state", *SWIZZLED)
    first = chosen(state)
    entry = ban(first, state, reason=char * 600)
    found, ignored = quarantine_store.read(quarantine_store.place(state))
    assert found == [entry] and not ignored and chosen(state) != first


def test_what_would_not_be_read_is_not_written(tmp_path, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    monkeypatch.setattr(quarantine_store, "BYTES", 300)
    with pytest.raises(StateError, match="would not be read"):
        ban("cutlass", state, reason="x" * 300)
    assert not list((state / quarantine_store.FOLDER).glob("*"))


def test_a_part_that_was_written_is_not_the_whole(tmp_path, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    plain = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: plain(fd, bytes(data[:7])))
    entry = ban("cutlass", state, reason="y" * 200)
    monkeypatch.undo()
    assert quarantine_store.read(quarantine_store.place(state))[0] == [entry]


def test_a_reader_that_could_not_look_looks_again(tmp_path, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    first = chosen(state)
    asked = reader.open(state)
    now = [0.0]
    monkeypatch.setattr(reader, "_monotonic", lambda: now[0])
    asked._due = -1.0
    plain, listdir = quarantine_store.read, os.listdir

    def none_left(folder):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "listdir", none_left)
    ban(first, state)
    assert asked.choose(3, N, K).backend == "torch-dequant"  # nothing is known: nothing is safe
    monkeypatch.setattr(os, "listdir", listdir)
    assert quarantine_store.read is plain
    now[0] = 2 * reader.RETRY
    assert asked.choose(3, N, K).backend not in (first, "torch-dequant")


def test_a_warning_that_fails_hides_no_quarantine(tmp_path, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    first = chosen(state)
    asked = reader.open(state)
    (state / quarantine_store.FOLDER).mkdir(exist_ok=True)
    (state / quarantine_store.FOLDER / "odd.json").write_text("{")
    ban(first, state)

    def fails(sentence):
        raise OSError(errno.EMFILE, sentence)

    monkeypatch.setattr(reader, "_warn", fails)
    asked._due = -1.0
    assert asked.choose(3, N, K).backend != first


class Unsayable:
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_whatever_the_reason_a_fault_is_reported(tmp_path, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    first = chosen(state)
    entry = quarantine.make(first, quarantine.Reach(3, N, K), reason=Unsayable())
    monkeypatch.setattr(time, "time", lambda: -5.0)
    long_ago = quarantine.make(first, quarantine.Reach(3, N, K))
    assert entry.backend == first and long_ago.at == 0.0 and long_ago.id.startswith("1970")


def test_a_generation_of_too_many_digits_is_none(tmp_path, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    monkeypatch.setenv(reader.VARIABLE, "9" * 5000)
    with pytest.raises(Missing, match="no generation"):
        reader.open(state, pin=True)


# -- folders that are swapped, and whose they are


def test_a_store_that_is_swapped_for_a_link_is_not_taken_over(tmp_path, victim, monkeypatch):
    state = store(tmp_path / "state", *SWIZZLED)
    ban("cutlass", state)
    folder = Path(quarantine_store.place(state))
    folder.chmod(0o777)
    before = looks(victim)
    plain = quarantine_store.read

    def swapped(path):
        found = plain(path)
        folder.rename(tmp_path / "moved")
        folder.symlink_to(victim)
        return found

    monkeypatch.setattr(quarantine_store, "read", swapped)
    with pytest.raises(StateError):
        quarantine_store.take_over(str(folder))
    assert looks(victim) == before


def test_what_root_makes_is_the_owners_of_the_state(shared_place):  # noqa: F811
    state = store(shared_place / "state", *SWIZZLED)
    for each in (state, *state.rglob("*")):
        os.chown(each, STRANGER, STRANGER)
    for folder in (quarantine_store.FOLDER, "locks", dropbox.FOLDER):
        if (state / folder).is_dir():
            os.rename(state / folder, shared_place / f"old-{folder}")
    entry = ban("cutlass", state)
    collect(state)
    with states.exclusive(states.lock_file(state, "publish")):
        pass
    for folder in (quarantine_store.FOLDER, "locks", "locks/publish.lock", dropbox.FOLDER):
        assert (state / folder).stat().st_uid == STRANGER, folder
    as_user(lambda: quarantine_store.lift(entry.id, quarantine_store.place(state)))
    as_user(lambda: ban("marlin", state))


def test_a_state_is_not_for_everyone_to_write_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        place = tmp_path / "new"
        with Ledger.open(place):
            pass
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o022 == 0


# -- what is written and read


def test_emitted_files_are_written_through_no_link(tmp_path, victim):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".cache.json").symlink_to(victim / "important.json")
    os.mkfifo(out / ".other.json")
    emit.write({"cache.json": {"a": 1}, "other.json": [2]}, out)
    assert json.loads((out / "cache.json").read_text()) == {"a": 1}
    assert (victim / "important.json").read_text() == "{}"
    assert len(list(out.iterdir())) == 4


def test_all_bytes_are_written_or_it_is_said(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with path.open("wb") as file:
        files.write_all(file.fileno(), b"abc" * 1000)
    assert path.read_bytes() == b"abc" * 1000


@pytest.mark.parametrize("made", ["view", "generated"])
def test_a_choices_database_that_computes_is_damaged(tmp_path, made):
    state = store(tmp_path / "state", *SWIZZLED)
    path = state / "choices.db"
    with sqlite3.connect(path) as conn:
        if made == "view":
            conn.execute("ALTER TABLE page RENAME TO kept")
            conn.execute(
                "CREATE VIEW page AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 "
                "FROM c) SELECT x AS name, x AS body FROM c"
            )
        else:
            conn.execute("DROP TABLE page")
            conn.execute("CREATE TABLE page (name TEXT, body AS (zeroblob(1000)))")
            conn.execute("INSERT INTO page (name) VALUES ('x')")
    conn.close()
    for load in (snapshot.load, snapshot.load_pages):
        with pytest.raises(Corrupt):
            load(str(path))


@pytest.mark.parametrize("name", ["ledger.db", "ledger.db-wal"])
def test_a_pipe_that_was_the_ledger_is_not_waited_for(tmp_path, name):
    state = store(tmp_path / "state", *SWIZZLED)
    for there in state.glob(f"{name}*"):
        there.unlink()
    os.mkfifo(state / name)
    with contextlib.suppress(StateError):
        mend(state)
    Ledger.open(state).close()


def test_two_slashes_begin_no_host(tmp_path):
    state = store(tmp_path / "state", *SWIZZLED)
    path = f"/{state / 'choices.db'}"
    assert path.startswith("//") and snapshot.load(path).generation == 1
    assert sqlitefile.uri("//tmp/x?y", "mode=ro") == "file:/tmp/x%3fy?mode=ro"


@pytest.mark.parametrize(
    "text", ["a=" + "[" * 20_000, ".".join("a" * 5000) + " = 1", 'state = "/x\\u0000y"']
)
def test_a_configuration_that_is_nested_without_end_is_one_sentence(tmp_path, text):
    from fp4tune.daemon import config

    path = tmp_path / "daemon.toml"
    path.write_text(text)
    with pytest.raises(Refused) as said:
        config.load(path)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("expression", "soon"),
    [
        (r".*(a+)+b$", False),
        (r"(ab|a|b)*c", False),
        (r"(a?a?)*b", False),
        (r"(?=(a+)+b)x", False),
        (r"(a)(?(1)(b+)+c|d)", False),
        (r".*.*.*.*.*.*b", False),
        (r".*self_attn.*", True),
        (r".*mlp\.experts\.\d+\..*", True),
        (r"model\.layers\.(\d+)\.(q|k|v)_proj", True),
        (r"^(?!.*(moe|expert)).*", True),
        (r"(?:lm_head|.*embed.*)", True),
        (r"(ab{2}){3}", True),
    ],
)
def test_an_expression_of_a_checkpoint_takes_no_time_without_end(expression, soon):
    assert ends_soon(expression) == soon
    patterns = NamePatterns([f"re:{expression}"])
    assert bool(patterns.odd) != soon
    began = time.monotonic()
    patterns.match("model.layers.0." + "a" * 60)
    assert time.monotonic() - began < 5
    with pytest.raises(re.error):
        ends_soon("(")
