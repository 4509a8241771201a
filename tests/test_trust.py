"""Other users of the node: what they cannot undo, hold up, or have waited for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ENVIRONMENT, evidence, isolated, put, spawn, start
from strangers import OTHER, STRANGER, Staying, as_user, shared_place  # noqa: F401
from test_quarantine import SWIZZLED, K, N, store

import fp4tune
from commands import call
from fp4tune.autotune.evidence.kept import with_what_is_kept
from fp4tune.cache import dropbox, gpulock, publish, quarantine, quarantine_store, reader, state
from fp4tune.cache.errors import Busy, Corrupt, Full, StateError
from fp4tune.cache.ledger import Ledger
from fp4tune.machine import files, holders

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""For what is written hundreds of times: how long a disk takes to be sure of it is no matter."""
KNOWN = frozenset(name for name, _ in SWIZZLED)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Look at the store at every call, and forget what other tests quarantined."""
    monkeypatch.setattr(reader, "INTERVAL", 0.0)
    monkeypatch.setattr(reader, "_own", ())
    monkeypatch.setattr(reader, "_readers", [])


@pytest.fixture
def place(shared_place) -> Path:  # noqa: F811
    """A state of root's with three backends, best first, and a drop box."""
    found = store(shared_place / "state", *SWIZZLED)
    dropbox.prepare(found)
    return found


def chosen(place: Path) -> str:
    return reader.open(place).choose(3, N, K).backend


def ban(backend: str, place: Path, **other) -> quarantine.Quarantine:
    entry = quarantine.make(backend, quarantine.Reach(3, N, K), by="operator", **other)
    quarantine_store.write(entry, quarantine_store.place(place))
    return entry


def collect(place: Path) -> list[str]:
    return dropbox.collect(place, KNOWN)


def entry_for(backend: str, **other) -> dict:
    return {**quarantine.make(backend, quarantine.Reach(3, N, K)).json(), **other}


def drop(box: Path, document: dict) -> None:
    (box / f"{document['id']}.json").write_text(json.dumps(document))


# -- quarantines


def test_files_by_the_thousand_press_nothing_out(place):
    ban("cutlass", place)
    box = place / dropbox.FOLDER

    def floods() -> None:
        for number in range(5000):
            (box / f"0{number}.json").touch()
        for number in range(300):
            drop(box, entry_for(f"invented-{number}"))

    as_user(floods)
    assert chosen(place) == "marlin"
    collect(place)
    assert chosen(place) == "marlin" and os.listdir(box) == []
    found, ignored = quarantine_store.read(quarantine_store.place(place))
    assert ignored == [] and len(found) <= 1 + quarantine.OF_ONE_USER


def test_an_id_is_its_owners(place):
    mine = ban("cutlass", place)
    harmless = {**mine.json(), "backend": "cudnn", "scope": "bucket", "m": 17}
    as_user(lambda: drop(place / dropbox.FOLDER, harmless))
    as_user(lambda: drop(place / dropbox.FOLDER, {**harmless, "id": mine.id + "x"}), OTHER)
    collect(place)
    found = {q.id: q.backend for q in quarantine_store.read(quarantine_store.place(place))[0]}
    assert found == {
        mine.id: "cutlass",
        f"u{STRANGER}.{mine.id}": "cudnn",
        f"u{OTHER}.{mine.id}x": "cudnn",
    }
    assert chosen(place) == "marlin"


def test_one_who_may_only_report_can_neither_write_nor_remove_nor_replace_the_store(place):
    entry = ban("cutlass", place)
    kept = quarantine_store.place(place)

    def attacks() -> None:
        for attack in (
            lambda: os.unlink(f"{kept}/{entry.id}.json"),
            lambda: os.rename(kept, f"{kept}-"),
            lambda: os.rename(f"{kept}/{entry.id}.json", f"{kept}/x.json"),
            lambda: Path(kept, "x.json").write_text("{}"),
            lambda: os.open(f"{kept}/{entry.id}.json", os.O_WRONLY),
            lambda: quarantine_store.lift(entry.id, kept),
            lambda: quarantine_store.write(entry, kept),
        ):
            with pytest.raises((OSError, StateError)):
                attack()

    as_user(attacks)
    assert chosen(place) == "marlin"
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o755


