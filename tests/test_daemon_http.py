"""The daemon's HTTP side under clients that mean no good: nobody can keep others from an answer."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from math import inf

import pytest
import schemas
from hypothesis import given, settings
from hypothesis import strategies as st
from test_daemon_evidence import put

from fp4tune.cache import facts
from fp4tune.daemon.config import DaemonConfig, HttpOptions

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from fp4tune.daemon import admission, board  # noqa: E402
from fp4tune.daemon import http as serving_http  # noqa: E402
from fp4tune.daemon.admission import Door, Places  # noqa: E402
from fp4tune.daemon.http import Serving, application  # noqa: E402
from fp4tune.daemon.service import Service  # noqa: E402
from fp4tune.words import STATUS_WORDS  # noqa: E402

PLACES = 24
HALF = b"GET /v1/choices HTTP/1.1\r\nHost: x\r\n"
"""A request without the line that would end its head."""


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A server with few places on TCP and a socket for the health, and deadlines of a moment."""
    monkeypatch.setattr(admission, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(admission, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(serving_http, "READ_SECONDS", 0.3)
    # The service looks once here, and a slow machine must not make that too long ago.
    monkeypatch.setattr(board, "BEAT_SECONDS", inf)
    put(tmp_path / "state", tmp_path / "site", ("fast", "1.0"))
    options = HttpOptions(
        "127.0.0.1:0",
        connections=PLACES,
        connections_per_peer=PLACES // 2,
        health=f"unix:{tmp_path}/health.sock",
    )
    service = Service(DaemonConfig(state=str(tmp_path / "state"), gpus=("none",), http=options))
    service.start()
    service.revalidated = True
    service.tick()
    found = Serving(application(service.board, lambda: "a-token-of-enough-characters"), options)
    yield found
    found.stop()
    service.stop()


def place_of(serving: Serving) -> tuple[str, int]:
    host, _, port = serving.where.rpartition(":")
    return host, int(port)


def connected(serving: Serving) -> socket.socket:
    return socket.create_connection(place_of(serving), timeout=30)


def ask(serving: Serving, path: str) -> tuple[int, bytes]:
    client = http.client.HTTPConnection(*place_of(serving), timeout=30)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def well(serving: Serving) -> bool:
    return [ask(serving, path)[0] for path in ("/healthz", "/readyz")] == [200, 200]


def heard(client: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_documents_begin_with_the_status_and_are_what_their_schemas_say(serving, tmp_path):
    found = facts.gather(tmp_path / "state")
    word = STATUS_WORDS[found["status"]]
    for path, name in (
        ("/readyz", "HttpReady"),
        ("/healthz", "HttpHealth"),
        ("/v1/choices", "HttpChoices"),
        ("/v1/choices?m=1&n=4096&k=4096", "HttpDecision"),
        ("/v1/findings", "HttpFindings"),
    ):
        document = json.loads(ask(serving, path)[1])
        schemas.hold(name, document)
        if name in ("HttpReady", "HttpHealth", "HttpChoices"):
            assert (document["status"], document["do"]) == (word, found["do"])
            assert document["since"] == found["since"] and document["reason"] == found["reason"]
    numbers = ask(serving, "/metrics")[1].decode()
    assert f'fp4tune_status{{status="{word}"}} 1.0' in numbers
    assert numbers.count("fp4tune_status{") == 5 and numbers.count('"} 1.0') >= 1


def test_requests_that_are_never_finished_keep_nobody_out(serving):
    with ExitStack() as stack:
        for _ in range(4 * PLACES):
            client = stack.enter_context(connected(serving))
            client.sendall(HALF)
        assert well(serving)
        assert sum(len(p.connections) for p in serving.door.peers.values()) <= PLACES
        for _ in range(4 * PLACES):  # and while more of them come
            client = stack.enter_context(connected(serving))
            client.sendall(HALF)
            assert ask(serving, "/readyz")[0] == 200
    assert serving.door.turned_out >= 7 * PLACES


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"GET /read",
        HALF,
        b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n{",
        b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\nGET /readyz HTTP/1.1\r\n",
    ],
)
def test_a_request_has_a_deadline_however_slowly_it_comes(serving, raw):
    """A byte now and then does not put it off; what was asked before is answered."""
    with connected(serving) as client:
        client.sendall(raw)
        client.settimeout(0.1)
        data = b""
        for _ in range(300):
            try:
                part = client.recv(65536)
                if not part:
                    break
                data += part
            except TimeoutError:
                pass
            except ConnectionError:
                break
            try:
                client.sendall(b"X")
            except OSError:
                break
        else:
            pytest.fail("it was never closed")
    assert data.count(b"HTTP/1.1 200") == raw.count(b"\r\n\r\nGET")
    assert well(serving)


def test_an_answer_that_nobody_reads_is_given_up(serving, monkeypatch):
    """Its client asks again and again, and takes nothing: the buffers fill, and it is closed."""
    with connected(serving) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        wanted = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20
        deadline = time.monotonic() + 300  # megabytes of buffers, page by page
        while time.monotonic() < deadline:
            try:
                client.send(wanted)
            except BlockingIOError:
                time.sleep(0.05)
            except ConnectionError:
                break
        else:
            pytest.fail("it was never closed")
    deadline = time.monotonic() + 60  # what it had asked for before is answered first
    while not well(serving):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("question", "status"),
    [
        ("m=8&experts=128,8,768,2048", 200),
        ("m=8&experts=32,4,2880,2880,swiglu-oai&format=mxfp4", 200),
        ("m=8&experts=128,8,768,2048&n=4096", 400),
        ("m=8&experts=128,8", 400),
        ("m=8&experts=", 400),
        ("experts=128,8,768,2048", 400),
    ],
)
def test_routed_experts_are_asked_for_as_a_probe_takes_them(serving, question, status):
    answered, body = ask(serving, f"/v1/choices?{question}")
    assert answered == status
    document = json.loads(body)
    assert (document["status"] == "unproven") if status == 200 else list(document) == ["error"]


def test_requests_that_come_all_at_once_are_answered_one_by_one(serving):
    with connected(serving) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        client.shutdown(socket.SHUT_WR)
        assert heard(client).count(b"HTTP/1.1 200 OK") == 50


def test_one_peers_requests_are_answered_a_few_at_a_time_and_all_in_the_end(serving, monkeypatch):
    """Half a dozen that are slow, of a peer that may have two: the others wait, and get theirs."""
    monkeypatch.setattr(admission, "MOST_ACTIVE", 2)
    running, most = [], []

    def slow(*_):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return {}

    monkeypatch.setattr(serving_http.Files, "decide", slow)
    question = b"GET /v1/choices?m=8&n=4096&k=2048 HTTP/1.1\r\nHost: x\r\n"
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(serving)) for _ in range(6)]
        for client in clients:
            client.sendall((question + b"\r\n") * 2 + question + b"Connection: close\r\n\r\n")
        assert [heard(client).count(b"HTTP/1.1 200 OK") for client in clients] == [3] * 6
    assert len(most) == 18 and max(most) == 2
    assert not serving.door.peers or all(p.active == 0 for p in serving.door.peers.values())


