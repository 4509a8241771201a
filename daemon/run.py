"""The daemon from start to end: signals, systemd, HTTP, and the loop in between."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING

from ..cache import state
from ..cache.errors import Busy
from ..errors import SAFE, Refused
from . import config as configuring
from .notify import Notifier
from .service import Service

if TYPE_CHECKING:
    from .http import Serving

log = logging.getLogger("fp4tune.daemon")
LOCK = "daemon.lock"


def run(config: configuring.Config, load: Callable[[], configuring.Config]) -> int:
    """Run until SIGTERM or SIGINT; SIGHUP calls `load`, for another. Returns the exit code.

    Raises Refused or StateError where it cannot start.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    notifier = Notifier()
    wake, stopping, reloading = Event(), Event(), Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()
        wake.set()

    def again(number: int, frame: FrameType | None) -> None:
        reloading.set()
        wake.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, again)
    service = Service(config)
    with contextlib.ExitStack() as stack:
        _own(config.state_dir, stack)
        service.start()
        stack.callback(service.stop)
        serving = _serve(service, config, stack)
        where = serving.where if serving else configuring.NOWHERE
        log.info("fp4tune daemon: state %s, http %s", config.state_dir, where)
        notifier.tell("READY=1", f"STATUS={service.status}")
        said = ""
        last_beat = 0.0
        while not stopping.is_set():
            if reloading.is_set():
                reloading.clear()
                _reload(service, load, notifier)
            service.tick()
            status = service.status
            if _words(status) != _words(said):
                log.info("fp4tune daemon: %s", status)
            said = status
            notifier.status(status)
            now = time.monotonic()
            if serving is not None and not serving.alive:
                raise Refused("the HTTP server ended")
            if notifier.watchdog and now - last_beat > notifier.watchdog / 4:
                last_beat = now
                notifier.tell("WATCHDOG=1")
            wake.wait(service.pause)
            wake.clear()
        notifier.tell("STOPPING=1", "STATUS=ending")
    return SAFE


def _words(status: str) -> str:
    """A status without its numbers: how busy a GPU is need not be logged each second."""
    return re.sub(r"\d+", "", status)


def _serve(
    service: Service, config: configuring.Config, stack: contextlib.ExitStack
) -> Serving | None:
    if config.http.listen == configuring.NOWHERE:
        return None
    from .http import Serving, application

    app = application(service.board, lambda: _token(service.config))
    serving = Serving(app, config.http.listen, config.http.connections)
    stack.callback(serving.stop)
    return serving


def _own(place: Path, stack: contextlib.ExitStack) -> None:
    """Be the only daemon of this state. Raises Refused."""
    try:
        os.makedirs(place, exist_ok=True)
        stack.enter_context(state.exclusive(place / LOCK, "the daemon of this state"))
    except Busy as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{place}: {error.strerror}") from None


def _token(config: configuring.Config) -> str | None:
    """The token as the file has it now, so that it can be changed; None: read-only."""
    if config.http.token_file is None:
        return None
    try:
        return configuring.token(config.http.token_file)
    except Refused:
        return None


def _reload(service: Service, load: Callable[[], configuring.Config], notifier: Notifier) -> None:
    notifier.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        fresh = load()
        if fresh.state_dir != service.config.state_dir:
            raise Refused("state: it is changed by a restart only")
        if fresh.http != service.config.http:
            log.info("fp4tune daemon: http is changed by a restart only, but for the token's file")
        service.reload(fresh)
        log.info("fp4tune daemon: the configuration was read again")
    except Refused as error:
        log.warning("fp4tune daemon: the configuration stays as it was: %s", error)
    notifier.tell("READY=1", f"STATUS={service.status}")
