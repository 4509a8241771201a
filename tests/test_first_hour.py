"""The first hour: what a new user is told, in what order, and what every mistake comes to."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import engine_store
import levels
import pytest
import stores
from hypothesis import given
from hypothesis import strategies as st

from commands import call
from fp4tune.autotune import demonstration, doctor
from fp4tune.autotune.forecast import Forecast, Pace, forecast, in_words
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.plan import Plan, Report
from fp4tune.autotune.publication.published import Publication
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import facts, facts_text, publish, quarantine, quarantine_store, state
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment, Finding, Probed, Stamp
from fp4tune.commands._help import GROUPS
from fp4tune.engines import here as engine_here
from fp4tune.engines import interpreter
from fp4tune.engines import select as engine_select
from fp4tune.machine import devices
from fp4tune.machine.device import Device
from fp4tune.machine.hardware import cpu_name
from fp4tune.probes.problem import Problem
from fp4tune.report import brief, roofline
from fp4tune.report.page import node
from fp4tune.words import STATUS_WORDS

B = stores.BUCKET
LAYER = (B.format, B.activation, B.out_dtype, B.groups, B.n, B.k)
PROBE = (
    "probe", "--gpu", "none", "--max-m", "1", "--level", "quick", "--activation", "bf16",
    "--backend", "torch-dequant",
)  # fmt: skip


def put(place: Path, stamps=(), status="safe", **other) -> Path:
    """A published choice of three buckets, for this CPU so that it is of this host."""
    choices, candidates = stores.rows_for("a", gpu=cpu_name())
    environment = replace(stores.ENVIRONMENT, arch="cpu", stamps=tuple(stamps))
    choices = [replace(c, arch="cpu", status=status, **other) for c in choices]
    verdict = "safe" if status == "safe" else "unsafe"
    rank = 0 if status == "safe" else None
    candidates = [replace(c, arch="cpu", verdict=verdict, rank=rank) for c in candidates]
    publish.publish(place, choices, candidates, [environment], {"run": "a"})
    return place


def stale(place: Path) -> Path:
    file = place.parent / f"{place.name}-kernel.so"
    file.write_bytes(b"was")
    found = state.file_stamp(str(file))
    put(place, [Stamp(str(file), *found)])
    os.utime(file, (1_700_000_000, 1_700_000_000))
    return place


def quarantined(place: Path) -> Path:
    put(place)
    entry = quarantine.make("marlin", quarantine.Reach(1, B.n, B.k), reason="NaN in the logits")
    quarantine_store.write(entry, quarantine_store.place(place))
    return place


def damaged(place: Path) -> Path:
    put(place)
    path = place / state.CHOICES
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    return place


STATES = {
    "SAFE": (put, ""),
    "STALE": (stale, "fp4tune probe --gpu none --profile strict --shape 4096,2048"),
    "UNPROVEN": (lambda place: put(place, status="none"), "fp4tune explain 64 4096 2048"),
    "QUARANTINED": (quarantined, "fp4tune quarantine list"),
    "DAMAGED": (damaged, "fp4tune probe"),
}


# -- one status


@pytest.mark.parametrize("word", STATES)
def test_one_function_decides_what_a_node_is_since_when_and_what_to_do(word, tmp_path):
    make, do = STATES[word]
    place = make(tmp_path / "s")
    found = facts.gather(place)
    do += f" --state {place}" if do.startswith("fp4tune ") else ""
    assert STATUS_WORDS[found["status"]] == word
    assert (found["do"], found["elsewhere"]) == (do, None)
    assert found["since"] is not None and found["reason"]
    first, *rest = facts_text.headline(found)
    assert re.match(rf"{word} since \d{{4}}-\d\d-\d\d \d\d:\d\d UTC: ", first)
    assert rest == ([f"now: {do}"] if do else [])
    layer = facts.of_layer(found, LAYER)
    assert layer is None if word == "DAMAGED" else STATUS_WORDS[layer["status"]] == word


def test_a_stale_choice_is_stale_since_its_file_changed(tmp_path):
    assert facts.gather(stale(tmp_path / "s"))["since"] == 1_700_000_000


def test_a_whole_is_as_bad_as_its_worst_layer_and_says_which(tmp_path):
    choices, candidates = stores.rows_for("a", layers=2, gpu=cpu_name())
    choices = [
        replace(c, arch="cpu", status="none" if c.bucket.n != B.n else "safe") for c in choices
    ]
    candidates = [replace(c, arch="cpu") for c in candidates]
    publish.publish(tmp_path, choices, candidates, [stores.ENVIRONMENT], {"run": "a"})
    found = facts.gather(tmp_path)
    assert found["status"] == "unproven" and "n=4160 k=2048" in found["reason"]
    (scope,) = found["scopes"]
    assert [layer["status"] for layer in scope["by_layer"]] == ["safe", "unproven"]


COMMANDS = {
    "show": ["show"],
    "choose": ["choose", 1, B.n, B.k],
    "explain": ["explain", 1, B.n, B.k],
    "doctor": ["doctor"],
    "facts": ["facts"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", [w for w in STATES if w != "DAMAGED"])
def test_every_command_begins_with_the_same_status(word, command, tmp_path):
    place = STATES[word][0](tmp_path / "s")
    done = call(*COMMANDS[command], "--state", place)
    assert done.stdout.startswith(f"{word} since "), done.output


def test_the_page_and_its_command_begin_with_it_too(tmp_path):
    place = quarantined(tmp_path / "s")
    done = call("report", "--state", place, "--html", tmp_path / "page.html")
    assert done.exit_code == 0 and done.stdout.startswith("QUARANTINED since ")
    page = (tmp_path / "page.html").read_text()
    main = page[page.index("<main") :]
    assert main.index('id="status"') < main.index('class="facts"')
    box = main[: main.index("</section>")]
    assert ">QUARANTINED</h2>" in box and "<code>fp4tune quarantine list --state " in box


def test_damaged_choices_are_called_so(tmp_path):
    place = damaged(tmp_path / "s")
    for command in (["show"], ["choose", 1, B.n, B.k], ["explain", 1, B.n, B.k]):
        done = call(*command, "--state", place)
        assert done.exit_code == 2 and done.stderr.startswith("fp4tune: DAMAGED: "), done.output


@pytest.mark.parametrize("how", ["cut off", "inside"])
def test_a_damaged_ledger_is_not_a_missing_one(how, tmp_path):
    place = put(tmp_path / "s")
    assert "No findings." in call("show", "--state", place).stdout
    ledger = place / state.LEDGER
    data = bytearray(ledger.read_bytes())
    if how == "cut off":
        ledger.write_bytes(data[: len(data) // 2])
    else:
        data[4096 * 3 : 4096 * 5] = b"\xff" * 8192
        ledger.write_bytes(data)
    for suffix in ("-wal", "-shm"):
        ledger.with_name(ledger.name + suffix).unlink(missing_ok=True)
    shown = call("show", "--state", place).stdout
    assert shown.startswith("SAFE") and "No findings." not in shown
    assert "unreadable" in shown and state.LEDGER in shown
    line = next(x for x in doctor.examine(place) if x.what == "ledger.db")
    assert line.status == "bad" and line.found.startswith("DAMAGED")
    call("report", "--state", place, "--html", tmp_path / "page.html")
    assert "DAMAGED ledger" in (tmp_path / "page.html").read_text()
    ledger.unlink()
    assert "No findings are kept here" in call("show", "--state", place).stdout
    assert not [x for x in doctor.examine(place) if x.what == "ledger.db"]


def gpus(folder: Path, **models: str) -> str:
    """As the driver lists GPUs in /proc: UUID to model."""
    for number, (uuid, model) in enumerate(models.items()):
        there = folder / f"0000:{number:02x}:00.0"
        there.mkdir(parents=True)
        (there / "information").write_text(
            f"Model: \t\t {model}\nIRQ:   \t\t 24\nGPU UUID: \t {uuid.replace('_', '-')}\n"
        )
    return str(folder)


@pytest.mark.parametrize(
    ("driver", "there", "devices", "elsewhere"),
    [
        (None, {}, [], "no NVIDIA driver is loaded"),
        ("580", {"GPU_1": "NVIDIA B200"}, [], "the GPUs here are NVIDIA B200"),
        ("580", {"GPU_1": "NVIDIA H200"}, [], None),
        ("580", {"GPU_1": "NVIDIA H200"}, ["GPU-1", "GPU-2"], None),
        ("580", {"GPU_3": "NVIDIA H200"}, ["GPU-1", "GPU-2"], "others of that model"),
        ("580", {}, ["GPU-1"], None),
    ],
)
def test_a_store_of_another_host_says_so(driver, there, devices, elsewhere, tmp_path):
    choices, candidates = stores.rows_for("a", gpu="NVIDIA H200")
    environment = Environment("f" * 64, "marlin", "sm90", {}, (Stamp("/nowhere/a.so", 1, 2, 3),))
    meta = {"run": "a", "devices": devices}
    publish.publish(tmp_path / "s", choices, candidates, [environment], meta)
    version = tmp_path / "version"
    if driver:
        version.write_text(driver)
    listed = gpus(tmp_path / "gpus", **there)
    found = facts.gather(tmp_path / "s", driver=str(version), gpus=listed)
    assert found["status"] == "stale"
    if elsewhere is None:
        assert found["elsewhere"] is None
    else:
        assert elsewhere in found["elsewhere"]
        assert "3 of 3 buckets had a safe choice when it was published" in found["reason"]


# -- a probe that tells

TARGET = devices.Target(Device("cuda", 90, 0), "NVIDIA H200", "GPU-1")


def report(layers: int, broken: int = 0, profile: str = "sglang") -> tuple[Report, dict]:
    """A report of many layers, in which marlin is chosen beside a slower default."""
    choices, candidates, findings = [], [], []
    for layer in range(layers):
        for m in (1, 16):
            bucket = BucketKey("nvfp4", "bf16", "bf16", 1, m, m, 4096 + 64 * layer, 2048)
            head = ("sm90", "NVIDIA H200", profile, bucket)
            for name, us, verdict, rank in (
                ("flashinfer-cutlass", 10.0, "safe", 0),
                ("marlin", 13.1, "safe", 1),
                ("torch-dequant", 100.0, "safe", 2),
                ("tail", 5.0, "unsafe", None),
                ("hangs", None, "unsafe", None),
            ):
                row = Candidate(*head, name, "default", name, verdict, rank, us)
                if us:
                    row = replace(row, lo_us=us - 0.1, hi_us=us + 0.1)
                candidates.append(row)
            choices.append(
                Choice(
                    *head,
                    "flashinfer-cutlass",
                    "default",
                    "x",
                    "safe",
                    (),
                    10.0,
                    30,
                    20,
                    default_backend="marlin",
                )  # fmt: skip
            )
            what = ("run", "f" * 64)
            for name, kind, regime in (("tail", "unwritten", "serial"), ("hangs", "hang", "graph")):
                findings.append(
                    Finding(*what, name, "default", bucket, {}, kind, regime, "exact", 1)
                )
    found = Report("run-1", 7, TARGET, choices, [], candidates, findings)
    found.broken = {f"broken-{i}": "crash while building" for i in range(broken)}
    found.generation = 3
    status = {"status": "safe", "since": 1_700_000_000.0, "reason": "all", "state": "/s"}
    return found, status


@pytest.mark.parametrize("layers", [1, 3, 40])
@pytest.mark.parametrize("broken", [0, 2])
def test_the_end_of_a_probe_is_ten_lines_with_what_matters_first(layers, broken):
    found, status = report(layers, broken)
    lines = brief.lines(found, status, "fp4tune emit sglang")
    assert len(lines) <= 10
    assert lines[0].startswith("SAFE since 2023-11-14 22:13 UTC: ")
    assert "flashinfer-cutlass, 1.31 times as fast as sglang's default, marlin" in lines[1]
    bad = [line for line in lines if line.startswith("unsafe: ")]
    assert [line.split()[1] for line in bad] == ["hangs", "tail"]
    assert "never comes back (graph; m=1-16)" in bad[0]
    assert lines[-1] == "next: fp4tune emit sglang" and "/s as generation 3" in lines[-2]
    if layers > 10:
        assert any("more layers" in line for line in lines)


def test_what_is_not_told_apart_is_said_in_one_line_and_counts_as_equal():
    found, status = report(1)
    found.candidates = [
        replace(c, lo_us=1.0, hi_us=200.0) if c.rank is not None else c for c in found.candidates
    ]
    lines = brief.lines(found, status, "x")
    assert sum("not told apart in 2 of 2" in line for line in lines) == 1
    assert "as fast as sglang's default, marlin, as far as that can be told" in lines[1]


@given(st.integers(1, 12), st.lists(st.floats(0.1, 100), min_size=12, max_size=12))
def test_a_bar_never_goes_back_and_learns_from_layers(layers, seconds):
    pace = Pace(Forecast(10.0, 5.0, layers))
    now, shown = 0.0, []
    for number in range(1, layers + 1):
        assert pace.layer(number, layers, now) and not pace.layer(number, layers, now)
        for part in range(3):
            shown.append(pace.share(now + seconds[number - 1] * part / 3))
        assert pace.left(now) > 0
        now += seconds[number - 1]
    assert shown == sorted(shown) and shown[0] >= 0 and shown[-1] < 1
    assert pace.taken == pytest.approx(seconds[: layers - 1])


def test_a_forecast_keeps_to_the_budget_and_says_times_as_one_does():
    assert Forecast(10.0, 50.0, 4, budget=60.0).seconds == 60.0
    words = [in_words(s) for s in (0.2, 8.4, 33, 250, 7000)]
    assert words == ["1 s", "8 s", "35 s", "4 min", "1.9 h"]


def environment(**other: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **other}


def end(place: Path, number: signal.Signals) -> tuple[int, str]:
    """A probe of three layers on a terminal, ended in the second; exit code and what it said."""
    shapes = [f"--shape={n},256" for n in (256, 128, 64)]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", levels.program("brief"), *PROBE, *shapes, "--state", str(place)],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env=environment(OMP_NUM_THREADS="1", TERM="xterm", COLUMNS="200"),
        # Shells have what they start behind them ignore it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    said, sent, deadline = b"", False, time.monotonic() + 270
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                said += os.read(leader, 65536)
            except OSError:
                break
        if not sent and b"layer 2/3" in said:
            process.send_signal(number)
            sent = True
    assert sent, said.decode(errors="replace")
    code = process.wait(60)
    os.close(leader)
    return code, said.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM],
    ids=lambda n: n.name,
)
def test_a_probe_that_is_ended_says_what_is_kept_and_gives_the_cursor_back(number, tmp_path):
    code, said = end(tmp_path / "s", number)
    assert code == 2 and "Traceback" not in said
    assert "%" in said and "left" in said
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l") >= 0
    assert re.search(r"interrupted.*run the same command again: [12] of 3 layers known", said)
    with Ledger.open(tmp_path / "s", readonly=True) as ledger:
        assert [run.status for run in ledger.runs()] == ["interrupted"]
        assert ledger.findings() == []


@pytest.mark.slow
def test_the_demonstration_catches_the_examples_and_points_on(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cli", "probe", "--state", str(tmp_path / "s")],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "demonstration" in done.stderr and "What a GPU adds" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 10 and lines[0].startswith("SAFE since ")
    for name in ("example-tail leaves outputs unwritten", "example-scratch gives wrong results"):
        assert any(line.startswith(f"unsafe: {name}") for line in lines)
    assert "report --html" in lines[-1], time.monotonic() - began


def test_the_demonstration_has_what_it_names():
    specs = [spec.partition(":")[0] for spec in demonstration.backends()[1:]]
    assert specs and all(Path(spec).is_file() for spec in specs)
    assert demonstration.recorded() is not None


def test_a_recorded_run_can_be_explored_where_there_is_no_gpu(tmp_path):
    place = demonstration.recorded()
    done = call("show", "--state", place)
    assert done.exit_code == 0 and "this is another host" in done.stdout
    assert "102 of 102 buckets had a safe choice" in done.stdout and "14336" in done.stdout
    done = call("report", "--state", place, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert done.exit_code == 0 and "42 % of the roofline" in page
    assert "STALE on this host</h2>" in page and "had a safe choice when it was published" in page
    assert "a failure rate below" in page


def test_a_roofline_is_that_of_the_weights_for_few_rows():
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 1, 14336, 4096)
    assert roofline.least_us("NVIDIA H200", bucket) == pytest.approx(6.9, abs=0.05)
    assert roofline.share("NVIDIA H200", bucket, 16.3) == pytest.approx(0.42, abs=0.005)
    many = replace(bucket, m_lo=4096, m_hi=4096)
    flops = 2 * 4096 * 14336 * 4096 / 989e12 * 1e6
    assert roofline.least_us("NVIDIA H200", many) == pytest.approx(flops)
    for gpu in ("AMD EPYC", "NVIDIA H200 MIG 1g.18gb", "NVIDIA T4"):
        assert roofline.share(gpu, bucket, 16.3) is None
    assert roofline.share("NVIDIA H200", bucket, float("nan")) is None


# -- width, pipes, help, mistakes


@pytest.mark.parametrize("columns", [40, 80, 132])
def test_tables_are_as_wide_as_is_said_and_end_where_their_text_does(columns, tmp_path):
    place = tmp_path / "s"
    choices, candidates = stores.rows_for("a")
    more = [replace(c, backend=f"a-backend-of-a-long-name-{i}") for c in candidates for i in (1, 2)]
    publish.publish(place, choices, [*candidates, *more], [stores.ENVIRONMENT], {"run": "a"})
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cli", "show", "--state", str(place)],
        env=environment(COLUMNS=str(columns)), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines
    assert [line for line in lines if line != line.rstrip()] == []
    assert max(map(len, lines)) <= max(columns, 80)
    assert any(line.split()[:2] == ["17-64", "marlin"] for line in lines)
    assert "…" not in done.stdout


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_change_no_exit_code(redirection, tmp_path):
    place = put(tmp_path / "s", status="none")
    words = f"{sys.executable} -m fp4tune.cli choose 1 {B.n} {B.k} --state {place} {redirection}"
    done = subprocess.run(["bash", "-c", words], env=environment(), capture_output=True, timeout=60)
    assert done.returncode == 1 and b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_closed_pipe_is_no_verdict(tmp_path):
    place = put(tmp_path / "s", status="none")
    for command, code in ((["show"], 0), (["choose", "1", str(B.n), str(B.k)], 1)):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-m", "fp4tune.cli", *command, "--state", str(place)],
            env=environment(), stdout=writing, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
        os.close(writing)
        assert (done.returncode, done.stderr) == (code, b"")


def test_what_cannot_be_printed_is_not_answered(tmp_path):
    place = put(tmp_path / "s")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fp4tune.cli", "show", "--state", str(place)],
            env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_help_has_every_command_in_a_group_and_nothing_cut_off(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = call("--help").stdout
    assert max(map(len, text.splitlines())) <= 80 and "..." not in text.split("Options:")[1]
    titles = [f"{title}:" for title, _ in GROUPS]
    assert [line for line in text.splitlines() if line in titles] == titles
    import typer.main

    from fp4tune import cli

    grouped = [name for _, names in GROUPS for name in names]
    commands = typer.main.get_command(cli.app).commands
    assert sorted(grouped) == sorted(commands)
    for name in grouped:
        lines = call(name, "--help").stdout.splitlines()
        assert max(map(len, lines)) <= 80, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["probe", "--level", "slow", "--gpu", "none"], "quick, standard, soak"),
        (["probe", "--help"], "[quick|standard|soak]"),
        (["emit", "--help"], "[strict|sglang|vllm]"),
        (["choose", "--help"], "[nvfp4|mxfp4]"),
    ],
)
def test_choices_are_listed(words, said):
    assert said in call(*words).output


COMPLETES = {
    "bash": lambda words: {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    "zsh": lambda words: {"_TYPER_COMPLETE_ARGS": words},
}


@pytest.mark.parametrize("shell", COMPLETES)
@pytest.mark.parametrize("typed, offered", [("emi", "emit"), ("probe --level ", "standard")])
def test_a_shell_completes(typed, offered, shell):
    asked = COMPLETES[shell](f"fp4tune {typed}")
    done = subprocess.run(
        [sys.executable, "-c", "from fp4tune.cli import main; main()"],
        env=environment(_FP4TUNE_COMPLETE=f"complete_{shell}", **asked),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert offered in re.findall(r"[\w-]+", done.stdout), done.stderr


IDLE = [
    ("--tp", ["probe", "--shape", "256,256", "--tp", "2"]),
    ("--tp", ["probe", "--experts", "4,2,32,64", "--tp", "2"]),
    ("--activation", ["probe", "--experts", "4,2,32,64", "--activation", "fp4"]),
    ("--engine-args", ["probe", "--gpu", "none", "--engine-args", "--x"]),
    ("--max-seconds", ["probe", "--gpu", "none", "--max-seconds", "5"]),
    ("--prior", ["probe", "--gpu", "none", "--backend", "torch-dequant", "--prior"]),
    ("--verbose", ["probe", "--gpu", "none", "--json", "-v"]),
    ("--out-dtype", ["choose", "1", "--experts", "4,2,32,64", "--out-dtype", "fp16"]),
    ("--python", ["show", "--python", "python3"]),
    ("--findings", ["show", "--findings", "--json"]),
    ("--out", ["emit", "sglang", "--out", "x"]),
    ("--format", ["emit", "vllm", "--checkpoint", "x", "--format", "nvfp4"]),
    ("--on-fault", ["emit", "vllm", "--on-fault", "quarantine"]),
    ("--jobs", ["audit", "--coverage", "--jobs", "2"]),
    ("--state", ["audit", "--coverage", "--state", "x"]),
    ("--expires", ["facts", "--expires", "60"]),
    ("--activation", ["quarantine", "add", "marlin", "--activation", "bf16"]),
    ("--max-loss", ["fleet", "advise", "x", "--out", "y", "--force", "--max-loss", "0.5"]),
    ("--max-change", ["fleet", "promote", "x", "--force", "--max-change", "0.5"]),
]


@pytest.mark.parametrize(("option", "words"), IDLE)
def test_an_option_that_would_do_nothing_is_refused_by_name(option, words):
    done = call(*words)
    assert done.exit_code == 2 and done.stdout == "", done.output
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"fp4tune: {option} "), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["choose", "-1", "4096", "4096"], "-1: no number here is negative"),
        (["choose", "1", "4096"], "M, N and K"),
        (["chose"], "choose"),
        (["probe", "--lvel", "quick"], "--level"),
        (["probe", "--tp", "two"], "--tp"),
        (["probe", "--gpu", "cuda:0"], "'cuda:0' is not the index of a GPU"),
        (["probe", "--gpu", "-1"], "'-1' is not the index of a GPU"),
        (["backends", "--gpu", "0,1"], "'0,1' is not the index of a GPU"),
        (["fleet", "merg"], "merge"),
    ],
)
def test_a_mistake_is_one_sentence(words, said):
    done = call(*words)
    lines = done.stderr.splitlines()
    assert done.exit_code == 2 and done.stdout == "" and len(lines) == 1, done.output
    assert lines[0].startswith("fp4tune: ") and said in lines[0]


def test_the_doctor_never_advises_what_would_replace_an_engines_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.metadata, "version", missing)
    bringing = {"torch", "triton", "sglang", "vllm"}
    advised = [line.do for line in doctor.examine(tmp_path) if line.do]
    assert len(advised) > 8
    for do in advised:
        found = re.search(r"pip install (?P<flags>(--\S+ )*)(?P<name>[\w-]+)", do)
        if found is None:
            continue
        assert found["name"] not in bringing, do
        alone = {"sqlite-utils", "nvidia-ml-py", "nvidia-cuda-cuobjdump"}
        assert "--no-deps" in found["flags"] or found["name"] in alone, do


def missing(name: str) -> str:
    raise doctor.metadata.PackageNotFoundError(name)


def test_choose_and_show_say_which_engines_could_run_the_choice(tmp_path):
    stores.put(tmp_path / "s")
    for command in (["choose", 1, B.n, B.k], ["show"]):
        said = call(*command, "--state", tmp_path / "s").stdout
        assert "marlin can be run by sglang (marlin), vllm (MarlinNvFp4LinearKernel)" in said
    assert brief.engines_for(["triton-w4a16"], "nvfp4", 90, "strict")[0].startswith("no engine")
    assert brief.engines_for(["marlin"], "nvfp4", 90, "sglang") == []


def test_the_ten_lines_are_as_wide_as_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    said = call("choose", 1, B.n, B.k, "--state", stale(tmp_path / "s")).stdout.splitlines()
    assert said[0].startswith("STALE since ") and len(said[0]) <= 60 and said[1].startswith("  ")
    monkeypatch.delenv("COLUMNS")
    said = call("choose", 1, B.n, B.k, "--state", tmp_path / "s").stdout.splitlines()
    assert len(said[0]) > 60 and said[1].startswith("now: ")


def test_what_no_bucket_tells_apart_is_equal_for_an_engine_too():
    def row(backend: str, n: int, lo: float, hi: float) -> dict:
        return {"backend": backend, "n": n, "k": 1, "m_lo": 1, "m_hi": 4, "lo_us": lo, "hi_us": hi}

    rows = [row("a", 1, 1.0, 2.0), row("b", 1, 1.5, 3.0), row("c", 1, 2.5, 3.0)]
    rows += [row("a", 2, 1.0, 2.0), row("b", 2, 1.5, 3.0), row("c", 2, 1.0, 2.0)]
    spans = engine_select._intervals_by_backend(
        [*rows, {**rows[0], "m_hi": 0, "lo_us": 9.0, "hi_us": 9.0}]
    )
    assert not engine_select._told_apart_anywhere(spans, "b", "a")
    assert engine_select._told_apart_anywhere(
        spans, "c", "a"
    ) and engine_select._told_apart_anywhere(spans, "c", "unknown")


def test_a_page_says_in_words_what_its_signs_mean_and_where_it_scrolls(tmp_path):
    """What the browser's test measures, by the page's structure alone."""
    place = demonstration.recorded()
    page = node.document(place)
    captions = re.findall(r"<caption>(.*?)</caption>", page, re.S)
    assert captions and all("(scrolls sideways)" in caption for caption in captions)
    figures = re.findall(r'<figure class="chart">(.*?)</figure>', page, re.S)
    assert len(figures) == 6
    for figure in figures:
        letters = re.findall(r'<text class="name"[^>]*>([A-Z])</text>', figure)
        keys = dict(re.findall(r'<span class="swatch [^"]*">([A-Z])</span>([\w-]+)</li>', figure))
        assert sorted(letters) == sorted(keys) and "triton-w4a16" in keys.values()
    squares = re.findall(r'<td class="rel[^"]*" title="([^"]*)">', page)
    assert len(squares) == 102
    timed = [text for text in squares if "microseconds" in text]
    assert len(timed) == 96
    assert all("% of the roofline" in text and "failure rate below" in text for text in timed)
    sheet = page[page.index("<style>") : page.index("</style>")]
    assert ".chart{max-width:none}" in sheet and "@media (max-width:48rem){.hint" in sheet


def test_routed_experts_are_called_so_on_a_page():
    bucket = BucketKey("nvfp4", "fp4", "bf16", 128, 1, 16, 4096, 2048)
    head = ("sm120", "B", "strict", bucket, "a", "default", "x")
    rows_ = Publication(1, {}, (Choice(*head, "safe"),), (Candidate(*head, "safe", 0, 5.0),), ())
    assert "Experts: nvfp4 W4A4 bf16, 128 experts" in node.draw(node.NodeRows(rows_))


def test_for_an_engine_that_is_named_what_it_cannot_name_is_shown_and_not_chosen(
    tmp_path, beside, monkeypatch
):
    monkeypatch.syspath_prepend(str(beside))
    monkeypatch.setattr(engine_here, "gpus", lambda: [])
    interpreter.of.cache_clear()
    engine_store.fill(tmp_path / "s", "sm90")
    try:
        done = call("choose", 1, 4096, 2048, "--engine", "sglang", "--state", tmp_path / "s")
    finally:
        interpreter.of.cache_clear()
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("m=1 ")]
    assert "triton-w4a16" in said
    assert "sglang has no name for triton-w4a16" in done.stdout
    assert "the best that it can name is marlin, 12.0 us" in done.stdout


@pytest.mark.parametrize(
    "words", [["--check", "--format", "nfd"], ["--json", "--format", "text"], ["--expires", "9"]]
)
def test_the_lean_facts_refuse_the_same(words, tmp_path, capsys):
    assert facts.main([*words, "--state", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_forecast_is_what_earlier_layers_of_that_model_took(tmp_path):
    plan = plan_of(shapes=2)
    with Ledger.open(tmp_path) as ledger:
        assert not forecast(plan, ledger).known
        run = ledger.start_run(
            seed=1, level="quick", profile="strict", device={"name": plan.target.name}
        )
        started = ledger.runs()[0].started
        for n, detail in ((64, {"a": {"runs": [run], "at": started + 10.0}}), (128, {"a": "odd"})):
            bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 0, 4, n, 128)
            row = Probed(run, bucket, {}, "m", {"entrants": detail}, at=started + 17.0)
            ledger.add_probed(row)
        ledger.finish_run(run)
        found = forecast(plan, ledger)
        assert found.known and found.build == pytest.approx(10.0)
        assert found.layer == pytest.approx(7.0)
        # Both were probed; only the second row's words are those of another version.
        assert found.layers == 0
        assert forecast(replace(plan, again=True), ledger).layers == 2


def test_where_nothing_is_known_fewer_backends_are_said_to_take_less(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        found = [
            forecast(replace(plan_of(shapes=2), target=TARGET, backends=tuple(names)), ledger)
            for names in ("ab", "abcdef", "abcdefghi")
        ]
    assert not any(each.known for each in found) and {each.layers for each in found} == {2}
    assert 0 < found[0].seconds < found[1].seconds == found[2].seconds


def plan_of(shapes: int) -> Plan:
    problems = tuple(Problem("nvfp4", 4, 64 * i, 128, "bf16", "bf16") for i in range(1, shapes + 1))
    return Plan(devices.cpu(), ("a",), problems, LEVELS["quick"], PROFILES["strict"], seed=1)


def of_an_h200(place: Path) -> Path:
    """A store as an H200 published it, of files that are not here."""
    environment = Environment("f" * 64, "marlin", "sm90", {}, (Stamp("/nowhere/a.so", 1, 2, 3),))
    publish.publish(
        place, *stores.rows_for("a", gpu="NVIDIA H200"), [environment], {"run": "a", "devices": []}
    )
    return place


def test_a_demonstration_takes_the_place_of_nothing_a_gpu_showed(tmp_path):
    place = of_an_h200(tmp_path / "s")
    before = sorted(p.name for p in place.iterdir())
    said = call("probe", "--state", place)
    assert said.exit_code == 2 and "a demonstration keeps to a place of its own" in said.stderr
    assert sorted(p.name for p in place.iterdir()) == before


def test_what_to_do_about_the_store_of_another_host_is_no_probe_in_its_place(tmp_path):
    place = of_an_h200(tmp_path / "s")
    found = facts.gather(place, driver=str(tmp_path / "none"), gpus=str(tmp_path / "none"))
    layers = [layer for scope in found["scopes"] for layer in scope["by_layer"]]
    stale = [said for said in (found, *layers) if said["status"] == "stale"]
    assert found["elsewhere"] and all("probe" not in said["do"].split()[:2] for said in stale)


def test_an_answer_that_is_worse_than_its_layer_is_what_is_said_first(tmp_path):
    place = tmp_path / "s"
    stores.put(place)
    choice = stores.rows_for("a")[0][0]
    m, n, k = 100_000, choice.bucket.n, choice.bucket.k
    said = call("choose", m, n, k, "--state", place)
    assert said.exit_code == 2 and said.stdout.startswith(f"UNPROVEN: m={m}")
    assert "now: fp4tune probe" in said.stdout and f"--max-m {m}" in said.stdout


def test_where_nothing_is_published_that_is_a_status_too(tmp_path):
    for command in (("show",), ("choose", 1, 128, 256), ("explain", 1, 128, 256)):
        said = call(*command, "--state", tmp_path / "none")
        assert said.exit_code == 2 and "UNPROVEN: " in said.stderr
        assert f"fp4tune probe --state {tmp_path / 'none'}" in said.stderr
