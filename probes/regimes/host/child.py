"""The process that `own_process` starts: one question, one answer, and the end."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ....machine.memory import is_out_of_memory
from ... import settings
from ...launch.case import BackendRaised
from ...launch.outcome import wait
from . import first_calls, scratch
from .own_process import Question, begun_file, load_early

TASKS: dict[str, Callable[[Question, Callable[[], None]], dict[str, Any]]] = {
    "first-calls": first_calls.answer,
    "scratch": scratch.answer,
}


def main(asked: str = "", answer: str = "") -> None:
    """Read the question, and leave the answer; neither threads nor exit handlers hold it up."""
    if not asked:
        asked, answer = _awaited()
    question = Question.of(Path(asked).read_text())
    settings.tell(question.told)
    alive = begun_file(Path(answer)).touch
    alive()
    try:
        found = TASKS[question.task](question, alive)
    except Exception as error:
        traceback.print_exc()
        found = {
            "error": {"kind": _kind_of_end(error, question.device), "message": _as_told(error)}
        }
    part = Path(answer + ".part")
    part.write_text(json.dumps(found))
    part.rename(answer)
    os._exit(0)


def _awaited() -> tuple[str, str]:
    """Load the backend that standard input names, and wait there for a question; the end where
    none comes, with the process that would have asked."""
    # Out of the way of whatever a backend starts or reads.
    with open(os.dup(0), "rb") as commands:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        early, question = commands.readline(), b""
        if early and load_early(**json.loads(early)):
            question = commands.readline()
    if not question:
        os._exit(0)
    places = json.loads(question)
    return places["asked"], places["answer"]


def _kind_of_end(error: Exception, device: str) -> str:
    """What an exception is: having no memory left is nobody's fault, and a GPU that is lost the end
    of a process like any other."""
    if is_out_of_memory(error):
        return "out of memory"
    if not isinstance(error, (RuntimeError, BackendRaised)):
        return "internal"
    try:
        wait(torch.device(device))
    except RuntimeError:
        return "crash"
    return "error"


def _as_told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"in a process of its own: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
