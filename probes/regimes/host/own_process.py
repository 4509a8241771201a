"""A process of its own for one question: the backend is loaded there anew, and nothing was called.

The child is this interpreter with this environment; it gets the question as JSON, loads the backend
by the name that it was loaded by here, and leaves its answer in a file. Of what it prints the end
is kept, for one that dies.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ....machine import files
from ....machine.last_words import LastWords
from ....machine.memory import ended_for_want, kills
from ... import settings
from ...backends import Backend
from ...check.reference import faithful
from ...data import exact
from ...grouped.backend import AsDense
from ...grouped.problem import ExpertsProblem, is_grouped, of_fields
from ...launch.case import Case, case
from ...launch.routed_cases import balanced_case
from ...problem import Problem
from ...registry import load_one, spec_of

_BOOTSTRAP = Path(__file__).parents[2] / "worker" / "bootstrap.py"
_PROGRAM = """
import runpy, sys
runpy.run_path(sys.argv[1])["_package"]()
from fp4tune.probes.regimes.host.child import main
main(*sys.argv[2:])
"""
SECONDS = 120.0
"""Of silence: for a child to load the backend, to build one kernel, to make one tactic's calls."""
STARTS = 600.0
"""For a child to load Python and torch: on a busy machine that says nothing of a backend."""
EARLY = "scratch"
"""The task that a child is started early for."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a child is asked: a task of `child.TASKS`, a backend, and a problem to draw.

    `ms` and `tactics` go together: what is called. `device` is torch's name of it. `to_nearest`
    says that answers are rounded so; else a neighbour of the sum is right, too. `told` is where
    its kernels are kept, and what else its environment does not say (`settings`).
    """

    task: str
    spec: str
    problem: Problem
    width: int
    seed: int
    ms: tuple[int, ...]
    tactics: tuple[str, ...]
    device: str
    to_nearest: bool = True
    told: dict[str, str] = field(default_factory=settings.told)

    @staticmethod
    def of(text: str) -> Question:
        """The question that `ask` wrote."""
        fields = json.loads(text)
        problem = fields["problem"]
        fields["problem"] = of_fields(problem) if is_grouped(problem) else Problem(**problem)
        fields["ms"], fields["tactics"] = tuple(fields["ms"]), tuple(fields["tactics"])
        return Question(**fields)


NOBODYS = frozenset({"out of memory", "internal"})
"""Kinds of no answer that say nothing of the backend: asked again, it may give one."""


class NoAnswer(Exception):
    """A child that gave no answer. `kind` is ``hang`` or ``crash``, or ``out of memory`` where it
    said that; ``internal`` where it did not come so far as to load the backend."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def loaded_by(backend: Backend) -> str | None:
    """The name by which a child can load the backend; None where it was made in this process."""
    return spec_of(backend)


def whole_problem(backend: Backend, case: Case, rows: int) -> Problem:
    """What a case is of, with so many rows: of routed experts all of them."""
    whole = backend.problem if isinstance(backend, AsDense) else None
    return (whole or case.problem).at(rows)


def case_there(backend: Backend, question: Question, device: torch.device) -> Case:
    """In the child: what the question is about, drawn and prepared."""
    problem = question.problem
    if isinstance(problem, ExpertsProblem):
        assert isinstance(backend, AsDense)
        backend.problem = problem
        return balanced_case(backend, problem, question.seed, device)
    drawn = exact(problem, question.width, question.seed, device)
    made = case(backend, problem, drawn)
    return made if question.to_nearest else replace(made, expectation=faithful(drawn, problem))


def name_of(device: torch.device) -> str:
    """Torch's name of a device, with its number."""
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"


def backend_there(question: Question) -> Backend:
    """In the child: the backend, in a process that is set as a worker is."""
    found = _early.pop(question.spec, None) or load_one(question.spec)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


_early: dict[str, Backend] = {}
"""In a child that was started early: what it loaded, by name."""


def load_early(spec: str, told: dict[str, str]) -> bool:
    """In the child: load the backend before anything is asked of it; False where that began with
    the device, which a question may have to be there first for."""
    settings.tell(told)
    with suppress(Exception):  # it is raised again when the question is there
        _early[spec] = load_one(spec)
    return not torch.cuda.is_initialized()


