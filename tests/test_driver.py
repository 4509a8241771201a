"""The driver is asked by one program, in a process of its own, and never waited for without end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_nvml
import psutil
import pytest
import stores
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune import doctor
from fp4tune.engines import here
from fp4tune.machine import devices, driver
from fp4tune.machine.driver import Conversation, DriverSilent, NvmlError

ROOT = Path(__file__).resolve().parents[1]

HUNG = """
#include <unistd.h>
int nvmlInit_v2(void) { for (;;) pause(); return 0; }
int nvmlInitWithFlags(unsigned f) { for (;;) pause(); return 0; }
const char *nvmlErrorString(int r) { return "x"; }
"""
# It begins, and is silent at the first question about a GPU, as one whose GPU fell off the bus.
LATER = fake_nvml.SOURCE.replace(
    "int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {",
    "#include <unistd.h>\nint nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { pause();",
)
DIES = HUNG.replace("for (;;) pause();", "_exit(3);")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Puts a driver library in place for every process that asks from here on."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(source: str) -> None:
        driver.close()
        monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_nvml.build(tmp_path, source)))

    yield put
    driver.close()


@pytest.fixture(params=[HUNG, LATER], ids=["from the start", "later"])
def hung(request, library, monkeypatch):
    monkeypatch.setenv(driver.VARIABLE, "1.5" if request.param == LATER else "0.3")
    library(request.param)


def test_one_program_reads_nvml():
    """Nothing else imports it, so that nothing else can hang in it."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("autotune", "cache", "commands", "daemon", "engines", "fleet", "machine",
                       "probes", "report", "witness")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(import|from) (pynvml|nvidia_smi)\b", path.read_text(), re.M)
    ]  # fmt: skip
    assert found == ["machine/nvml.py"]
    importing = re.compile(r"(from \.*machine|from \.) import [^\n]*\bnvml\b|machine\.nvml import")
    assert not [p for p in ROOT.glob("[a-z]*/**/*.py") if importing.search(p.read_text())
                and p.name != Path(__file__).name]  # fmt: skip


COMMANDS = {
    "doctor": ["doctor"],
    "doctor --json": ["doctor", "--json"],
    "probe": ["probe"],
    "probe --gpu all": ["probe", "--gpu", "all"],
    "backends": ["backends"],
    "selftest": ["selftest"],
    "reproduce": ["reproduce", "1"],
    "audit": ["audit", "."],
    "emit": ["emit", "sglang"],
    "facts --check": ["facts", "--check"],
    "show --engine": ["show", "--engine", "sglang"],
    "daemon": ["daemon", "--config", "daemon.toml"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_driver_that_hangs_is_a_sentence_in_every_command(
    words, library, tmp_path, monkeypatch, beside
):
    monkeypatch.syspath_prepend(beside)  # an engine is there to ask for
    monkeypatch.setenv(driver.VARIABLE, "0.3")
    monkeypatch.chdir(tmp_path)
    stores.put(tmp_path / "state")
    (tmp_path / "daemon.toml").write_text('[http]\nlisten = "none"\n')
    library(HUNG)
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2, done.output
    said = done.stdout + done.stderr
    assert said.count("the NVIDIA driver does not answer") == 1 and "reset the GPU" in said
    assert "Traceback" not in said


def test_the_command_that_is_lean_says_so_too(library, tmp_path, monkeypatch):
    monkeypatch.setenv(driver.VARIABLE, "0.3")
    stores.put(tmp_path / "state")
    library(HUNG)
    command = [sys.executable, "-m", "fp4tune.cache.facts", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "does not answer" in done.stderr and done.stdout == ""


def test_silence_is_told_at_once_after_the_first_time(hung, monkeypatch):
    with pytest.raises(DriverSilent):
        devices.gpus()
    monkeypatch.setenv(driver.VARIABLE, "600")
    for ask in (devices.gpus, lambda: devices.select(None), lambda: driver.ask("facts", "GPU-a")):
        with pytest.raises(DriverSilent, match="does not answer"):
            ask()
    (line,) = doctor._gpu_lines()
    assert line.status == "bad" and line.do


def test_the_cpu_needs_no_driver(hung):
    assert devices.select("none")[0].device.arch == "cpu"


def test_the_process_that_hangs_is_gone_afterwards(hung):
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(DriverSilent):
        here.gpus()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_library_that_ends_its_process_is_no_driver(library):
    library(DIES)
    found, why = devices.gpus()
    assert found == [] and "NVML failed" in str(why)


def test_what_is_asked_again_is_asked_of_the_same_process(library):
    library(fake_nvml.SOURCE)
    assert [gpu.uuid for gpu in devices.gpus()[0]] == ["GPU-aaaa", "GPU-bbbb"]
    first = driver._shared.conversation
    assert driver.ask("facts", "GPU-bbbb")["gpu"] == "Model B"
    with pytest.raises(NvmlError) as unknown:
        driver.ask("facts", "GPU-cccc")
    assert unknown.value.kind == "unknown" and driver._shared.conversation is first


def test_a_forked_process_asks_for_itself(library):
    library(fake_nvml.SOURCE)
    mine = driver.ask("gpus")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        same = driver._shared.conversation is None and driver.ask("gpus") == mine
        os.write(write, b"yes" if same else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"yes"
    assert driver.ask("gpus") == mine, "the parent's conversation goes on"


@pytest.mark.parametrize(
    "program",
    [
        "print('no JSON'); print('[]'); print('7')",
        "import sys\nwhile True: sys.stdout.write('x' * 65536)",
        "import sys; sys.exit(1)",
        "import os; os.close(1); import time; time.sleep(600)",
    ],
)
def test_whatever_comes_back_is_an_answer_or_an_end(program, tmp_path, monkeypatch):
    path = tmp_path / "program.py"
    path.write_text(program)
    monkeypatch.setattr(driver, "_PROGRAM", str(path))
    conversation = Conversation()
    with pytest.raises((NvmlError, DriverSilent)):
        conversation.ask("gpus", None, 0.5)
    conversation.close()
    assert not conversation.alive


@pytest.mark.parametrize(("said", "seconds"), [("", 5.0), ("2.5", 2.5), ("-1", 5.0), ("x", 5.0)])
def test_the_limit_can_be_set(said, seconds, monkeypatch):
    monkeypatch.setenv(driver.VARIABLE, said)
    assert driver.limit() == seconds
