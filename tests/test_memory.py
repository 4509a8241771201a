"""Running out of memory says nothing of a backend, on a CPU either."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from levels import brief
from scripted import scripted
from test_known import SHAPES, make_plan, run

from commands import call
from fp4tune.autotune import request
from fp4tune.cache.ledger import Ledger
from fp4tune.machine import devices, memory
from fp4tune.machine.memory import is_out_of_memory, readable
from fp4tune.probes.problem import Problem
from fp4tune.probes.worker.supervisor import WorkerFailed

# -- what it is


def raised(code: str) -> BaseException:
    import numpy
    import torch

    try:
        exec(code, {"torch": torch, "numpy": numpy})
    except BaseException as error:
        return error
    raise AssertionError(f"{code} raised nothing")


@pytest.mark.parametrize(
    "code",
    [
        "torch.empty(1 << 55, dtype=torch.uint8)",
        "numpy.empty(1 << 55, dtype=numpy.uint8)",
        "bytearray(1 << 60)",
        "raise torch.OutOfMemoryError('CUDA out of memory')",
        "raise OSError(12, 'Cannot allocate memory')",
        "raise RuntimeError('CUDA error: out of memory')",
        "raise RuntimeError('CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate')",
        "try: bytearray(1 << 60)\nexcept MemoryError: raise ValueError('it broke')",
    ],
)
def test_it_is_known_by_whoever_says_it(code):
    assert is_out_of_memory(raised(code))


@pytest.mark.parametrize(
    "code", ["1 / 0", "torch.ones(2) @ torch.ones(3)", "raise OSError(28, 'No space left')"]
)
def test_other_errors_are_others(code):
    assert not is_out_of_memory(raised(code))


# -- backends that meet it

HUNGRY = """
import torch
from fp4tune.probes.zoo.floor import Right

class It(Right):
    def __init__(self):
        super().__init__({name!r})

    def prepare(self, weight, problem):
        {prepare}
        return super().prepare(weight, problem)

    def run(self, state, a, out, tactic):
        {run}
        super().run(state, a, out, tactic)
"""
TAKES = "torch.empty(1 << 55, dtype=torch.uint8)"


def hungry(folder, name: str, prepare: str = "pass", run: str = "pass") -> str:
    file = folder / f"{name}.py"
    file.write_text(textwrap.dedent(HUNGRY.format(name=name, prepare=prepare, run=run)))
    return f"{file}:It"


@pytest.mark.slow
def test_a_backend_without_memory_is_neither_safe_nor_at_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    specs = [
        hungry(tmp_path, "while-loading", prepare=TAKES),
        hungry(tmp_path, "while-running", run=TAKES),
        hungry(tmp_path, "at-times", run=f"a.shape[0] > 2 and {TAKES}"),
        hungry(tmp_path, "in-numpy", run="bytearray(1 << 60)"),
    ]
    plan = make_plan(SHAPES[:1], specs, level=brief())
    plan = replace(plan, problems=tuple(p.at(4) for p in plan.problems))
    report = run(plan, tmp_path / "state")
    assert not report.findings
    verdicts = {(c.backend, c.verdict) for c in report.candidates if c.bucket.m_lo > 2}
    assert verdicts == {(spec.rpartition("/")[2][:-6], "inconclusive") for spec in specs}
    with Ledger.open(tmp_path / "state") as ledger:
        rows = [row for row in ledger.evidence() if row.backend != "controls"]
    assert not [row for row in rows if row.status == "failed"]
    assert any("memory" in str(row.detail.get("note")) for row in rows)


DIES = "read()\nos.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("counts", "kind"), [((3, 9), "out of memory"), ((3, 3), "crash")])
def test_what_the_kernel_ends_for_memory_is_no_crash(tmp_path, monkeypatch, counts, kind):
    """The kernel's own count, in a file in its place: nothing here may bring it to kill."""
    file = tmp_path / "memory.events"
    file.write_text(f"low 0\noom 5\noom_kill {counts[0]}\noom_group_kill 0\n")
    monkeypatch.setattr(memory, "_COUNTS", (file,))
    with scripted(tmp_path, DIES) as worker:
        file.write_text(f"low 0\noom 5\noom_kill {counts[1]}\n")
        with pytest.raises(WorkerFailed) as failed:
            worker.ask("anything", 20.0)
    assert failed.value.kind == kind and failed.value.fatal
    assert signal.SIGKILL.name in str(failed.value) or "memory" in str(failed.value)


@pytest.mark.parametrize("signal_", [signal.SIGSEGV, signal.SIGBUS])
def test_a_fault_is_one_whatever_was_said_before(tmp_path, signal_):
    script = f"read()\nos.write(2, b'std::bad_alloc')\nos.kill(os.getpid(), {int(signal_)})"
    with scripted(tmp_path, script) as worker, pytest.raises(WorkerFailed) as failed:
        worker.ask("anything", 20.0)
    assert failed.value.kind == "crash"


LAST_WORDS = {
    "libgomp: Thread creation failed: Resource temporarily unavailable": "out of memory",
    "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc":
        "out of memory",
    "OMP: System error #11: Resource temporarily unavailable": "out of memory",
    "torch.OutOfMemoryError: CUDA out of memory": "crash",  # raised and told before, and no end
    "std::bad_alloc\none\ntwo": "crash",
    "": "crash",
}  # fmt: skip


@pytest.mark.parametrize("words", LAST_WORDS)
@pytest.mark.parametrize("ending", ["os._exit(1)", "os.abort()"])
def test_a_process_that_ends_for_want_of_memory_or_threads_is_no_crash(tmp_path, words, ending):
    """libgomp ends it with code 1: a container's limit of processes condemned the floor."""
    script = f"read()\nos.write(2, {words.encode()!r} + b'\\n')\n{ending}"
    with scripted(tmp_path, script) as worker, pytest.raises(WorkerFailed) as failed:
        worker.ask("anything", 20.0)
    assert failed.value.kind == LAST_WORDS[words] and failed.value.fatal


# -- held against what there is before anything starts


@pytest.mark.parametrize("gigabytes", [0.25, 0.45, 0.65])
def test_a_host_without_memory_is_a_sentence_and_no_verdict(tmp_path, gigabytes):
    """Whatever fails for it: a library that is not mapped, or Python itself."""

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)

    words = ["probe", "--gpu", "none", "--shape", "64,64", "--state", str(tmp_path / "state")]
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cli", *words], preexec_fn=little, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "no memory left" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("shape", ["99999999999,64", "64,99999999968", "999999,999936"])
def test_a_layer_that_fits_nowhere_is_refused_in_a_sentence(tmp_path, shape):
    place = tmp_path / "state"
    answer = call("probe", "--gpu", "none", "--shape", shape, "--state", place)
    assert answer.exit_code == 2 and not place.exists()
    (line,) = answer.stderr.splitlines()
    n, k = shape.split(",")
    assert f"n={n} and k={k} takes" in line and "smaller shape" in line


@given(st.integers(1, 2**70), st.integers(1, 2**60), st.integers(1, 4096))
def test_any_shape_is_refused_or_fits(n, blocks, m):
    k = 16 * blocks
    room, weight = memory.free_memory(), 16 * n * k
    try:
        request.fits([Problem("nvfp4", m, n, k)], devices.cpu())
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        assert weight + 16 * m * (n + k) > room / 2  # what is free changes meanwhile
    else:
        assert weight < 2 * room


@given(st.floats(0, 1e300) | st.integers(0, 10**400))
def test_bytes_are_readable(size):
    assert len(readable(size)) < 50 and readable(size).split()[1][-1] == "B"
