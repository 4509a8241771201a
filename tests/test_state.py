"""Where the state is looked for, and locks between processes."""

from __future__ import annotations

import os
import subprocess

import pytest
from stores import spawn

from fp4tune.cache import state
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


def test_a_reader_takes_the_first_place_that_holds_a_choice(places):
    assert state.holding() == []
    for place in places:
        place.mkdir(parents=True)
        (place / state.LEDGER).touch()  # a ledger alone is nothing to read
    assert state.holding() == []
    (places[2] / state.CHOICES).touch()
    assert state.holding() == [places[2]]
    (places[0] / state.CHOICES).touch()
    assert state.holding() == [places[0], places[2]]


def test_one_place_named_twice_is_one_place(places, monkeypatch):
    places[1].mkdir()
    (places[1] / state.CHOICES).touch()
    monkeypatch.setenv("FP4TUNE_STATE", f"{places[1]}/../system")
    assert state.holding() == [places[1]]


def test_two_probes_of_one_gpu_exclude_each_other_and_say_so(tmp_path):
    path = state.probe_lock(tmp_path, "GPU-1234/../x")
    assert os.path.dirname(path) == str(tmp_path)
    code = """
        import sys
        from fp4tune.cache import state
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
        from fp4tune.cache import state
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