def test_a_report_acts_here_at_once_and_elsewhere_once_it_is_taken_up(place):
    def reports() -> None:
        told = fp4tune.report_fault("cutlass", 3, N, K, reason="NaN", state_dir=place)
        assert told.shared and told.shared.startswith(str(place / dropbox.FOLDER))
        assert chosen(place) == "marlin", "in this process at once"

    as_user(reports)
    assert chosen(place) == "cutlass"
    assert "as was reported" in collect(place)[0]
    assert chosen(place) == "marlin"
    (found,) = quarantine_store.read(quarantine_store.place(place))[0]
    assert found.id.startswith(f"u{STRANGER}.") and found.reason == "NaN"


def test_one_user_s_flood_does_not_press_out_another_s_report_or_the_users_own(place):
    box = place / dropbox.FOLDER
    as_user(lambda: drop(box, entry_for("cutlass", scope="layer")), OTHER)
    as_user(lambda: drop(box, entry_for("marlin", scope="layer")))

    def floods() -> None:
        for number in range(3000):
            drop(box, entry_for("cudnn", scope="bucket", m=number, n=number))

    as_user(floods)
    collect(place)
    found = quarantine_store.read(quarantine_store.place(place))[0]
    assert {q.backend for q in found if q.id.startswith(f"u{OTHER}.")} == {"cutlass"}
    wide = {q.backend for q in found if q.id.startswith(f"u{STRANGER}.") and q.scope == "backend"}
    assert wide == {"marlin", "cudnn"}, "what is over the quota reaches further, and not less far"
    assert reader.open(place).choose(3, N, K).status == "quarantined"
    before = sorted(os.listdir(quarantine_store.place(place)))
    as_user(floods)
    collect(place)
    assert sorted(os.listdir(quarantine_store.place(place))) == before, "and costs nothing more"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1000, 1003),
            st.sampled_from(["cutlass", "marlin", "made-up", "else"]),
            st.sampled_from(quarantine.SCOPES),
            st.integers(0, 90),
        ),
        max_size=400,
    )
)
def test_whatever_is_reported_nothing_reported_of_what_is_published_is_lost(reports):
    tally = quarantine.ReportTally(KNOWN)
    for user, backend, scope, at in reports:
        tally.add(user, quarantine.make(backend, quarantine.Reach(at, at, at, scope)))
    found = tally.entries()
    users = {user for user, *_ in reports}
    assert len(found) <= len(users) * (quarantine.OF_ONE_USER + len(KNOWN))
    assert len({q.id for q in found}) == len(found)
    for user, backend, _, at in reports:
        if backend not in KNOWN:
            continue
        row = {
            "backend": backend, "tactic": "t", "fingerprint": "f", "n": at, "k": at, "m_lo": at,
            "m_hi": at, "format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "groups": 1,
        }  # fmt: skip
        assert any(q.covers(row) and q.id.startswith(f"u{user}.") for q in found)


@pytest.mark.parametrize("harm", ["unreadable store", "unreadable file", "too many"])
def test_where_it_cannot_be_known_everything_is_taken_away(place, harm, monkeypatch):
    entry = ban("cudnn", place)
    kept = Path(quarantine_store.place(place))
    if harm == "unreadable store":
        kept.chmod(0o700)
    elif harm == "unreadable file":
        (kept / f"{entry.id}.json").chmod(0o600)
    else:
        monkeypatch.setattr(quarantine_store, "MOST", 2)
        for _ in range(3):
            ban("cudnn", place)

    def reads() -> None:
        assert reader.open(place).choose(3, N, K).status == "quarantined"

    as_user(reads)


def test_links_to_others_files_are_no_reports(place):
    box = place / dropbox.FOLDER
    entry = ban("cutlass", place)
    (box / f"{entry.id}.json").symlink_to(f"{quarantine_store.place(place)}/{entry.id}.json")
    os.mkfifo(box / "pipe.json")
    (box / "folder.json").mkdir()
    collect(place)
    assert len(os.listdir(quarantine_store.place(place))) == 1


