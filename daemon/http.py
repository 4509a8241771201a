"""The daemon's HTTP side: starlette on uvicorn, on localhost or a Unix socket, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..cache import quarantine, quarantine_store
from ..cache import reader as reading
from ..cache.errors import StateError
from ..errors import Refused
from ..probes.grouped.problem import experts_row
from .admission import Door, Places, behind_door
from .board import Board
from .config import HttpOptions, address
from .metrics import CONTENT_TYPE, Metrics

MOST_BYTES = 4096
"""Of a request's body."""
READERS = 4
"""Threads that read or write files for requests; the event loop itself never does."""
READ_SECONDS = 5.0
"""Until a request is told that the files do not answer."""
_BACKLOG = 1024
"""Connections that wait in the kernel."""
_AT_ONCE = 32
"""Connections that are accepted before the event loop does something else."""
_MOST_SCOPES = 64
T = TypeVar("T")
_NAMES = (
    "m", "n", "k", "experts", "format", "activation", "out_dtype", "arch", "gpu", "profile",
    "layout",
)  # fmt: skip
_FAULT = (
    "backend", "m", "n", "k", "tactic", "scope", "format", "activation", "out_dtype", "groups",
    "reason",
)  # fmt: skip


class Files:
    """Work on files for requests, in a few threads: a disk that hangs, hangs those alone."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(READERS, "http files")
        self._lock = Lock()
        self._readers: dict[tuple[str | None, ...], reading.Reader] = {}

    async def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns. Raises TimeoutError where there is nothing in `READ_SECONDS`."""
        loop = asyncio.get_running_loop()
        found = loop.run_in_executor(self._pool, function, *arguments)
        try:
            return await asyncio.wait_for(found, READ_SECONDS)
        except asyncio.TimeoutError:  # another class than TimeoutError before Python 3.11
            raise TimeoutError from None

    def decide(
        self,
        state_dir: str,
        scope: tuple[str | None, str | None, str | None],
        asked: dict[str, Any],
    ) -> dict[str, Any]:
        """One decision of a reader, as a document; to be called through `work`."""
        key = (state_dir, *scope)
        with self._lock:
            reader = self._readers.get(key)
        if reader is None:
            reader = reading.Reader(os.path.join(state_dir, "choices.db"), False, *scope)
            with self._lock:
                if len(self._readers) >= _MOST_SCOPES:
                    self._readers.clear()
                self._readers[key] = reader
        decision = reader.choose(**asked)
        return {name: getattr(decision, name) for name in decision.__slots__}


class AsciiJson(JSONResponse):
    """A document in ASCII: what a name holds is escaped, also where it is looked at raw."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).replace("\x7f", "\\u007f").encode("ascii")


def application(board: Board, token: Callable[[], str | None]) -> Starlette:
    """The endpoints over `board`. `token` is asked at each write; None: nothing can be written."""
    metrics = Metrics(board)
    files = Files()

    def bytes_(body: bytes, kind: str = "application/json", status: int = 200) -> Response:
        return Response(body, status, media_type=kind)

    async def readyz(request: Request) -> Response:
        said = {**board.status, "ready": board.ready, "why": board.why}
        return AsciiJson(said, 200 if board.ready else 503)

    async def healthz(request: Request) -> Response:
        document = {**board.status, "healthy": board.healthy, **board.health}
        return AsciiJson(document, 200 if board.healthy else 503)

    async def numbers(request: Request) -> Response:
        return bytes_(await files.work(metrics.text), CONTENT_TYPE)

    async def choices(request: Request) -> Response:
        if not request.query_params:
            return bytes_(board.choices)
        try:
            asked, scope = _question(dict(request.query_params))
        except ValueError as error:
            return _no(400, str(error))
        return AsciiJson(await files.work(files.decide, board.state_dir, scope, asked))

    async def findings(request: Request) -> Response:
        recent = board.recent_findings
        return bytes_(recent if recent is not None else await files.work(board.findings))

    async def witness(request: Request) -> Response:
        return bytes_(board.witness)

    async def faults(request: Request) -> Response:
        wanted = await files.work(token)
        if wanted is None:
            return _no(403, "this daemon is read-only: no http.token_file is configured")
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode()):
            return _no(401, "the token is missing or another", {"WWW-Authenticate": "Bearer"})
        try:
            body = await _body(request)
            entry = _quarantine_asked(body, board.backends)
        except ClientDisconnect:
            return _no(400, "the request ended early")
        except ValueError as error:
            return _no(400, str(error))
        folder = quarantine_store.place(board.state_dir)
        try:
            where = await files.work(quarantine_store.write, entry, folder)
        except StateError as error:
            return _no(507, str(error))
        return AsciiJson({"quarantine": entry.json(), "shared": where}, 201)

    async def hangs(request: Request, error: Exception) -> Response:
        return _no(503, f"the state directory's files did not answer in {READ_SECONDS:g} s")

    return Starlette(
        routes=[
            Route("/readyz", readyz),
            Route("/healthz", healthz),
            Route("/metrics", numbers),
            Route("/v1/choices", choices),
            Route("/v1/findings", findings),
            Route("/v1/witness", witness),
            Route("/v1/faults", faults, methods=["POST"]),
        ],
        exception_handlers={TimeoutError: hangs},
    )


def _no(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return AsciiJson({"error": sentence}, status, headers)


def _question(
    given: dict[str, str],
) -> tuple[dict[str, Any], tuple[str | None, str | None, str | None]]:
    """The arguments of `Reader.choose`, and the reader's scope. Raises ValueError."""
    for name in given:
        if name not in _NAMES:
            raise ValueError(f"there is no parameter {name[:40]!r}; there are {', '.join(_NAMES)}")
    asked: dict[str, Any] = {}
    numbers: tuple[str, ...] = ("m", "n", "k")
    if "experts" in given:
        if beside := [name for name in ("n", "k", "activation", "out_dtype") if name in given]:
            raise ValueError(f"{beside[0]} is of a linear layer, and experts names another")
        asked |= experts_row(given["experts"])
        numbers = ("m",)
    for name in numbers:
        text = given.get(name, "")
        if not (text.isascii() and text.isdecimal() and len(text) <= 12):
            raise ValueError(f"{name} is needed, a whole number")
        asked[name] = int(text)
    for name in ("format", "activation", "out_dtype", "layout"):
        if name in given:
            asked[name] = given[name]
    return asked, (given.get("arch"), given.get("gpu"), given.get("profile"))


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ValueError(f"a fault has at most {MOST_BYTES} bytes")
    return body