@dataclass(frozen=True, slots=True)
class _Child:
    """A process, and the end of what it prints. One that was started early ends with the pipe that
    its question comes through, as all do of which the process that started it is gone."""

    process: subprocess.Popen[bytes]
    words: LastWords

    @property
    def early(self) -> bool:
        return self.process.stdin is not None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()
        self.words.__exit__()


_waiting: dict[str, _Child] = {}
"""By the backend's name: children that were started early."""


@atexit.register
def _end_waiting() -> None:
    while _waiting:
        _waiting.popitem()[1].end()


def start_early(spec: str) -> None:
    """Start a child that loads torch and the backend, and then waits for its question; where one
    is waiting, nothing is done."""
    if (there := _waiting.get(spec)) is not None:
        if there.process.poll() is None:
            return
        _waiting.pop(spec).end()
    child = _start_child(stdin=subprocess.PIPE)
    _waiting[spec] = child
    _send(child, {"spec": spec, "told": settings.told()})


def _start_child(*arguments: str, stdin: int = subprocess.DEVNULL) -> _Child:
    words = LastWords()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(_BOOTSTRAP), *arguments],
            stdin=stdin,
            stdout=words.fd,
            stderr=words.fd,
        )
    except BaseException:
        words.__exit__()
        raise
    words.begun()
    return _Child(process, words)


def _send(child: _Child, message: dict[str, Any]) -> None:
    assert child.process.stdin is not None
    with suppress(OSError):  # it is gone, as who waits for it will see
        child.process.stdin.write(json.dumps(message).encode() + b"\n")
        child.process.stdin.flush()


def _asked(question: Question, asked: Path, answer: Path) -> Iterator[_Child]:
    """Children that have the question: the one that was started early for it, and a new one."""
    child = _waiting.pop(question.spec, None) if question.task == EARLY else None
    if child is not None:
        _send(child, {"asked": str(asked), "answer": str(answer)})
        yield child
    yield _start_child(str(asked), str(answer))


def begun_file(answer: Path) -> Path:
    """What a child leaves beside its answer once it has torch, and touches whenever it got on."""
    return answer.with_suffix(".begun")


def _touched(file: Path) -> int:
    """When the file was last written to, in nanoseconds; 0 where it is not there."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def ask(question: Question, beat: Callable[[], None], seconds: float = SECONDS) -> dict[str, Any]:
    """The child's answer. Raises NoAnswer where it died, or was silent for `seconds` once it had
    torch."""
    with tempfile.TemporaryDirectory(prefix="fp4tune-own-process-") as folder:
        asked, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(asdict(question)))
        before = kills()
        begun = begun_file(answer)
        for child in _asked(question, asked, answer):
            try:
                _attend(child, begun, beat, seconds)
                last, code = child.words.line()[:200], child.process.returncode
            finally:
                child.end()
            if not child.early or _touched(begun):
                break  # one that was early may have ended before it knew what is asked
        try:
            found: dict[str, Any] = json.loads(files.text(answer))
        except FileNotFoundError:
            starved = ended_for_want(last, code)
            if code == -signal.SIGKILL:
                starved = kills() != before
            kind = "out of memory" if starved else "crash"
            raise NoAnswer(kind, f"its own process ended with {code}: {last}") from None
        except (OSError, ValueError) as error:
            raise NoAnswer("crash", f"its own process left no answer: {error}") from None
        return found


def _attend(child: _Child, begun: Path, beat: Callable[[], None], seconds: float) -> None:
    """Wait until the child has ended. Raises NoAnswer where it does not get on."""
    end = time.monotonic() + STARTS
    started = 0
    while child.process.poll() is None:
        if (lately := _touched(begun)) != started:
            started, end = lately, time.monotonic() + seconds
        if time.monotonic() > end:
            if started:
                raise NoAnswer("hang", f"silent for {seconds:.0f} s in a process of its own")
            why = f"a process of its own had not begun after {STARTS:.0f} s"
            raise NoAnswer("internal", why)
        beat()
        child.words.listen(0.25)