def test_a_second_name_hides_no_report_and_puts_none_into_anothers_mouth(place):
    """A kernel without protected_hardlinks lets anyone link another's file."""
    box = place / dropbox.FOLDER
    as_user(lambda: drop(box, entry_for("cutlass")), OTHER)
    (report,) = box.iterdir()
    os.link(report, place / "kept by a stranger")
    collect(place)
    assert chosen(place) == "marlin"
    (found,) = quarantine_store.read(quarantine_store.place(place))[0]
    assert found.id.startswith("others.")


@pytest.mark.parametrize("to", ["the store", "a pipe", "itself", "everything"])
def test_what_a_stranger_puts_in_the_place_of_a_drop_box_is_none(
    place,
    shared_place,  # noqa: F811
    monkeypatch,
    to,
):
    (shared_place / "open").mkdir()
    (shared_place / "open").chmod(0o1777)
    box = shared_place / "open" / "box"
    monkeypatch.setenv(dropbox.VARIABLE, str(box))
    kept = quarantine_store.place(place)
    ban("cutlass", place)
    before = os.listdir(kept)
    as_user(
        lambda: (
            os.mkfifo(box)
            if to == "a pipe"
            else box.symlink_to({"the store": kept, "itself": box, "everything": "/"}[to])
        )
    )
    collect(place)
    assert os.listdir(kept) == before and chosen(place) == "marlin"
    box.unlink()
    monkeypatch.setenv(dropbox.VARIABLE, kept)
    collect(place)
    assert os.listdir(kept) == before, "nor is the store, though its owner names it"


def test_a_drop_box_is_gone_through_as_it_was_opened(place, shared_place):  # noqa: F811
    """Who owns it may put something else in its place meanwhile."""
    entry = ban("cutlass", place)
    box = shared_place / "box"
    box.mkdir()
    going = dropbox._Pass(str(box), quarantine_store.place(place))
    drop(box, entry.json())
    box.rename(shared_place / "away")
    box.symlink_to(quarantine_store.place(place))
    assert going.batch(True) == [] and len(going.batch(True)) == 1
    dropbox._take_up(str(place), [], frozenset())
    going.close()
    assert os.listdir(quarantine_store.place(place)) == [f"{entry.id}.json"]


def test_every_users_first_report_is_reached_before_the_second_of_one(place):
    box = place / dropbox.FOLDER
    as_user(lambda: [(box / f"{n}.json").touch() for n in range(3000)])
    as_user(lambda: drop(box, entry_for("cutlass")), OTHER)
    going = dropbox._Pass(str(box), quarantine_store.place(place))
    while not (found := going.batch(False)) and not going.ended:
        pass
    assert [user for user, _, _ in found] == [OTHER]
    going.close()


def test_a_folder_of_the_users_is_left_as_it_is_where_it_is_named_as_a_drop_box(
    place,
    shared_place,  # noqa: F811
    monkeypatch,
):
    box = shared_place / "documents"
    box.mkdir()
    (box / "letter.json").write_text("{}")
    (box / "letter").write_text("dear")
    monkeypatch.setenv(dropbox.VARIABLE, str(box))
    drop(box, entry_for("cutlass"))
    said = collect(place)
    assert any("chmod 1777" in each for each in said)
    assert sorted(os.listdir(box)) == ["letter", "letter.json"] and chosen(place) == "marlin"


def test_a_lift_that_would_not_last_says_so(place, shared_place, monkeypatch):  # noqa: F811
    as_user(lambda: drop(place / dropbox.FOLDER, entry_for("cutlass")))
    collect(place)
    (found,) = quarantine_store.read(quarantine_store.place(place))[0]
    assert call("quarantine", "lift", found.id, "--state", place).exit_code == 0
    assert chosen(place) == "cutlass"
    collect(place)
    assert chosen(place) == "cutlass", "what was taken up is not taken up again"


# -- what an earlier fp4tune left


