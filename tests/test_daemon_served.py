"""What the daemon answers over HTTP, and what may be written there."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from daemons import TOKEN, Client, documented
from test_daemon_evidence import put

from fp4tune.cache import quarantine_store, reader
from fp4tune.daemon import config as configuring
from fp4tune.daemon.config import DaemonConfig, HttpOptions
from fp4tune.errors import Refused

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from fp4tune.daemon.http import Serving, application  # noqa: E402
from fp4tune.daemon.service import Service  # noqa: E402


@pytest.fixture
def node(tmp_path):
    """A service over a published state, and its server on a Unix socket, with a token."""
    put(tmp_path / "state", tmp_path / "site", ("fast", "1.0"), ("torch-dequant", "2.0"))
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    listen = f"unix:{tmp_path}/d.sock"
    config = DaemonConfig(
        state=str(tmp_path / "state"), gpus=("none",), http=HttpOptions(listen, str(token))
    )
    service = Service(config)
    service.start()
    service.revalidated = True
    service.tick()
    app = application(service.board, lambda: configuring.token(str(token)))
    serving = Serving(app, config.http)
    yield service, serving
    serving.stop()
    service.stop()
    assert not os.path.exists(listen[5:])


def ask(serving: Serving, path: str, method="GET", body=None, **headers):
    client = Client(serving.listen[5:])
    try:
        client.request(method, path, body, headers)
        answer = client.getresponse()
        raw = answer.read()
        kind = answer.getheader("content-type", "")
        return answer.status, json.loads(raw) if "json" in kind else raw.decode()
    finally:
        client.close()


def test_what_is_published_is_served(node):
    _, serving = node
    assert ask(serving, "/readyz")[0] == 200
    status, health = ask(serving, "/healthz")
    assert status == 200 and health["generation"] == 1 and health["devices"] == []
    _, document = ask(serving, "/v1/choices")
    assert [c["backend"] for c in document["choices"]] == ["fast"]
    _, decision = ask(serving, "/v1/choices?m=8&n=4096&k=2048")
    assert (decision["backend"], decision["status"]) == ("fast", "safe")
    _, decision = ask(serving, "/v1/choices?m=8&n=1&k=2048")
    assert decision["status"] == "unproven"
    assert ask(serving, "/v1/findings") == (200, {"findings": [], "problem": ""})
    _, text = ask(serving, "/metrics")
    assert 'fp4tune_choices{arch="cpu",gpu="Model C",profile="strict",status="safe"} 1.0' in text


def test_every_metric_has_a_help_and_parses(node):
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(ask(node[1], "/metrics")[1]))
    mine = [f for f in families if f.name.startswith("fp4tune_")]
    assert all(f.documentation for f in mine)
    names = {f.name + ("_total" if f.type == "counter" else "") for f in mine}
    assert names == documented("metric")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/choices?m=8&n=4096", "GET", 400),
        ("/v1/choices?m=8&n=4096&k=-1", "GET", 400),
        ("/v1/choices?m=8&n=4096&k=99999999999999999999", "GET", 400),
        ("/v1/choices?colour=red", "GET", 400),
        ("/v1/choices", "DELETE", 405),
        ("/nothing", "GET", 404),
        ("/v1/faults", "GET", 405),
        ("/v1/faults", "POST", 401),
    ],
)
def test_what_cannot_be_answered_is_refused(node, path, method, status):
    assert ask(node[1], path, method)[0] == status


@pytest.mark.parametrize(
    "raw",
    [b"\0\1\2\3\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70000, b"\r\n" * 1000,
     b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
     b"POST /v1/faults HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nshort"],
)  # fmt: skip
def test_malformed_requests_hurt_nobody(node, raw):
    _, serving = node
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(serving.listen[5:])
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass
    assert ask(serving, "/readyz")[0] == 200


FAULT = {"backend": "fast", "m": 8, "n": 4096, "k": 2048, "scope": "bucket", "reason": "NaN"}


def report(serving: Serving, document, token: str = TOKEN):
    body = document if isinstance(document, bytes) else json.dumps(document)
    return ask(serving, "/v1/faults", "POST", body, Authorization=f"Bearer {token}")


def test_a_fault_that_is_reported_quarantines_its_backend(node):
    service, serving = node
    status, answer = report(serving, FAULT)
    assert status == 201 and answer["quarantine"]["reason"] == "NaN"
    found = reader.open(service.config.state_dir).choose(8, 4096, 2048)
    assert (found.backend, found.recorded_backend) == ("torch-dequant", "fast")
    service.tick()
    _, document = ask(serving, "/v1/choices")
    assert [q["backend"] for q in document["quarantines"]] == ["fast"]


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({**FAULT, "backend": "nobody"}, "backend is needed"),
        ({**FAULT, "m": "8"}, "m, n and k are whole numbers"),
        ({**FAULT, "m": -8}, "m=-8 is not"),
        ({**FAULT, "scope": "world"}, "scope='world' is not"),
        ({**FAULT, "by": "me"}, "there is no field 'by'"),
        ([1], "the body is not a JSON object"),
        (b"[" * 4000, "the body is not JSON"),
        (b" " * 5000, "at most 4096 bytes"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_in_one_sentence(node, document, sentence):
    service, serving = node
    status, answer = report(serving, document)
    assert status == 400 and sentence in answer["error"]
    assert quarantine_store.read(quarantine_store.place(service.config.state_dir)) == ([], [])


def test_nothing_is_written_without_the_token(node, tmp_path):
    service, serving = node
    assert report(serving, FAULT, "another-token-of-16")[0] == 401
    (tmp_path / "token").unlink()
    options = HttpOptions(f"unix:{tmp_path}/r.sock", connections=16)
    read_only = Serving(application(service.board, lambda: None), options)
    assert report(read_only, FAULT)[0] == 403
    read_only.stop()


def test_many_clients_at_once_are_all_answered(node):
    _, serving = node
    statuses: list[int] = []

    def client(path: str) -> None:
        statuses.append(ask(serving, path)[0])

    paths = ["/v1/choices", "/v1/choices?m=8&n=4096&k=2048", "/v1/findings", "/metrics"] * 50
    # As many at once as one user may have on a busy host; more are told to try again.
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, paths))
    assert statuses == [200] * 200


def test_a_socket_that_was_left_behind_is_cleared_and_one_in_use_is_not(tmp_path, node):
    _, serving = node
    with pytest.raises(Refused, match="another process answers"):
        Serving(application(node[0].board, lambda: None), HttpOptions(serving.listen))
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(left))
    again = Serving(application(node[0].board, lambda: None), HttpOptions(f"unix:{left}"))
    assert ask(again, "/readyz")[0] == 200
    again.stop()
