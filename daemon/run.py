"""The daemon from start to end: signals, systemd, HTTP, and the loop in between."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import select
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..errors import SAFE, Refused
from . import config as configuring
from .http import Serving, application
from .notify import Notifier
from .service import Service

log = logging.getLogger("fp4tune.daemon")
PATIENCE = 8.0
"""Seconds that ending in order may take; a file that never answers must not keep the process."""
_OTHER_FILES = 512
"""Descriptors that may be open besides the connections."""


def run(config: configuring.DaemonConfig, load: Callable[[], configuring.DaemonConfig]) -> int:
    """Run until SIGTERM or SIGINT; SIGHUP calls `load`, for another. Returns the exit code.

    Raises Refused or StateError where it cannot start.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    notifier = Notifier()
    service = Service(config)
    with contextlib.ExitStack() as stack:
        wishes = stack.enter_context(Wishes())
        service.start()
        stack.callback(service.stop)
        serving = _serve_http(service, config, stack)
        where = serving.where if serving else configuring.NOWHERE
        log.info("fp4tune daemon: state %s, http %s", config.state_dir, where)
        notifier.tell("READY=1", f"STATUS={service.status}")
        said = ""
        last_beat = 0.0
        while not wishes.end:
            if wishes.reload:
                wishes.reload = False
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
            wishes.wait(service.pause)
        notifier.tell("STOPPING=1", "STATUS=ending")
    return SAFE


class Wishes:
    """What signals ask for: `end` (SIGTERM, SIGINT) and `reload` (SIGHUP).

    A handler runs between any two steps of the loop, so it takes no lock: the kernel writes a byte
    to a pipe, on which the loop waits. Where the loop does not end in `PATIENCE` seconds, as on a
    file system that does not answer, the process ends without it; its children end with it.
    """

    def __init__(self) -> None:
        self.end = False
        self.reload = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Wishes:
        self._pipe, self._write = os.pipe()
        for fd in (self._pipe, self._write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number, handler in (
            (signal.SIGTERM, self._ends),
            (signal.SIGINT, self._ends),
            (signal.SIGHUP, self._reloads),
            (signal.SIGALRM, lambda number, frame: os._exit(SAFE)),
        ):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            if number != signal.SIGALRM or not self.end:  # the last resort stays to the very end
                signal.signal(number, handler)
        os.close(self._pipe)
        os.close(self._write)

    def _ends(self, number: int, frame: FrameType | None) -> None:
        if not self.end:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        self.end = True

    def _reloads(self, number: int, frame: FrameType | None) -> None:
        self.reload = True

    def wait(self, seconds: float) -> None:
        """Until a signal comes, for up to that long."""
        select.select([self._pipe], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._pipe, 4096)


def _words(status: str) -> str:
    """A status without its numbers: how busy a GPU is need not be logged each second."""
    return re.sub(r"\d+", "", status)


def _serve_http(
    service: Service, config: configuring.DaemonConfig, stack: contextlib.ExitStack
) -> Serving | None:
    if config.http.listen == configuring.NOWHERE:
        return None
    _raise_limit(config.http.connections + _OTHER_FILES)
    app = application(service.board, lambda: _token(service.config))
    serving = Serving(app, config.http)
    stack.callback(serving.stop)
    return serving


def _raise_limit(files: int) -> None:
    """Let this process have that many descriptors open, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _token(config: configuring.DaemonConfig) -> str | None:
    """The token as the file has it now, so that it can be changed; None: read-only."""
    if config.http.token_file is None:
        return None
    try:
        return configuring.token(config.http.token_file)
    except Refused:
        return None


def _reload(
    service: Service, load: Callable[[], configuring.DaemonConfig], notifier: Notifier
) -> None:
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
