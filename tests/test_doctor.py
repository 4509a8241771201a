"""The doctor says what is here, changes nothing, and calls bad only what must be mended."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess

import pytest
import stores
from stores import spawn

from fp4tune.autotune import doctor
from fp4tune.cache import state


def lines(place=None):
    return {line.what: line for line in doctor.examine(place)}


def test_nothing_is_made_by_looking(tmp_path):
    lines(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_every_line_that_is_not_good_says_what_to_do(tmp_path):
    for line in doctor.examine(tmp_path):
        assert line.status in ("good", "note", "bad")
        assert line.found and (line.do or line.status == "good")
        assert set(line.json()) == {"status", "what", "found", "do"}


def test_a_published_choice_is_found(tmp_path):
    stores.put(tmp_path)
    found = lines(tmp_path)["choices.db"]
    assert found.status == "good" and "generation 1, 3 choices" in found.found


@pytest.mark.parametrize(("mode", "who"), [(0o777, "everyone"), (0o775, "a group"), (0o755, "")])
def test_a_state_that_others_may_write_is_bad(tmp_path, mode, who):
    tmp_path.chmod(mode)
    line = lines(tmp_path)["state"]
    assert (line.status == "bad") == bool(who) and who in line.found


def test_a_place_without_a_choice_is_a_note(tmp_path):
    assert lines(tmp_path)["choices.db"].status == "note"


def test_a_damaged_choice_is_bad(tmp_path):
    stores.put(tmp_path)
    path = tmp_path / state.CHOICES
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    found = lines(tmp_path)["choices.db"]
    assert found.status == "bad" and found.do


def test_another_program_s_database_is_bad(tmp_path):
    conn = sqlite3.connect(tmp_path / state.CHOICES)
    conn.execute("CREATE TABLE theirs (x)")
    conn.close()
    assert lines(tmp_path)["choices.db"].status == "bad"


def test_several_places_that_hold_a_choice_are_named(tmp_path, monkeypatch):
    places = [tmp_path / "one", tmp_path / "home" / "fp4tune"]
    for place in places:
        stores.put(place)
    monkeypatch.delenv(state.VARIABLE)
    monkeypatch.setattr(state, "SYSTEM", str(places[0]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    found = [line for line in doctor.examine() if "several places" in line.found]
    assert len(found) == 1 and all(str(place) in found[0].found for place in places)


@pytest.mark.parametrize(("value", "bad"), [("1", True), ("0", False), ("", False)])
def test_blocking_launches_hide_races(monkeypatch, value, bad):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", value)
    assert ("CUDA_LAUNCH_BLOCKING" in lines()) == bad


def test_a_missing_compiler_is_a_note_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("g++", "nvcc"):
        assert lines()[name].status == "note" and lines()[name].do


def test_a_place_that_cannot_be_written_is_bad(tmp_path):
    if os.geteuid():
        tmp_path.chmod(0o555)
        assert lines(tmp_path)["state"].status == "bad"
        return
    # Root writes anywhere but on a disk that is read-only.
    code = """
        import subprocess, sys
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", sys.argv[1]], check=True)
        from pathlib import Path
        from fp4tune.autotune import doctor
        print({line.what: line.status for line in doctor.examine(Path(sys.argv[1]))}["state"])
    """
    done = stores.isolated(code, tmp_path)
    assert done.stdout.strip() == "bad", done.stderr


UNREADABLE = """
import os, sys
from pathlib import Path
from typer.testing import CliRunner
from fp4tune.cache import state
from fp4tune.cli import app

home = Path(sys.argv[1], "hidden", "home")
state.SYSTEM = "/proc/nowhere/fp4tune"
for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "FP4TUNE_STATE", "HF_HOME"):
    os.environ.pop(name, None)
os.environ["HOME"] = str(home)
assert not os.access(home.parent, os.R_OK), "this process may read everything"
for words in (
    ("doctor",), ("show",), ("choose", 1, 128, 256), ("quarantine", "list"), ("forget", "--list"),
    ("backends", "--gpu", "none", "--backend", "torch-dequant"), ("layers", "nobody/nothing"),
    ("check-weights", "nobody/nothing"), ("export", "--out", "x.zip"),
):
    answer = CliRunner().invoke(app, [str(word) for word in words])
    known = answer.exception is None or isinstance(answer.exception, SystemExit)
    print(words[0], answer.exit_code, known, str(home.parent) in answer.output, flush=True)
"""


@pytest.mark.slow
def test_a_home_that_cannot_be_read_is_a_sentence_in_every_command(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o000)
    prefix: tuple[str, ...] = ()
    if os.getuid() == 0:  # whom no mode keeps out
        os.chown(hidden, 65534, 65534)
        rights = "=-dac_override,-dac_read_search"
        prefix = ("setpriv", f"--bounding-set{rights}", f"--inh-caps{rights}")
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with spawn(UNREADABLE, tmp_path, prefix=prefix, **pipes) as other:
        out, error = other.communicate(timeout=200)
    hidden.chmod(0o700)
    assert other.returncode == 0, error
    said = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert len(said) == 9 and {known for _, known, _ in said.values()} == {"True"}, out
    assert said["doctor"] == ["2", "True", "True"], "it says which folder"
    assert said["layers"][0] == said["check-weights"][0] == "2"
