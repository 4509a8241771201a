"""Where the state is looked for, and locks between processes."""

from __future__ import annotations

import os
import subprocess

import pytest
from stores import put, spawn

from commands import call
from fp4tune.cache import facts, reader, state
from fp4tune.cache.errors import Busy, Full, Missing, ReadOnly, StateError, translate


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The three places of a reader, none of which exists yet."""
    found = [tmp_path / name for name in ("named", "system", "home/fp4tune")]
    monkeypatch.setenv("FP4TUNE_STATE", str(found[0]))
    monkeypatch.setattr(state, "SYSTEM", str(found[1]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return found


def test_a_writer_takes_what_it_is_told_then_the_variable_then_the_system(places, monkeypatch):
    assert state.directory("/explicit") == state.directory("/explicit").parent / "explicit"
    assert state.directory() == places[0]
    monkeypatch.delenv("FP4TUNE_STATE")
    assert state.directory() == places[1]  # can be made
    places[1].mkdir()
    assert state.directory() == places[1]
    monkeypatch.setattr(state, "SYSTEM", "/no/such/folder/fp4tune")
    assert state.directory() == places[2]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert str(state.directory()) == "/somebody/.local/state/fp4tune"


def test_a_reader_takes_the_first_place_that_holds_a_choice(places, monkeypatch):
    monkeypatch.delenv("FP4TUNE_STATE")
    assert state.holding() == []
    for place in places:
        place.mkdir(parents=True)
        (place / state.LEDGER).touch()  # a ledger alone is nothing to read
    assert state.holding() == []
    (places[2] / state.CHOICES).touch()
    assert state.holding() == [places[2]]
    (places[1] / state.CHOICES).touch()
    assert state.holding() == [places[1], places[2]]


def test_one_place_named_twice_is_one_place(places, monkeypatch):
    places[1].mkdir()
    (places[1] / state.CHOICES).touch()
    monkeypatch.setenv("FP4TUNE_STATE", f"{places[1]}/../system")
    assert state.holding() == [places[1]]
    monkeypatch.delenv("FP4TUNE_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(places[1].parent))
    monkeypatch.setattr(state, "SYSTEM", str(places[1].parent / "fp4tune"))
    places[1].rename(places[1].parent / "fp4tune")
    assert len(state.holding()) == 1


# -- a place that was named


@pytest.mark.parametrize("what", ["missing", "empty", "a ledger alone", "a file"])
@pytest.mark.parametrize("how", ["variable", "argument"])
def test_a_named_place_is_final_for_readers_and_writers(places, monkeypatch, what, how):
    for other in places[1:]:
        put(other)
    if what == "a file":
        places[0].write_text("")
    elif what != "missing":
        places[0].mkdir()
    if what == "a ledger alone":
        (places[0] / state.LEDGER).touch()
    named = None if how == "variable" else str(places[0])
    if how == "argument":
        monkeypatch.delenv("FP4TUNE_STATE")
    assert how == "argument" or state.holding() == []
    assert state.directory(named) == places[0]
    with pytest.raises(StateError) as caught:
        reader.open(named)
    assert str(places[0]) in str(caught.value) and caught.value.exit_code == 2
    assert reader.choose(1, 4096, 2048).status != "safe" or how == "argument"
    found = facts.gather(named)
    assert found["status"] in ("missing", "unreadable") and str(places[0]) in found["reason"]
    asked = ["--state", named] if named else []
    for command in (["choose", "1", "4096", "2048"], ["show"], ["facts", "--check"]):
        said = call(*command, *asked)
        assert said.exit_code == 2, said.output
        assert str(places[0]) in said.output and not said.stdout.startswith("safe")
    # And what a writer puts there is what is read, whatever other places hold.
    if what in ("missing", "empty"):
        put(places[0], "mine")
        assert reader.open(named).path == str(places[0] / state.CHOICES)


@pytest.mark.parametrize("places_that_hold", [(), (1,), (2,), (1, 2)])
def test_where_none_is_named_the_sentence_says_what_was_looked_at(
    places, monkeypatch, places_that_hold
):
    monkeypatch.delenv("FP4TUNE_STATE")
    for place in places_that_hold:
        put(places[place])
    if places_that_hold:
        assert reader.open().path == str(places[places_that_hold[0]] / state.CHOICES)
        return
    with pytest.raises(Missing) as caught:
        reader.open()
    assert all(str(place) in str(caught.value) for place in places[1:])
    assert "fp4tune probe" in str(caught.value) and "--state" in str(caught.value)


def test_two_probes_of_one_gpu_exclude_each_other_and_say_so(tmp_path):
    path = state.probe_lock(tmp_path, "GPU-1234/../x")
    assert os.path.dirname(path) == str(tmp_path / state.LOCKS)
    code = """
        import sys
        from fp4tune.cache import facts, reader, state
        with state.exclusive(sys.argv[1]):
            print("held", flush=True)
            sys.stdin.read()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = spawn(code, path, **pipes)
    assert holder.stdout.readline() == b"held\n"
    assert state.held(path)
    with pytest.raises(Busy, match=f"process {holder.pid} holds the probe of cuda:0") as caught:
        state.exclusive(path, "the probe of cuda:0").acquire()
    assert caught.value.pid == holder.pid and caught.value.exit_code == 2
    with state.exclusive(state.probe_lock(tmp_path, "GPU-5678")):
        pass  # another GPU is free
    holder.kill()
    holder.communicate()
    assert not state.held(path)
    with state.exclusive(path), pytest.raises(Busy):
        state.exclusive(path).acquire()  # not twice in one process either


def test_a_lock_can_be_waited_for(tmp_path):
    code = """
        import sys, time
        from fp4tune.cache import facts, reader, state
        with state.exclusive(sys.argv[1]):
            print("held", flush=True)
            time.sleep(0.3)
    """
    holder = spawn(code, tmp_path / "lock", stdout=subprocess.PIPE)
    holder.stdout.readline()
    with state.exclusive(tmp_path / "lock", wait=20):
        assert holder.wait(20) == 0
    holder.stdout.close()


def test_a_lock_nobody_ever_took_is_not_held(tmp_path):
    assert not state.held(tmp_path / "nothing")
    with pytest.raises(Missing):
        state.exclusive(tmp_path / "no" / "folder").acquire()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), Full),
        (OSError(30, "Read-only file system"), ReadOnly),
        (FileNotFoundError(2, "No such file"), Missing),
        (OSError(5, "Input/output error"), StateError),
    ],
)
def test_the_operating_system_s_refusals_become_sentences(error, kind):
    found = translate(error, "/some/ledger.db")
    assert type(found) is kind and str(found).startswith("/some/ledger.db: ")
    assert found.exit_code == 2