def test_a_connection_has_only_so_many_requests(serving, monkeypatch):
    monkeypatch.setattr(admission, "MOST_REQUESTS", 3)
    with connected(serving) as client:
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        assert heard(client).count(b"HTTP/1.1 200 OK") == 3


def test_who_is_closed_for_another_is_told_so(serving):
    first = connected(serving)
    first.sendall(HALF)
    others = [connected(serving) for _ in range(PLACES)]
    assert b"503 Service Unavailable" in heard(first)
    for one in (first, *others):
        one.close()


def test_files_that_hang_keep_nobody_from_the_health(serving, monkeypatch):
    """The readers of files are few, and so are those that hang: the others are told, in time."""
    over = threading.Event()

    def hang(*_):
        over.wait(60)
        return {}

    monkeypatch.setattr(serving_http.Files, "decide", hang)
    before = threading.active_count()
    asked = [ask(serving, "/v1/choices?m=8&n=4096&k=2048")[0] for _ in range(6)]
    assert asked == [503] * 6 and well(serving)
    assert threading.active_count() <= before + serving_http.READERS
    over.set()


def test_the_health_has_a_socket_of_its_own_for_the_daemons_user(serving, tmp_path):
    path = tmp_path / "health.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with ExitStack() as stack:
        for _ in range(2 * PLACES):
            stack.enter_context(connected(serving)).sendall(HALF)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            _, _, body = heard(client).partition(b"\r\n\r\n")
            assert json.loads(body)["ready"] is True
        assert by_socket(path, "/healthz").returncode == 0
        done = by_socket(path, "/nothing")
        assert done.returncode == 1 and "Not Found" in done.stdout
    serving.stop()
    assert not path.exists()
    done = by_socket(path, "/healthz")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def by_socket(path, what: str) -> subprocess.CompletedProcess[str]:
    """As a container's probes ask."""
    command = [sys.executable, "-m", "fp4tune.daemon.ask", str(path), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


FLOOD = """
import os, socket, sys
os.setuid(65534)
place = (sys.argv[1], int(sys.argv[2]))
held = []
for _ in range(200):
    held.append(socket.socket())
    held[-1].connect(place)
    held[-1].sendall(b"GET /")
print("flooded", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_users_connections_take_no_place_of_ours(serving):
    """Those of one user are told apart from those of another, on TCP too."""
    mine = connected(serving)
    mine.sendall(HALF)
    command = [sys.executable, "-S", "-c", FLOOD, *map(str, place_of(serving))]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"flooded\n"
    mine.sendall(b"Connection: close\r\n\r\n")
    assert b"HTTP/1.1 200 OK" in heard(mine)
    mine.close()
    other.communicate(timeout=60)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_user_at_the_other_end_is_known(family):
    with socket.socket(family) as listening:
        try:
            listening.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        except OSError:
            pytest.skip("there is no such address here")
        listening.listen()
        with socket.socket(family) as client:
            client.connect(listening.getsockname())
            ours, _ = listening.accept()
            own, other = ours.getsockname(), ours.getpeername()
            assert admission._owner(family, own, other) == os.geteuid()
            ours.close()


# -- the rule itself


class Held:
    """A connection as the door knows it."""

    def __init__(self, door: Door, peer: str, asked: bool) -> None:
        self.door, self.peer, self.asked, self.closed = door, peer, asked, False

    def turn_out(self) -> None:
        self.closed = True


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=80),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_whatever_comes_the_places_are_kept_and_the_fullest_peer_pays(steps, in_all, per_peer):
    door = Door(Places(in_all, per_peer))
    here: list[Held] = []

    def of(peer: str) -> int:
        return sum(one.peer == peer for one in here)

    for peer, asked, leaves in steps:
        if leaves and here:
            one = here.pop(0)
            door.leave(one, door.peers[one.peer])
            continue
        new = Held(door, peer, asked)
        before = {name: of(name) + (name == peer) for name in "abc"}
        door.enter(new, peer)
        here.append(new)
        gone = [one for one in here if one.closed]
        here = [one for one in here if not one.closed]
        assert len(here) <= in_all and all(of(name) <= per_peer for name in "abc")
        assert len(gone) <= 1
        for one in gone:
            assert one.peer == peer or before[one.peer] == max(before.values())
            assert one is not new or before[peer] == 1, "whoever comes is let in where he can be"
    for one in here:
        door.leave(one, door.peers[one.peer])
    assert not door.peers and door._count == 0