@pytest.mark.parametrize("owner", [0, STRANGER])
def test_a_spool_of_an_earlier_fp4tune_is_read_and_taken_over(place, owner):
    """Everyone could write to it, and whoever made it owns it."""
    kept = Path(quarantine_store.place(place))
    kept.mkdir()
    kept.chmod(0o1777)
    entry = quarantine.make("cutlass", quarantine.Reach(3, N, K), by="operator")
    quarantine_store.put(entry, str(kept))
    as_user(lambda: drop(kept, entry_for("marlin", id=entry.id + "x")), OTHER)
    for number in range(50):
        as_user(lambda number=number: (kept / f"0{number}.json").touch())
    os.chown(kept, owner, owner)
    assert chosen(place) == "cudnn"
    (said,) = [each for each in collect(place) if "could be written by others" in each]
    assert "keeps all 2" in said and chosen(place) == "cudnn"
    assert os.stat(kept).st_uid == 0 and stat.S_IMODE(os.stat(kept).st_mode) == 0o755
    assert {q.id for q in quarantine_store.read(str(kept))[0]} == {
        entry.id,
        f"u{OTHER}.{entry.id}x",
    }


def test_a_lock_of_an_earlier_fp4tune_holds_and_one_of_a_stranger_does_not(place):
    old = place / "publish.lock"
    old.touch()

    def holds() -> object:
        file = open(old)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    lock = state.lock_file(place, "publish")
    with Staying(holds, 0) as pid, pytest.raises(Busy, match=f"process {pid} holds"):
        state.exclusive(lock).acquire()
    with Staying(holds), state.exclusive(lock):
        assert not old.exists(), "it is nobody's any more"


# -- locks


