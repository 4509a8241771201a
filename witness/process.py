"""The witness of this process: made at its first use, told by the environment how to be.

FP4TUNE_WATCH      ``few`` calls (the default) or ``every``
FP4TUNE_ON_FAULT   ``log``, ``quarantine`` (the default) or ``stop``
FP4TUNE_WATCH_COPIES  ``1``: a packed copy of each weight may be kept on the host
FP4TUNE_WITNESS    the drop box for counts, where it is not the state's
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..cache import state
from ..errors import printable
from . import counts
from .plan import FEW, ON_FAULT, QUARANTINE, SHARES
from .respond import Responder, end_this_process
from .watcher import WatchDevice, Witness, WitnessOptions

WATCH, REACT, COPIES = "FP4TUNE_WATCH", "FP4TUNE_ON_FAULT", "FP4TUNE_WATCH_COPIES"
_TELL_SECONDS = 5.0
log = logging.getLogger("fp4tune")


@dataclass(slots=True)
class ProcessWitness:
    """A witness, what answers it, and where it tells what it counted (None: nowhere)."""

    witness: Witness
    responder: Responder
    folder: str | None
    told: float = 0.0
    known: int = 0

    def tell(self, now: bool = False) -> str | None:
        """Leave what was counted in the drop box, once in some seconds or where there is a fault;
        the file's path. Never raises: who cannot tell serves on."""
        news = len(self.responder.faults) != self.known
        due = time.monotonic() - self.told >= _TELL_SECONDS
        if self.folder is None or not (now or news or due):
            return None
        self.told, self.known = time.monotonic(), len(self.responder.faults)
        try:
            return counts.write(
                self.witness.report(self.responder.faults, described(self.witness.devices)),
                self.folder,
            )
        except OSError as error:
            folder, self.folder = self.folder, None
            log.warning(
                "%s", printable(f"fp4tune: counts are not told: {folder}: {error.strerror}")
            )
            return None

    def end_having_told(self) -> None:
        """End this process, but not before the node knows why."""
        try:
            self.tell(now=True)
        finally:
            end_this_process()


_mine: ProcessWitness | None = None
_lock = threading.Lock()


def mine() -> ProcessWitness:
    """This process's, made and started at the first call."""
    global _mine
    with _lock:
        if _mine is None:
            _mine = made(os.environ)
            _mine.witness.start()
            atexit.register(end)
        return _mine


def end() -> None:
    """Look once more, tell, and forget this process's witness; nothing where there is none."""
    global _mine
    with _lock:
        found, _mine = _mine, None
    if found is not None:
        with contextlib.suppress(Exception):
            found.witness.stop()
            found.tell(now=True)


def made(environ: Mapping[str, str]) -> ProcessWitness:
    """A witness as `environ` asks for it, not started. Words that are none are as if not said."""
    share = _asked_word(environ, WATCH, SHARES, FEW)
    options = WitnessOptions(
        share=share, host_copies=environ.get(COPIES) == "1", turn=_rank(environ)
    )
    places = state.holding_places()
    state_dir = places[0] if places else environ.get("FP4TUNE_STATE") or None
    responder = Responder(_asked_word(environ, REACT, ON_FAULT, QUARANTINE), state_dir)
    found = ProcessWitness(Witness(options, responder), responder, counts.folder_of(state_dir))
    found.witness.after = found.tell
    responder.end = found.end_having_told
    return found


def _asked_word(
    environ: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str
) -> str:
    word = environ.get(name, "").strip().lower()
    if word and word not in allowed:
        log.warning("%s", printable(f"fp4tune: {name}={word} is none of {', '.join(allowed)}"))
    return word if word in allowed else default


def _rank(environ: Mapping[str, str]) -> int:
    """Which of an engine's processes this is, as far as it says."""
    for name in ("RANK", "LOCAL_RANK"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return os.getpid()


def described(devices: Sequence[torch.device]) -> WatchDevice:
    """What the weights that are watched lie on; of several GPUs the first one's name, and the UUID
    of each. (What is current in the witness's own thread says nothing.)"""
    gpus = [torch.cuda.get_device_properties(d) for d in devices if d.type == "cuda"]
    if not gpus:
        return WatchDevice("cpu", "cpu", "")
    uuids = [f"GPU-{getattr(facts, 'uuid', '')}" for facts in gpus]
    return WatchDevice(gpus[0].name, f"sm{gpus[0].major}{gpus[0].minor}", ",".join(uuids)[:200])


def after_fork() -> None:
    """A child has no thread of its parent's, and may watch by itself."""
    global _mine, _lock
    _mine, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=after_fork)