def _quarantine_asked(body: bytes, backends: frozenset[str]) -> quarantine.Quarantine:
    """The quarantine that a request asks for. Raises ValueError, one sentence."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    if not isinstance(given, dict):
        raise ValueError("the body is not a JSON object")
    for name in given:
        if name not in _FAULT:
            raise ValueError(f"there is no field {name[:40]!r}; there are {', '.join(_FAULT)}")
    backend = given.pop("backend", None)
    if backend not in backends:
        raise ValueError("backend is needed, one that is published here")
    try:
        m, n, k = (given.pop(name, 0) for name in ("m", "n", "k"))
        if not all(type(value) is int for value in (m, n, k)):
            raise ValueError("m, n and k are whole numbers")
        own = {name: given.pop(name) for name in ("tactic", "reason") if name in given}
        return quarantine.make(backend, quarantine.Reach(m, n, k, **given), **own)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


class Serving:
    """The servers in their threads: started once they listen, stopped within a second or two.

    The health's socket has a thread and an event loop of its own: it does not wait for the others,
    whatever they do. Raises Refused where it cannot listen.
    """

    def __init__(self, app: Starlette, options: HttpOptions) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not a line per bad request
        places = Places(options.connections, options.connections_per_peer)
        self.listen = options.listen
        self.door = Door(places)
        self._listening = [Listening("http", app, _bound_socket(options.listen, 0o666), self.door)]
        self.where = self._listening[0].where or options.listen
        if options.health is not None:
            health = _bound_socket(options.health, 0o600)
            self._listening.append(Listening("health", app, health, Door(places)))
        deadline = time.monotonic() + 20
        for each in self._listening:
            if not each.started(deadline):
                self.stop()
                raise Refused(f"http.listen: nothing listens on {options.listen}")

    @property
    def alive(self) -> bool:
        return all(each.alive for each in self._listening)

    def stop(self) -> None:
        for each in self._listening:
            each.end()
        for each in self._listening:
            each.close()


class Listening:
    """One server on one socket that is bound, in a thread. `where` is a TCP socket's address."""

    def __init__(self, name: str, app: Starlette, bound: socket.socket, door: Door) -> None:
        self._socket = bound
        place = bound.getsockname()
        self._path = place if isinstance(place, str) else None
        self.where = "" if isinstance(place, str) else f"{place[0]}:{place[1]}"
        config = uvicorn.Config(
            app,
            http=behind_door(door),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=_AT_ONCE,
            timeout_keep_alive=4,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=16384,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):
            asyncio.run(self._server.serve(sockets=[self._socket]))

    def started(self, deadline: float) -> bool:
        while not self._server.started and self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._server.started:
            self._socket.listen(_BACKLOG)  # the server set it to what it accepts at once
        return self._server.started

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self._server.should_exit = True

    def close(self) -> None:
        self._thread.join(2.5)
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def _bound_socket(listen: str, mode: int) -> socket.socket:
    """A socket that listens there; `mode` is that of a Unix socket's file. Raises Refused."""
    place = address(listen)
    try:
        if isinstance(place, str):
            _clear(place)
            found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)
            try:
                found.bind(place)
            finally:
                os.umask(before)
            os.chmod(place, mode)  # 0666: it serves what any user may know; writing takes the token
        else:
            family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
            found = socket.socket(family, socket.SOCK_STREAM)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
        found.listen(_BACKLOG)
    except OSError as error:
        raise Refused(f"http.listen: {listen}: {error.strerror}") from None
    return found


def _clear(path: str) -> None:
    """Remove a socket that a daemon before this one left; another's that answers is refused."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise Refused(f"http.listen: {path} is there, and no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise Refused(f"http.listen: another process answers at {path}")