def hold_all(place: Path, how: int) -> list[int]:
    """Hold every file that can be read below `place`, as far as it can be."""
    found = []
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            except OSError:
                continue
            for hold in (fcntl.flock, fcntl.lockf):  # what SQLite uses, too
                with contextlib.suppress(OSError):
                    hold(fd, (how if hold is fcntl.flock else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            found.append(fd)
    assert found, "something can be read"
    return found


def used(place: Path) -> Path:
    """A state in which every lock was taken once."""
    with Ledger.open(place) as ledger:
        run = ledger.start_run(seed=1, level="quick", profile="strict", device={})
        ledger.finish_run(run)
    gpulock.prepare(place, [gpulock.CPU, "GPU-1"])
    for kind in ("probe", "join", "daemon", "build"):
        with state.exclusive(state.lock_file(place, kind, "cpu")):
            pass
    return place


@pytest.mark.parametrize("how", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_nobody_but_its_owner_can_hold_up_a_writer(place, how, monkeypatch):
    used(place)
    # What holds is forked from this process, which has torch.
    monkeypatch.setattr(holders, "_COMPUTES", "a library of no name")
    assert stat.S_IMODE(os.stat(place / state.LOCKS).st_mode) == 0o700
    with Ledger.open(place), Staying(lambda: hold_all(place, how)):
        assert put(place, "new") == 2
        assert publish.rollback(place) == 3
        for kind in ("probe", "join", "daemon", "build"):
            with state.exclusive(state.lock_file(place, kind, "cpu")):
                pass
        with Ledger.open(place) as ledger:
            ledger.finish_run(ledger.start_run(seed=1, level="quick", profile="strict", device={}))
        with gpulock.Turn(gpulock.path(place, "GPU-1")) as mine:
            assert str(STRANGER) in mine.passed[0] and "has no GPU open" in mine.passed[0]
            assert all(mine.kept() for _ in range(3))
        assert not gpulock.in_use(place, gpulock.CPU)
        assert call("quarantine", "add", "cutlass", "--state", place).exit_code == 0
    with gpulock.Turn(gpulock.path(place, "GPU-1")) as mine:
        assert not mine.passed


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_ledger_is_its_owners_to_read_also_one_of_an_earlier_fp4tune(place, mode):
    """Who can read it can hold SQLite's own locks, on the file and on the index of its log."""
    for name in ("", "-wal", "-shm"):
        if os.path.exists(f"{place / state.LEDGER}{name}"):
            os.chmod(f"{place / state.LEDGER}{name}", mode)
    with Ledger.open(place):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in place.glob("ledger.db*")}
        assert modes == {0o600} and len(list(place.glob("ledger.db*"))) == 3

        commands = (("choose", 3, N, K), ("facts",))
        for command in commands:  # what they import may lie where a stranger cannot look
            assert call(*command, "--state", place).exit_code == 0

        def reads() -> None:
            with pytest.raises(StateError, match="may not read the ledger"):
                Ledger.open(place, readonly=True)
            for command in commands:
                assert call(*command, "--state", place).exit_code == 0

        as_user(reads)


def test_a_folder_of_locks_that_another_made_is_refused(place):
    (place / state.LOCKS).rename(place / "away")
    (place / state.LOCKS).mkdir()
    os.chown(place / state.LOCKS, STRANGER, STRANGER)
    with pytest.raises(StateError, match="could stop every writer"):
        state.exclusive(state.lock_file(place, "publish")).acquire()
    (place / state.LOCKS).rmdir()
    (place / state.LOCKS).symlink_to(place / "away")
    with pytest.raises(StateError, match="no folder"):
        state.exclusive(state.lock_file(place, "publish")).acquire()


def test_an_engine_of_another_user_counts_once_it_computes(place, monkeypatch):
    """Here nothing has a GPU; what it would have open is another file."""
    stands_in = place.parent / "gpu0"
    stands_in.touch()
    monkeypatch.setattr(holders, "_GPU", str(stands_in))
    lock = gpulock.path(place, "GPU-1")
    gpulock.prepare(place, ["GPU-1"])

    def engine() -> object:
        held = gpulock.share(place, ["GPU-1"])
        assert held.held
        return held, open(stands_in)  # noqa: SIM115

    with Staying(engine):
        assert gpulock.in_use(place, "GPU-1")
        with pytest.raises(Busy, match="an engine holds"), gpulock.Turn(lock):
            pass
    # One that has not opened it yet is passed over, and ends the probe as soon as it has.
    begin = place.parent / "begin"
    code = f"""
        import fcntl, os, sys, time
        os.setresgid(*[{STRANGER}] * 3); os.setresuid(*[{STRANGER}] * 3)
        lock = open(sys.argv[1])
        fcntl.flock(lock, fcntl.LOCK_SH)
        print("held", flush=True)
        while not os.path.exists(sys.argv[2]): time.sleep(0.01)
        gpu = open(sys.argv[3])
        print("open", flush=True)
        time.sleep(60)
    """
    other = spawn(code, lock, begin, stands_in, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with gpulock.Turn(lock) as mine:
            assert mine.passed and mine.kept()
            begin.touch()
            assert other.stdout.readline() == "open\n"
            assert not mine.kept()
    finally:
        other.kill()
        other.communicate()


def test_a_lock_that_was_handed_on_is_looked_at_where_it_is(place):
    """Who took it is gone, and its number may be anybody's by now."""
    lock = gpulock.path(place, "GPU-1")
    gpulock.prepare(place, ["GPU-1"])
    read, write = os.pipe()

    def hands_on() -> None:
        fd = os.open(lock, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH)
        child = os.fork()
        if child == 0:
            os.write(write, f"{os.getpid()}".encode())
            import time

            time.sleep(60)
            os._exit(0)

    as_user(hands_on)
    child = int(os.read(read, 20))
    try:
        with gpulock.Turn(lock) as mine:
            assert f"process {child} " in mine.passed[0]
    finally:
        os.kill(child, 9)


def test_an_engine_does_not_wait_for_a_stranger(place):
    gpulock.prepare(place, ["GPU-1"])
    with Staying(lambda: hold_all(place, fcntl.LOCK_EX)) as pid:
        held = gpulock.share(place, ["GPU-1"], wait=3600)
        assert f"process {pid} " in held.problems["GPU-1"] and "not waited" in str(held.problems)


# -- files in whose place something else lies


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {"pipe": fifo, "socket": bound, "folder": Path.mkdir, "device": device}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [state.CHOICES, state.LEDGER, "ledger.db-wal", "ledger.db-shm", "ledger.db-journal"]
)
def test_what_is_no_file_is_one_sentence_and_never_waited_for(tmp_path, kind, name):
    put(tmp_path)
    for path in [*tmp_path.glob(f"{name}*")] if name != "ledger.db-journal" else []:
        path.unlink()
    KINDS[kind](tmp_path / name)
    code = """
        import sys
        from pathlib import Path
        from fp4tune.cache.errors import Corrupt
        from fp4tune.cache import reader
        from fp4tune.cache.ledger import Ledger
        place, name = Path(sys.argv[1]), sys.argv[2]
        for attempt in (
            lambda: reader.open(place), lambda: Ledger.open(place),
            lambda: Ledger.open(place, readonly=True),
        ):
            try:
                attempt()
            except Corrupt as error:
                print(str(error).replace("\\n", "|"))
    """
    other = spawn(code, tmp_path, name, stdout=subprocess.PIPE, text=True)
    try:
        said = other.communicate(timeout=60)[0].splitlines()
    finally:
        other.kill()
    assert len(said) == (1 if name == state.CHOICES else 2), said
    assert all("regular file" in line and str(tmp_path) in line for line in said)


@pytest.mark.parametrize(
    "command", [("choose", "3", N, K), ("show",), ("facts",), ("explain", "3", N, K)]
)
def test_commands_do_not_wait_for_a_pipe(tmp_path, command):
    put(tmp_path)
    (tmp_path / state.CHOICES).unlink()
    os.mkfifo(tmp_path / state.CHOICES)
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cli", *map(str, command), "--state", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    assert "no regular file" in done.stderr + done.stdout


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.booleans())
def test_only_regular_files_are_opened(kind, links):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        KINDS[kind](path)
        for opening in (
            lambda: files.descriptor(path, links),
            lambda: files.whole(path, 10, links),
            lambda: files.opened(path, links),
        ):
            with pytest.raises(files.Irregular):
                opening()
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(b"12345")
        assert files.whole(path, 5, links) == b"12345"
        with pytest.raises(files.Irregular, match="more than 4 bytes"):
            files.whole(path, 4, links)


def test_a_choices_db_of_any_size_is_not_read(tmp_path, monkeypatch):
    put(tmp_path)
    os.chmod(tmp_path / state.CHOICES, 0o644)
    os.truncate(tmp_path / state.CHOICES, 1 << 40)  # takes no room on the disk
    with pytest.raises(Corrupt, match="more than"):
        reader.open(tmp_path)


# -- what can be rolled back to


class Faults:
    """Lets calls of the operating system fail, as a full disk would: the n-th, and then every one
    until it is over."""

    CALLS = ("rename", "fsync", "link", "unlink", "open", "replace", "fchmod")

    def __init__(self, after: int, times: int) -> None:
        self.after, self.times, self.calls = after, times, 0

    def wrapped(self, call):
        def failing(*args, **kw):
            self.calls += 1
            if self.after < self.calls <= self.after + self.times:
                raise OSError(28, "No space left on device")
            return call(*args, **kw)

        return failing


FAULTS = st.tuples(st.integers(0, 25), st.integers(1, 12))
LEDGER_STEPS = ("reserve_generation", "set_generation", "sync")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.just("damage"), FAULTS), max_size=9))
def test_whatever_fails_every_generation_that_counts_can_be_rolled_back_to(plan):
    """None publishes; a pair lets that many calls fail from that one on; damage is that of the
    published file."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        place = Path(folder)
        patch.setattr(publish, "KEEP", 3)
        patch.setattr(publish, "LINKED", 2)
        published: list[tuple[int, str]] = [(put(place, "first"), "first")]
        for turn, fault in enumerate(plan):
            tag = f"t{turn}"
            if fault == "damage":
                os.chmod(place / state.CHOICES, 0o644)
                os.truncate(place / state.CHOICES, 3000)
                continue
            with pytest.MonkeyPatch.context() as inner:
                if fault is not None:
                    faults = Faults(*fault)
                    for name in Faults.CALLS:
                        inner.setattr(os, name, faults.wrapped(getattr(os, name)))
                    for name in LEDGER_STEPS:
                        inner.setattr(Ledger, name, faults.wrapped(getattr(Ledger, name)))
                with contextlib.suppress(StateError, OSError):
                    published.append((put(place, tag), tag))
            try:
                found = reader.open(place)
            except Corrupt:
                continue  # damaged, and nothing was published since
            last = found.choose(3, N, K).tactic
            if last != published[-1][1]:
                # It failed after the rename, and was published all the same.
                assert last == tag
                published.append((found.generation, tag))
        for number, tag in published[-3:]:
            publish.rollback(place, number)
            assert reader.open(place).choose(3, N, K).tactic == tag
        assert not list(place.glob(".choices*"))


def test_attempts_that_failed_take_no_place_of_what_was_published(tmp_path, monkeypatch):
    good = [put(tmp_path, f"g{number}") for number in range(3)]
    for _ in range(publish.KEEP + 2):
        with pytest.MonkeyPatch.context() as patch:

            def full(temporary, target):
                raise OSError(28, "No space left on device")

            patch.setattr(publish, "_replace", full)
            with pytest.raises(StateError, match="the disk is full"):
                put(tmp_path, "bad")
    last = put(tmp_path, "g3")
    for number, tag in zip([*good, last], ("g0", "g1", "g2", "g3"), strict=True):
        publish.rollback(tmp_path, number)
        assert reader.open(tmp_path).choose(3, N, K).tactic == tag


def test_a_rollback_reads_the_files_that_are_kept(tmp_path):
    first = put(tmp_path, "a")
    put(tmp_path, "b")
    for path in tmp_path.glob("ledger.db*"):
        path.unlink()
    number = publish.rollback(tmp_path)
    found = reader.open(tmp_path)
    assert (found.generation, found.choose(3, N, K).tactic) == (number, "a")
    assert found.meta["run"] == "a" and number > first + 1
    assert [row["fingerprint"] for row in found.rows("environment")] == [ENVIRONMENT.fingerprint]


def test_what_is_kept_of_a_probe_on_a_full_disk_is_counted(tmp_path):
    error = Full(tmp_path / state.LEDGER, "the disk is full")
    assert with_what_is_kept(error, tmp_path, ["r"]) is error, "nothing can be said of no ledger"
    with Ledger.open(tmp_path) as ledger:
        run, other = start(ledger), start(ledger)
        ledger.add_all([evidence(run) for _ in range(16)] + [evidence(other)])
    said = str(with_what_is_kept(error, tmp_path, [run]))
    assert "16 rows of this probe's evidence are kept" in said and "\n" not in said


FULL = """
import os, subprocess, sys
from pathlib import Path
from fp4tune.cache.ledger import Ledger
place = Path(sys.argv[1]) / "small"
place.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=True)
Ledger.open(place).close()
room = os.statvfs(place)
left = room.f_bavail * room.f_frsize - 160 * 1024
(place / "filler").write_bytes(b"x" * left)
command = [sys.executable, "-m", "fp4tune.cli", "probe", "--gpu", "none", "--shape", "256,256",
           "--max-m", "1", "--level", "quick", "--backend", "torch-dequant", "--state", str(place)]
done = subprocess.run(command, capture_output=True, text=True)
with Ledger.open(place, readonly=True) as ledger:
    kept = sum(map(len, (ledger.evidence(), ledger.findings(), ledger.timings(),
                         ledger.verdicts())))
sys.stderr.write(done.stderr)
print(done.returncode, kept, done.stderr.strip().splitlines()[-1])
"""


@pytest.mark.slow
def test_a_probe_that_fills_the_disk_says_what_it_kept(tmp_path):
    done = isolated(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    code, kept, line = done.stdout.strip().split(" ", 2)
    assert code == "2" and int(kept) > 0, done.stderr
    assert f" {kept} row" in line and "kept" in line and "Traceback" not in done.stderr
