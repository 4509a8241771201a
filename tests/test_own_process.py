"""What a regime asks of a process of its own: one question, and one answer or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_host_regimes import PROBLEM, run

from fp4tune.probes import registry
from fp4tune.probes import settings as told_settings
from fp4tune.probes.launch.case import BackendRaised
from fp4tune.probes.regimes.host import child, first_calls, own_process, scratch
from fp4tune.probes.regimes.host.own_process import NoAnswer, Question

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = Question(
    "first-calls", "zoo-process-half-made", PROBLEM, 24, 5, (1, 2), ("d", "d"), "cpu"
)


def test_a_question_is_what_it_was(tmp_path):
    import json
    from dataclasses import asdict

    assert Question.of(json.dumps(asdict(QUESTION))) == QUESTION


def test_a_process_of_its_own_judges_by_what_its_parent_does():
    asked = replace(QUESTION, spec="zoo-output-cut", tactics=("default", "default"))
    assert "error" in first_calls.answer(asked)
    assert "error" not in first_calls.answer(replace(asked, to_nearest=False))
    asked = replace(asked, spec="zoo-output-cut-a-bit-short", to_nearest=False)
    assert "error" in first_calls.answer(asked)


@pytest.mark.slow
def test_the_first_calls_of_a_process_are_made_in_one_of_its_own():
    answer = own_process.ask(QUESTION, lambda: None)
    assert "first calls of a process" in answer["error"]["message"]


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_gives_no_answer():
    with pytest.raises(NoAnswer, match="ended with") as raised:
        own_process.ask(replace(QUESTION, spec="zoo-segmentation-fault"), lambda: None)
    assert raised.value.kind == "crash"
    with pytest.raises(NoAnswer, match="silent") as raised:
        own_process.ask(replace(QUESTION, spec="zoo-endless-loop"), lambda: None, 6.0)
    assert raised.value.kind == "hang"


BEGIN = "def begin(): open(os.path.splitext(sys.argv[-1])[0] + '.begun', 'w')"


ENDS = {
    "prints without end": ("begin()\nwhile True: os.write(1, b'y' * 65536)", "hang"),
    "never begins": ("while True: os.write(1, b'y' * 65536)", "internal"),
    "leaves a pipe": ("os.mkfifo(sys.argv[-1])", "crash"),
    "leaves a device": ("os.symlink('/dev/zero', sys.argv[-1])", "crash"),
    "leaves a terabyte": ("os.truncate(open(sys.argv[-1], 'w').name, 1 << 40)", "crash"),
    "has no thread": (
        "begin()\nos.write(2, b'libgomp: Thread creation failed: Resource temporarily "
        "unavailable')\nos._exit(1)",
        "out of memory",
    ),
    "leaves garbage": ("open(sys.argv[-1], 'w').write('{')", "crash"),
}


@pytest.mark.parametrize("what", ENDS)
def test_whatever_a_child_leaves_is_an_answer_or_none(tmp_path, monkeypatch, what):
    body, kind = ENDS[what]
    program = f"import os, sys\n{BEGIN}\n{body}\n"
    monkeypatch.setattr(own_process, "STARTS", 2.0)
    monkeypatch.setattr(own_process, "_PROGRAM", program)
    monkeypatch.setattr(own_process.tempfile, "tempdir", str(tmp_path))
    sizes = []

    def beat() -> None:
        sizes.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))

    with pytest.raises(NoAnswer) as caught:
        own_process.ask(QUESTION, beat, 1.0)
    assert caught.value.kind == kind
    assert kind in ("crash", "out of memory") or max(sizes) < 1 << 16, (
        "what it printed is on no disk"
    )


def test_a_child_is_told_what_its_environment_does_not_say(tmp_path, monkeypatch):
    """Where kernels are kept, for one: without, each child compiled them once more."""
    body = "open(sys.argv[-1], 'w').write(json.dumps(json.load(open(sys.argv[-2]))['told']))"
    monkeypatch.setattr(
        own_process, "_PROGRAM", f"import json, os, sys\n{BEGIN}\nbegin()\n{body}\n"
    )
    monkeypatch.setattr(told_settings, "_told", {"FP4TUNE_CACHE": "/kept/here"})
    asked = replace(QUESTION, told=told_settings.told())
    assert own_process.ask(asked, lambda: None) == {"FP4TUNE_CACHE": "/kept/here"}


@pytest.fixture
def early_child():
    """One that has loaded the backend and waits, for a task that needs no device."""
    own_process.start_early(QUESTION.spec)
    yield own_process._waiting[QUESTION.spec]
    own_process._end_waiting()


@pytest.mark.slow
def test_a_child_that_was_started_early_answers_one_question(early_child, monkeypatch):
    monkeypatch.setattr(own_process, "EARLY", QUESTION.task)
    monkeypatch.setattr(own_process, "_PROGRAM", "raise SystemExit('another was started')")
    own_process.start_early(QUESTION.spec)
    assert own_process._waiting[QUESTION.spec] is early_child
    answer = own_process.ask(QUESTION, lambda: None)
    assert "first calls of a process" in answer["error"]["message"]
    assert not own_process._waiting and early_child.process.returncode == 0
    with pytest.raises(NoAnswer, match="another was started"):
        own_process.ask(QUESTION, lambda: None)


@pytest.mark.slow
def test_a_child_that_was_started_early_ends_with_who_started_it(early_child):
    early_child.process.stdin.close()
    assert early_child.process.wait(60) == 0


def test_a_child_that_ended_early_is_replaced_by_one_that_is_asked(early_child, monkeypatch):
    early_child.process.kill()
    early_child.process.wait()
    monkeypatch.setattr(own_process, "EARLY", QUESTION.task)
    body = "begin()\nopen(sys.argv[-1], 'w').write('{}')"
    monkeypatch.setattr(own_process, "_PROGRAM", f"import os, sys\n{BEGIN}\n{body}\n")
    assert own_process.ask(QUESTION, lambda: None) == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("the device had no memory left"), "out of memory"),
        (RuntimeError("CUDA error: out of memory"), "out of memory"),
        (RuntimeError("no kernel for it"), "error"),
        (BackendRaised("TypeError: no"), "error"),
        (KeyError("ours"), "internal"),
    ],
)
def test_what_a_child_raises_is_told_by_kind(error, kind):
    assert child._kind_of_end(error, "cpu") == kind


def test_a_child_without_memory_is_asked_once_more_and_then_nobody_s_fault(monkeypatch):
    """And what it says then is not remembered of the backend as a fault."""
    backend = registry.load_one("torch-dequant")
    short = {"error": {"kind": "out of memory", "message": "none left"}}
    answers = [short, {"by_tactic": {}, "blocks": 3}]
    monkeypatch.setattr(scratch, "need_cuda", lambda cases, what: None)
    monkeypatch.setattr(scratch, "_ask_of", lambda *each: answers.pop(0))
    outcome = run("scratch", backend, (1, 2))
    assert not outcome.errors and not answers and outcome.proof["blocks"] == 3
    monkeypatch.setattr(scratch, "_asked", {})
    monkeypatch.setattr(scratch, "_ask_of", lambda *each: short)
    outcome = run("scratch", backend, (1, 2))
    assert {error["kind"] for error in outcome.errors.values()} == {"out of memory"}


@pytest.mark.slow
def test_a_child_that_is_asked_while_it_begins_with_the_device_is_no_crash(tmp_path, monkeypatch):
    """Such a one ends before it knows what is asked, and another is started for it."""
    backend = tmp_path / "hasty.py"
    backend.write_text(
        "import time, torch\n"
        "time.sleep(1)\n"
        "torch.cuda.is_initialized = lambda: True\n"
        "from fp4tune.probes.backends.torch.dequant import TorchDequant\n"
        "def make():\n"
        "    return TorchDequant('hasty', 'bf16')\n"
    )
    question = replace(QUESTION, spec=f"{backend}:make", tactics=("fp32", "fp32"))
    monkeypatch.setattr(own_process, "EARLY", question.task)
    own_process.start_early(question.spec)
    answer = own_process.ask(question, lambda: None)
    assert "error" not in answer and not own_process._waiting
