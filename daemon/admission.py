"""Who may keep a connection to the daemon open, and for how long.

A connection is worth what it asks: one that does not ask, asks slowly or does not read its answer
is closed at a deadline, and before it where the places are taken. So no client, and no user with
any number of clients, can keep others from being answered. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 5.0
"""For a request to be here whole, head and body, from when its connection could begin with it."""
ANSWER_SECONDS = 15.0
"""For its answer to be taken by the client, from then on."""
MOST_REQUESTS = 1000
"""Requests of one connection; it is closed after that, for the next to have its place."""
MOST_ACTIVE = 16
"""Requests of one peer that are answered at a time; so others need not wait for many of its own."""

_SAID = b'{"error": "too many connections at once; try again"}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(_SAID), _SAID)
)


@dataclass(frozen=True, slots=True)
class Places:
    """How many connections there may be, in all and of one peer."""

    in_all: int
    per_peer: int


class Peer:
    """What one peer has here: its connections, the oldest first; how many of its requests are being
    answered; and the connections whose next request waits for one of those to end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connections: OrderedDict[Guarded, None] = OrderedDict()
        self.active = 0
        self.waiting: OrderedDict[Guarded, None] = OrderedDict()

    def next_ones(self) -> None:
        """Let those go on that wait, as far as there is room."""
        while self.waiting and self.active < MOST_ACTIVE:
            self.waiting.popitem(last=False)[0].go_on()


class Door:
    """The connections there are, by peer."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.peers: dict[str, Peer] = {}
        self.turned_out = 0
        """Connections that were closed for others, or at a deadline."""
        self._count = 0

    def enter(self, one: Guarded, name: str) -> Peer:
        """Let `one` in, and close another where there are too many: of this peer, else of the peer
        that has most. Of those it has, the oldest that asks nothing now, else the oldest."""
        peer = self.peers.setdefault(name, Peer(name))
        peer.connections[one] = None
        self._count += 1
        if len(peer.connections) > self.places.per_peer:
            self._turn_out(peer, one)
        elif self._count > self.places.in_all:
            self._turn_out(max(self.peers.values(), key=lambda each: len(each.connections)), one)
        return peer

    def leave(self, one: Guarded, peer: Peer) -> None:
        peer.waiting.pop(one, None)
        if one in peer.connections:
            del peer.connections[one]
            self._count -= 1
            if not peer.connections:
                del self.peers[peer.name]
        peer.next_ones()

    def _turn_out(self, peer: Peer, last: Guarded) -> None:
        others = [one for one in peer.connections if one is not last]
        idle = (one for one in others if not one.asked)
        chosen = next(idle, None) or (others[0] if others else last)
        self.leave(chosen, peer)  # at once: its end comes later, and others before it
        chosen.turn_out()


def behind_door(door: Door) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol, with deadlines, behind `door`."""

    class Behind(Guarded):
        pass

    Behind.door = door
    return Behind


class Guarded(H11Protocol):
    """One connection: closed where its request or its answer takes too long, and read only while
    its peer has fewer than `MOST_ACTIVE` requests that are being answered."""

    door: Door
    asked: bool
    """Whether a request is here whole, and not answered to its end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._requests = 0
        self.asked = False
        self._counted = False
        self._held = b""
        self._timer: asyncio.TimerHandle | None = None
        self._within(REQUEST_SECONDS)
        self._peer = self.door.enter(self, peer_of(transport))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._count(False)
        super().connection_lost(exc)
        self.door.leave(self, self._peer)

    def data_received(self, data: bytes) -> None:
        if not self._counted and self._peer.active >= MOST_ACTIVE:
            self._held += data
            self._peer.waiting[self] = None
            self.flow.pause_reading()
            return
        super().data_received(data)
        self._count(self._answering)

    def go_on(self) -> None:
        """Take up what was held back."""
        if not self.transport.is_closing():
            data, self._held = self._held, b""
            self.flow.resume_reading()
            self.data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        # The head may have come with the body's end, or long before it.
        if self._answering and not self.cycle.more_body and not self.asked:
            self.asked = True
            self._within(ANSWER_SECONDS)

    def on_response_complete(self) -> None:
        self._requests += 1
        self.asked = False
        self._within(REQUEST_SECONDS)
        if self._requests >= MOST_REQUESTS:
            self.transport.close()
        else:
            super().on_response_complete()  # which may begin with the next of a pipeline
        self._count(self._answering)
        self._peer.next_ones()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count(self, active: bool) -> None:
        self._peer.active += active - self._counted
        self._counted = active

    def _within(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self.door.turned_out += 1
        self.transport.abort()

    def turn_out(self) -> None:
        """Close it for another: with a word where none was said yet."""
        self.door.turned_out += 1
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(_FULL)
        # What a client does not read is not waited for.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()


# -- who is at the other end


def peer_of(transport: asyncio.BaseTransport) -> str:
    """The user at the other end of a connection of this machine, as ``uid 1000``; else its address.

    Linux says whose a Unix socket is (SO_PEERCRED, socket(7)), and whose a TCP socket of this
    machine is through sock_diag(7).
    """
    connection = transport.get_extra_info("socket")
    try:
        if connection.family == socket.AF_UNIX:
            size = struct.calcsize("3i")
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            return f"uid {struct.unpack('3i', raw)[1]}"
        own, other = connection.getsockname(), connection.getpeername()
        uid = _owner(connection.family, own, other)
        return str(other[0]) if uid is None else f"uid {uid}"
    except (OSError, AttributeError):
        return "unknown"


_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NO_COOKIE = b"\xff" * 8
_HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_REQUEST = struct.Struct("=BBBxI")
"""The head of inet_diag_req_v2: family, protocol, extensions, states."""
_UID_AT = _HEADER.size + 4 + 48 + 12
"""Of idiag_uid: behind the header, four bytes, the socket's id, and three counters."""


def _owner(family: int, own: tuple[Any, ...], other: tuple[Any, ...]) -> int | None:
    """The user of the socket at the other end of a TCP connection within this machine, or None."""

    def packed(host: str) -> bytes:
        return socket.inet_pton(family, host.partition("%")[0]).ljust(16, b"\0")

    # The other end's socket has our address as its peer.
    ports = struct.pack("!HH", other[1], own[1])
    identity = ports + packed(other[0]) + packed(own[0]) + struct.pack("=I", 0) + _NO_COOKIE
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + identity
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.setblocking(False)
        kernel.sendto(head + body, (0, 0))
        answer = kernel.recv(4096)
    if len(answer) < _UID_AT + 4 or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    return int(struct.unpack_from("=I", answer, _UID_AT)[0])
