"""Every command: what it prints, its exit code, and one sentence for everything that goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import stores
from typer.main import get_command

from commands import call
from fp4tune import cli
from fp4tune.cache import state
from fp4tune.cache.ledger import Ledger
from fp4tune.cli import app

PROBE = ["probe", "--gpu", "none", "--shape", "256,256", "--max-m", "1", "--level", "quick"]
COMMANDS = ("probe", "choose", "show", "backends", "doctor")


def sentence(result) -> str:
    """What a refusal said: one line on stderr, nothing on stdout, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fp4tune: "), result.stderr
    return lines[0]


def contents(place) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path):
    """A state directory with a published choice and a ledger."""
    found = tmp_path / "store"
    found.mkdir()
    with Ledger.open(found) as ledger:
        run = stores.start(ledger)
        ledger.add_evidence(stores.evidence(run))
        ledger.finish_run(run)
    stores.put(found)
    return found


# -- bad input

BAD = {
    "unknown backend": (["--backend", "torch-dequnt"], "did you mean torch-dequant"),
    "backend like none": (["--backend", "zzz"], "there are"),
    "no such file": (["--backend", "nowhere.py:thing"], "nowhere.py"),
    "file without a name": (["--backend", "nowhere.py"], "FILE.py:NAME"),
    "unknown preset": (["--preset", "lama-3.1-8b"], "lama-3.1-8b"),
    "unknown level": (["--level", "slow"], "there are quick, standard, soak"),
    "unknown profile": (["--profile", "trt"], "there are strict, sglang, vllm"),
    "unknown format": (["--format", "fp8"], "nvfp4, mxfp4"),
    "unknown activation": (["--activation", "int8"], "bf16, fp4"),
    "unknown dtype": (["--out-dtype", "fp32"], "bf16, fp16"),
    "shape of zeros": (["--shape", "0,0"], "0,0"),
    "shape of words": (["--shape", "abc"], "abc"),
    "shape of one number": (["--shape", "4096"], "4096"),
    "negative shape": (["--shape", "-4,16"], "-4,16"),
    "k off the block": (["--shape", "256,24"], "16"),
    "k off mxfp4's block": (["--shape", "256,48", "--format", "mxfp4"], "32"),
    "m of zero": (["--max-m", "0"], "--max-m 0"),
    "m too large": (["--max-m", "1000000"], "65536"),
    "tp of zero": (["--tp", "0"], "--tp 0"),
    "tp that does not divide": (["--preset", "llama-3.1-8b", "--tp", "7"], "7"),
    "negative seed": (["--seed", "-1"], "--seed -1"),
    "no such interpreter": (["--python", "/nowhere/python"], "no such program"),
    "no such config": (["--model-config", "/nowhere/config.json"], "/nowhere/config.json"),
    "hang of zero": (["--hang-seconds", "0"], "--hang-seconds"),
    "hang without end": (["--hang-seconds", "inf"], "--hang-seconds inf"),
    "hang longer than a clock has": (["--hang-seconds", "3e6"], "at most 86400"),
    "a profile without a name": (["--profile", ""], "there is no profile ''"),
    "a checkpoint without a name": (["--checkpoint", ""], "the checkpoint's name is empty"),
    "experts in other digits": (["--experts", "\u0668,2,64,128"], "is no layer of routed experts"),
    "experts without end": (["--experts", "9" * 5000 + ",2,64,128"], "is no layer of routed"),
    "experts beyond a model": (["--preset", "qwen3-0.6b", "--ep", "2"], "--ep 2: what is named"),
    "negative hang": (["--hang-seconds", "-3"], "--hang-seconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_touches_nothing(name, place):
    arguments, words = BAD[name]
    before = contents(place)
    said = sentence(call(*PROBE, *arguments, "--state", place))
    assert words in said
    assert contents(place) == before


@pytest.mark.parametrize(
    "arguments",
    [["--budget", "0"], ["--gpu", "none", "--max-m", "-3"], ["--max-seconds", "-1"]],
    ids=" ".join,
)
def test_nothing_is_told_of_a_probe_before_its_bad_input(arguments, tmp_path):
    assert arguments[-2] in sentence(call("probe", *arguments, "--state", tmp_path / "new"))


CONFIGS = {
    "not JSON": ("{", "JSON"),
    "not an object": ("[1, 2]", None),
    "another program's": ('{"name": "left-pad", "version": "1.0.0"}', None),
    "numbers that are words": ('{"hidden_size": "big", "intermediate_size": 7}', None),
    "not text": (b"\xff\xfe\x00\x01", None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_used_is_named(name, place, tmp_path):
    text, words = CONFIGS[name]
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(place)
    said = sentence(call(*PROBE, "--model-config", path, "--state", place))
    assert "config.json" in said and (words is None or words in said)
    assert contents(place) == before


def test_a_config_that_is_a_directory_is_refused(place, tmp_path):
    assert str(tmp_path) in sentence(call(*PROBE, "--model-config", tmp_path, "--state", place))


@pytest.mark.parametrize("gpu", ["0", "all", "x"])
@pytest.mark.parametrize("command", [PROBE, ["backends"]], ids=["probe", "backends"])
def test_a_gpu_that_is_not_here_is_refused(command, gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = sentence(call(*command, "--gpu", gpu))
    assert "GPU" in said and "--gpu none" in said


@pytest.mark.parametrize("arguments", [["--backend", "nope"], ["--python", "/nowhere"]])
def test_backends_refuses_what_probe_refuses(arguments):
    sentence(call("backends", "--gpu", "none", *arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, 4096, 2048),
        (1, 0, 2048),
        (1, 4096, 7),
        (1, 4096, 2048, "--format", "fp8"),
        (1, 4096, 2048, "--activation", "int4"),
        (1, 4096, 2048, "--out-dtype", "fp32"),
        (1, 4096, 2048, "--profile", "trt"),
    ],
    ids=str,
)
def test_choose_refuses_a_problem_that_cannot_be(arguments, place):
    sentence(
        call("choose", "--state", place, *("--", *arguments) if arguments[0] < 0 else arguments)
    )


@pytest.mark.parametrize("command", [["choose", "1", "4096", "2048"], ["show"]], ids=str)
@pytest.mark.parametrize("made", [True, False])
def test_without_a_database_the_reader_says_what_to_do(command, made, tmp_path):
    nowhere = tmp_path / "nowhere"
    if made:
        nowhere.mkdir()
    assert "nowhere" in sentence(call(*command, "--state", nowhere))
    assert contents(nowhere) == {} and nowhere.exists() == made
    assert "fp4tune probe" in sentence(call(*command))


# -- a state that cannot be used

READERS = (["choose", "1", "4096", "2048"], ["show"])


def damage(path, how: str) -> None:
    """Make a database newer, foreign, cut off or damaged."""
    if path.name == state.LEDGER:
        with contextlib.closing(__import__("sqlite3").connect(path)) as conn:
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    path.unlink()
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()
    if how == "newer":
        data[60:64] = (999).to_bytes(4, "big")  # SQLite's user_version
    elif how == "foreign":
        data[68:72] = b"XXXX"  # its application_id
    elif how == "not SQLite":
        data = bytearray(b"hello, I am a text file\n" * 100)
    elif how == "cut off":
        data = data[: len(data) // 2]
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["newer", "foreign", "not SQLite", "cut off"])
def test_a_ledger_that_is_not_to_be_touched_is_refused_untouched(how, place):
    damage(place / state.LEDGER, how)
    before = contents(place)
    assert state.LEDGER in sentence(call(*PROBE, "--state", place))
    assert contents(place) == before


@pytest.mark.parametrize("command", READERS, ids=str)
@pytest.mark.parametrize("how", ["newer", "foreign", "not SQLite", "cut off"])
def test_a_choice_that_cannot_be_trusted_is_not_read(how, command, place):
    damage(place / state.CHOICES, how)
    before = contents(place)
    assert state.CHOICES in sentence(call(*command, "--state", place))
    assert contents(place) == before


@pytest.mark.parametrize("how", ["newer", "foreign", "not SQLite"])
def test_a_probe_refuses_early_to_publish_over_what_is_not_its_own(how, place):
    """Before minutes are spent on what could not be stored."""
    damage(place / state.CHOICES, how)
    before = contents(place)
    assert state.CHOICES in sentence(call(*PROBE, "--state", place))
    assert contents(place)[state.CHOICES] == before[state.CHOICES]


def test_a_state_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for command in (PROBE, *READERS):
        assert "file" in sentence(call(*command, "--state", path))
    assert path.read_text() == "mine"


def in_mount(options: str, place, *arguments) -> subprocess.CompletedProcess:
    """Run a command where a file system of its own is mounted on `place`."""
    code = """
        import subprocess, sys
        place, options, *command = sys.argv[1:]
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
        if options.startswith("size"):
            with open(place + "/ballast", "wb", buffering=0) as ballast:
                try:
                    while ballast.write(b"x" * 4096):
                        pass
                except OSError:
                    pass
        sys.exit(subprocess.run([sys.executable, "-m", "fp4tune.cli", *command]).returncode)
    """
    return stores.isolated(code, place, options, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"), [("ro", "cannot be written"), ("size=64k", "disk is full")]
)
def test_a_place_that_takes_nothing_is_refused_before_the_probe_starts(options, words, tmp_path):
    place = tmp_path / "mounted"
    done = in_mount(options, place, *PROBE, "--backend", "torch-dequant", "--state", place)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("fp4tune: ") and words in line


def test_two_probes_of_one_device_do_not_run_at_once(place):
    lock = state.probe_lock(place, "cpu")
    code = """
        import sys
        from fp4tune.cache import state
        with state.exclusive(sys.argv[1]):
            print("held", flush=True)
            sys.stdin.read()
    """
    other = stores.spawn(code, lock, stdin=-1, stdout=-1, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        result = call(*PROBE, "--state", place)
        assert result.exit_code == 2
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("fp4tune: ") and f"process {other.pid} holds" in last
        with Ledger.open(place, readonly=True) as ledger:
            assert [run.status for run in ledger.runs()] == ["finished"]
    finally:
        other.communicate()


# -- what the commands say


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A small real probe through the command, as JSON."""
    place = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        done = call(
            *PROBE, "--activation", "bf16", "--backend", "torch-dequant",
            "--backend", "marlin", "--seed", 3, "--state", place, "--json",
        )  # fmt: skip
    return place, done


def test_a_probe_says_as_json_what_it_stored(probed):
    place, done = probed
    assert done.exit_code == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert {
        "run", "seed", "device", "generation", "choices", "candidates", "findings",
        "unsupported", "broken", "build_seconds",
    } <= set(report)  # fmt: skip
    assert report["seed"] == 3 and report["generation"] == 1
    assert report["device"]["arch"] == "cpu"
    assert "marlin" in report["unsupported"]
    assert [c["backend"] for c in report["choices"]] == ["torch-dequant"] * 2


def test_a_probe_tells_its_progress_on_stderr_only(probed):
    _, done = probed
    assert "seed 3" in done.stderr and "layer 1/1" in done.stderr


def test_choose_answers_as_json(probed):
    place, _ = probed
    done = call("choose", 1, 256, 256, "--state", place, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {
        "backend", "tactic", "status", "conditions", "median_us", "launches", "m_lo", "m_hi",
        "reason", "generation", "fingerprint", "failure_bound_95", "problem",
    } <= set(answer)  # fmt: skip
    assert (answer["status"], answer["backend"]) == ("safe", "torch-dequant")


def test_choose_answers_a_person_in_a_line(probed):
    place, _ = probed
    done = call("choose", 1, 256, 256, "--state", place)
    first, second, *_ = done.stdout.splitlines()
    assert done.exit_code == 0 and first.startswith("SAFE since ")
    assert second.startswith("m=1 n=256 k=256 nvfp4: torch-dequant")


def test_choose_does_not_know_what_was_not_probed(probed):
    place, _ = probed
    for problem in ((2, 256, 256), (1, 512, 256), (1, 256, 256, "--format", "mxfp4")):
        done = call("choose", *problem, "--state", place)
        assert done.exit_code == 2 and "unproven" in done.stdout


def test_show_prints_everything_that_is_stored(probed):
    place, _ = probed
    done = call("show", "--state", place, "--json")
    stored = json.loads(done.stdout)
    assert {
        "generation", "meta", "choices", "candidates", "environments", "findings", "runs",
    } <= set(stored)  # fmt: skip
    assert [run["status"] for run in stored["runs"]] == ["finished"]
    assert stored["runs"][0]["seed"] == 3
    for options in ([], ["--findings"]):
        text = call("show", "--state", place, *options)
        assert text.exit_code == 0 and "torch-dequant" in text.stdout


def test_reading_changes_nothing(probed):
    place, _ = probed
    before = contents(place)
    call("show", "--state", place)
    call("choose", 1, 256, 256, "--state", place)
    call("doctor", "--state", place)
    assert contents(place) == before


def test_backends_says_what_runs_here():
    done = call("backends", "--gpu", "none", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["arch"] == "cpu"
    rows = {row["name"]: row for row in found["backends"]}
    assert rows["torch-dequant"]["status"] == "supported"
    assert rows["torch-dequant"]["formats"] == ["nvfp4", "mxfp4"]
    assert rows["marlin"]["status"] == "unsupported" and rows["marlin"]["reason"]
    assert rows["torch-bf16-resident"]["reference_line"] is True
    assert rows["torch-experts"]["status"] == "supported" and rows["torch-experts"]["experts"]
    for name in ("marlin-experts", "vllm-marlin-experts", "humming-masked", "vllm-ogs"):
        assert rows[name]["status"] == "unsupported" and "CUDA" in rows[name]["reason"]


def test_doctor_as_json_is_a_list_of_lines(tmp_path):
    done = call("doctor", "--state", tmp_path, "--json")
    lines = json.loads(done.stdout)
    assert done.exit_code in (0, 2)
    assert all(set(line) == {"status", "what", "found", "do"} for line in lines)
    assert {"python", "torch", "state", "GPU"} <= {line["what"] for line in lines} | {"GPU"}
    assert "torch" in call("doctor", "--state", tmp_path).stdout


def test_the_version_is_printed():
    done = call("--version")
    assert done.exit_code == 0 and done.stdout.startswith("fp4tune ")


# -- help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    command = get_command(app).commands[name]
    assert command.help
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, f"{name} {option.name}"
    assert call(name, "--help").exit_code == 0


def test_every_command_is_tried_here():
    known = get_command(app).commands
    assert set(COMMANDS) <= set(known)
    assert all(command.help for command in known.values())


def test_help_needs_no_torch():
    """``fp4tune --help`` answers at once, also where torch is broken."""
    code = "import sys; sys.modules['torch'] = None; from fp4tune.cli import main; main()"
    command = [sys.executable, "-c", code, "probe", "--help"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--max-m" in done.stdout, done.stderr


def test_a_fault_of_ours_is_told_whole_and_is_no_verdict(monkeypatch, capsys):
    def fails(prog_name):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(cli, "contain", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2, "1 is a verdict"
    assert "ZeroDivisionError: ours" in capsys.readouterr().err
