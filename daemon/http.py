"""The daemon's HTTP side: starlette on uvicorn, on localhost or a Unix socket, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import socket
import stat
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..cache import quarantine
from ..cache import reader as reading
from ..cache.errors import StateError
from ..errors import Refused
from .board import Board
from .config import address
from .metrics import CONTENT_TYPE, Metrics

MOST_BYTES = 4096
"""Of a request's body."""
_NAMES = ("m", "n", "k", "format", "activation", "out_dtype", "arch", "gpu", "profile", "layout")
_FAULT = (
    "backend", "m", "n", "k", "tactic", "scope", "format", "activation", "out_dtype", "groups",
    "reason",
)  # fmt: skip


def application(board: Board, token: Callable[[], str | None]) -> Starlette:
    """The endpoints over `board`. `token` is asked at each write; None: nothing can be written."""
    metrics = Metrics(board)
    readers: dict[tuple[str | None, ...], reading.Reader] = {}

    def bytes_(body: bytes, kind: str = "application/json", status: int = 200) -> Response:
        return Response(body, status, media_type=kind)

    async def readyz(request: Request) -> Response:
        said = {"ready": board.ready, "why": board.why}
        return JSONResponse(said, 200 if board.ready else 503)

    async def healthz(request: Request) -> Response:
        document = {"healthy": board.healthy, **board.health}
        return JSONResponse(document, 200 if board.healthy else 503)

    async def numbers(request: Request) -> Response:
        return bytes_(metrics.text(), CONTENT_TYPE)

    async def choices(request: Request) -> Response:
        if not request.query_params:
            return bytes_(board.choices)
        try:
            asked, scope = _question(dict(request.query_params))
        except ValueError as error:
            return _no(400, str(error))
        reader = readers.get(scope)
        if reader is None:
            if len(readers) >= 64:
                readers.clear()
            reader = readers[scope] = reading.Reader(
                os.path.join(board.state_dir, "choices.db"), False, *scope
            )
        decision = reader.choose(**asked)
        return JSONResponse({name: getattr(decision, name) for name in decision.__slots__})

    async def findings(request: Request) -> Response:
        recent = board.recent_findings
        return bytes_(recent if recent is not None else await run_in_threadpool(board.findings))

    async def faults(request: Request) -> Response:
        wanted = token()
        if wanted is None:
            return _no(403, "this daemon is read-only: no http.token_file is configured")
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {wanted}".encode()):
            return _no(401, "the token is missing or another", {"WWW-Authenticate": "Bearer"})
        try:
            body = await _body(request)
            entry = _fault(body, board.backends)
        except ClientDisconnect:
            return _no(400, "the request ended early")
        except ValueError as error:
            return _no(400, str(error))
        folder = quarantine.spools(board.state_dir)[-1]
        try:
            where = await run_in_threadpool(quarantine.write, entry, folder)
        except StateError as error:
            return _no(507, str(error))
        return JSONResponse({"quarantine": entry.json(), "shared": where}, 201)

    return Starlette(
        routes=[
            Route("/readyz", readyz),
            Route("/healthz", healthz),
            Route("/metrics", numbers),
            Route("/v1/choices", choices),
            Route("/v1/findings", findings),
            Route("/v1/faults", faults, methods=["POST"]),
        ]
    )


def _no(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _question(
    given: dict[str, str],
) -> tuple[dict[str, Any], tuple[str | None, str | None, str | None]]:
    """The arguments of `Reader.choose`, and the reader's scope. Raises ValueError."""
    for name in given:
        if name not in _NAMES:
            raise ValueError(f"there is no parameter {name[:40]!r}; there are {', '.join(_NAMES)}")
    asked: dict[str, Any] = {}
    for name in ("m", "n", "k"):
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


def _fault(body: bytes, backends: frozenset[str]) -> quarantine.Quarantine:
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
        return quarantine.make(backend, m, n, k, **given)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


class Serving:
    """The server in its thread: started once it listens, stopped within a second or two."""

    def __init__(self, app: Starlette, listen: str, connections: int) -> None:
        self.listen = listen
        self.where = listen
        self._socket = _bound(listen)
        place = self._socket.getsockname()
        if isinstance(place, tuple):
            self.where = f"{place[0]}:{place[1]}"
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=connections,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=16384,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._run, daemon=True, name="http")
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._server.started:
            raise Refused(f"http.listen: nothing listens on {listen}")

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):
            asyncio.run(self._server.serve(sockets=[self._socket]))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(2.5)
        self._socket.close()
        found = address(self.listen)
        if isinstance(found, str):
            with contextlib.suppress(OSError):
                os.unlink(found)


def _bound(listen: str) -> socket.socket:
    """A socket that listens there. Raises Refused."""
    place = address(listen)
    try:
        if isinstance(place, str):
            _clear(place)
            found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            found.bind(place)
            os.chmod(place, 0o666)  # it serves what any user may know; writing takes the token
        else:
            family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
            found = socket.socket(family, socket.SOCK_STREAM)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(place)
        found.listen(1024)
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
