"""The daemon: its configuration, what it tells over HTTP and to systemd, its children, its end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path

import psutil
import pytest
from daemons import asked, cpu, mistakes, until
from test_daemon_evidence import put
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import gpulock, quarantine_store, reader
from fp4tune.daemon import child as children
from fp4tune.daemon import config as configuring
from fp4tune.daemon import work
from fp4tune.daemon.config import (
    DaemonConfig,
    HttpOptions,
    ProbeLimits,
    ProbeOptions,
    WatchOptions,
)
from fp4tune.daemon.family import lives
from fp4tune.daemon.gpus import WatchedDevice
from fp4tune.daemon.notify import Notifier
from fp4tune.daemon.probes import FINISHED, KILLED, SLOW, YIELDED, Attempt, Probes
from fp4tune.errors import Refused
from fp4tune.machine import driver

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from fp4tune.daemon.http import Serving, application  # noqa: E402
from fp4tune.daemon.service import Service  # noqa: E402

TOKEN = "a-token-of-enough-characters"

# -- configuration


def test_a_configuration_is_read_to_the_last_key(tmp_path):
    path = tmp_path / "daemon.toml"
    path.write_text(
        'gpus = ["0", "cpu"]\nstate = "/s"\n[probe]\nshapes = ["128,256"]\nlevel = "quick"\n'
        '[limits]\nhost_gib = 8\n[http]\nlisten = "unix:/run/x.sock"\n[environment]\nA = "1"\n'
    )
    found = configuring.load(path)
    assert found.gpus == ("0", "cpu") and found.layers() == (asked(128),)
    assert found.limits.host_gib == 8.0 and found.environ["A"] == "1"
    assert configuring.load(None) == DaemonConfig()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour = 1", "colour: there is no such key; there are state, gpus"),
        ("[probe]\nshape = ['1,1']", "probe.shape: there is no such key"),
        ("[probe]\ntp = true", "probe.tp: it is a whole number, not True"),
        ("[probe]\nlevel = 'slow'", "probe.level: 'slow' is not one of quick, standard, soak"),
        ("[probe]\nshapes = ['12']", "probe: "),
        ("[limits]\nhost_gib = -1", "limits.host_gib: it must be more than 0, not -1"),
        ("[watch]\nseconds = inf", "watch.seconds: it must be finite"),
        ("probe = 1", "probe: it is a table, [probe]"),
        ("gpus = ['all', '0']", "gpus: 'all' stands alone"),
        ("gpus = ['first']", "gpus: 'first' is not an index, a UUID"),
        ("[http]\nlisten = '0.0.0.0:80'", "http.listen: '0.0.0.0:80': it listens on"),
        ("[http]\nlisten = 'unix:x'", "http.listen: 'x' is not an absolute path"),
        ("[http]\ntoken_file = '/nowhere'", "http.token_file: /nowhere: No such file"),
        ("[environment]\n'A B' = '1'", "environment: 'A B' is not the name of a variable"),
        ("= 3", "this is not TOML"),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path, text, sentence):
    (said,) = mistakes(tmp_path, text)
    assert said.startswith(sentence)


def test_every_mistake_is_said_at_once(tmp_path):
    said = mistakes(tmp_path, "a = 1\n[probe]\nb = 2\nlevel = 'x'\n")
    assert [line.partition(":")[0] for line in said] == ["a", "probe.b", "probe.level"]


def test_words_are_those_of_the_prober():
    assert set(configuring.LEVELS) == set(LEVELS)
    assert set(configuring.PROFILES) == set(PROFILES)


def test_the_check_is_a_command_with_an_exit_code(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[probe]\npresets = ["qwen3-0.6b"]\n')
    bad.write_text("[probe]\nlevels = 1\n")
    done = CliRunner().invoke(cli.app, ["daemon", "--config", str(good), "--check", "--json"])
    assert done.exit_code == 0
    assert set(json.loads(done.stdout)) == {f.name for f in fields(DaemonConfig)}
    done = CliRunner().invoke(cli.app, ["daemon", "--config", str(bad), "--check"])
    assert done.exit_code == 2 and "probe.levels" in done.stderr
    assert "Traceback" not in done.output
    done = CliRunner().invoke(cli.app, ["daemon", "--config", str(tmp_path / "no"), "--check"])
    assert done.exit_code == 2 and "No such file" in done.stderr


def test_a_token_must_be_long_and_not_for_everyone(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    assert configuring.token(str(path)) == TOKEN
    path.chmod(0o644)
    with pytest.raises(Refused, match="everyone may read it"):
        configuring.token(str(path))
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(Refused, match="at least 16"):
        configuring.token(str(path))


DOCS = Path(__file__).resolve().parents[1] / "docs" / "daemon.md"
EXAMPLES = DOCS.parent / "examples"


def documented(heading: str) -> set[str]:
    """Everything in backticks in the first column of the table with this heading."""
    found: set[str] = set()
    inside = False
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        first = line.strip().strip("|").split(" | ")[0].strip() if line.startswith("|") else ""
        inside = bool(first) and (inside or first == heading)
        if inside:
            found.update(re.findall(r"`([^`]+)`", first))
    return found


def test_every_key_of_the_configuration_is_described_and_no_other():
    keys = set()
    for field in fields(DaemonConfig):
        table = getattr(DaemonConfig(), field.name)
        inside = fields(table) if is_dataclass(table) else ()
        keys |= {f"{field.name}.{f.name}" for f in inside} or {field.name}
    assert documented("key") == keys


def test_the_example_is_good_and_the_one_on_the_page():
    example = EXAMPLES / "daemon.toml"
    configuring.load(example)
    assert f"```toml\n{example.read_text(encoding='utf-8')}```" in DOCS.read_text(encoding="utf-8")


# -- children


ESCAPES = """
import os, subprocess, sys, time
# In a session of its own, with a clean environment, and of a parent that is gone.
if os.fork():
    os.wait()
else:
    os.setsid()
    command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    subprocess.Popen(command, env={}, start_new_session=True, stdin=subprocess.DEVNULL)
    os._exit(0)
time.sleep(600)
"""


def fleeing(tmp_path: Path, ends: str) -> dict[str, str]:
    """An environment in which a child's command starts a process that flees, and then `ends`."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.orig_argv[1:3] == ['-m', 'fp4tune.daemon.notify']:\n"
        "    import subprocess, time\n"
        f"    command = [sys.executable, '-S', '-c', {ESCAPES!r}]\n"
        "    subprocess.Popen(command, start_new_session=True)\n"
        f"    {ends}\n"
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_child_is_ended_with_all_it_started(tmp_path):
    """A probe's workers are in sessions of their own, so the process group is not enough; nor is
    what they inherit, which a backend's helper need not keep."""
    environ = fleeing(tmp_path, "time.sleep(600)")
    one = children.Child("daemon.notify", [], environ)
    # the child, its command, what that started, and the one that fled from there
    until(lambda: len(one.family()) == 4)
    assert one.rss() > 0 and one.family()[0] == one.pid
    members = [psutil.Process(pid) for pid in one.family()]
    one.end("enough")
    until(lambda: one.poll() is not None)
    until(lambda: one.family() == [])
    assert not any(lives(process) for process in members)
    assert one.ended == "enough" and one.poll() == -signal.SIGKILL
    one.close()


@pytest.mark.parametrize(
    ("ends", "code"),
    [("pass", 0), ("os._exit(2)", 2), ("os.kill(os.getpid(), 9)", -9), ("os.abort()", -6)],
)
def test_a_child_ends_as_its_command_does_and_leaves_nothing(tmp_path, ends, code):
    one = children.Child("daemon.notify", [], fleeing(tmp_path, ends))
    until(lambda: one.poll() is not None)
    assert one.poll() == code and one.family() == []
    one.close()


def test_a_child_dies_with_the_daemon():
    code = (
        "import os, time; from fp4tune.daemon.child import Child\n"
        "one = Child('cli', ['probe', '--gpu', 'none', '--shape', '128,256'], dict(os.environ))\n"
        "while len(one.family()) < 2: time.sleep(0.01)\n"
        "print(*one.family(), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    until(lambda: not any(lives(member) for member in family))


def test_a_probe_that_takes_too_long_is_ended_and_tried_much_later(tmp_path):
    config = DaemonConfig(
        state=str(tmp_path), gpus=("cpu",), limits=ProbeLimits(layer_seconds=0.05)
    )
    device, probes = cpu(), Probes()
    units = work.units([asked(128)], ProbeOptions(level="quick"), [])
    probes.offer(config, device, units, "s", time.monotonic())
    assert set(probes.running) == {"cpu"}
    until(lambda: probes.look(config, [device], time.monotonic()) or not probes.running)
    assert probes.outcomes == {("cpu", SLOW): 1} and probes.finished
    probes.offer(config, device, units, "s", time.monotonic())
    assert not probes.running and "again later" in probes.waiting["cpu"]
    probes.offer(config, device, units, "another situation", time.monotonic())
    assert probes.running
    probes.stop("the test ends")
    until(lambda: probes.look(config, [device], time.monotonic()) or not probes.running)


def test_an_engine_keeps_probes_from_beginning(tmp_path):
    config = DaemonConfig(state=str(tmp_path), gpus=("cpu",))
    device, probes = cpu(), Probes()
    held = gpulock.share(tmp_path, ["cpu"])
    units = work.units([asked(128)], ProbeOptions(), [])
    probes.offer(config, device, units, "s", 1000.0)
    assert not probes.running and "holds its lock" in probes.waiting["cpu"]
    held.close()
    probes.offer(config, device, units, "s", 1001.0)
    assert not probes.running and "a moment ago" in probes.waiting["cpu"]


def test_a_day_has_only_so_much_time_for_probes(tmp_path):
    config = DaemonConfig(state=str(tmp_path), gpus=("cpu",), limits=ProbeLimits(day_seconds=5.0))
    device, probes = cpu(), Probes()
    probes._spent["cpu"] = deque([(1000.0, 6.0)])
    units = work.units([asked(128)], ProbeOptions(), [])
    probes.offer(config, device, units, "s", 2000.0)
    assert not probes.running and "spent" in probes.waiting["cpu"]
    assert probes._spent_today(device, 1000.0 + 86401.0) == 0.0


@pytest.mark.parametrize(("outcome", "again"), [(FINISHED, False), (KILLED, True), (YIELDED, True)])
def test_what_came_to_its_end_is_not_repeated(outcome, again):
    probes, device = Probes(), cpu()
    (unit,) = work.units([asked(128)], ProbeOptions(), [])
    probes._remember(("cpu", unit, "s"), outcome, 1000.0)
    assert probes._due(device, unit, "s", 1e9) is again
    assert probes._due(device, unit, "other", 1000.0)


def test_failures_wait_longer_each_time_and_never_for_ever():
    probes = Probes()
    (unit,) = work.units([asked(128)], ProbeOptions(), [])
    key = ("cpu", unit, "s")
    waits = []
    for _ in range(40):
        probes._remember(key, KILLED, 0.0)
        waits.append(probes._attempts[key].after)
    assert waits == sorted(waits) and waits[0] == 5.0 and waits[-1] == 86400.0
    assert isinstance(probes._attempts[key], Attempt)


# -- devices


def gpu() -> WatchedDevice:
    return WatchedDevice("GPU-aaaa", "Model A", "sm90", "gpu-0")


def look(**other) -> dict:
    return {
        "processes": [], "utilisation": 0, "memory_used": 0, "ecc": 0, "events": [],
        "facts": {"kind": "cuda", "nvml": "ok", "driver": "1"}, **other,
    }  # fmt: skip


def test_a_gpu_is_free_when_nobody_uses_it_and_has_not_lately(tmp_path):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    assert device.free(config, tmp_path, 0.0) == (False, "nothing is known of it yet")
    device._busy_at = None
    device._take(look(), config)
    assert device.free(config, tmp_path, 1.0) == (True, "")
    device._take(look(processes=[4711]), config)
    assert device.free(config, tmp_path, 2.0) == (False, "process 4711 computes on it")
    device._take(look(utilisation=40), config)
    assert device.free(config, tmp_path, 3.0) == (False, "it is 40 % busy")
    device._take(look(), config)
    assert "a moment ago" in device.free(config, tmp_path, 4.0)[1]
    assert device.free(config, tmp_path, 33.1) == (True, "")


def test_strangers_are_processes_that_are_not_the_probes():
    device = gpu()
    device.look = {"processes": [os.getpid(), 1, 2**22 + 1]}
    assert device.strangers(lambda: [os.getpid()]) == [1], "an unseen one is told by the lock"


def test_faults_of_the_gpu_mark_it_and_faults_of_programs_do_not(tmp_path):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    device._take(look(events=[{"kind": "xid", "data": 31}]), config)
    assert device.marks == {} and device.events == {"xid": 1}
    device._take(look(events=[{"kind": "xid", "data": 79}]), config)
    assert "XID 79" in device.marks["xid"]
    assert device.free(config, tmp_path, 1.0)[1].startswith("XID 79")
    device._take({"error": "GPU is lost"}, config)
    assert "GPU is lost" in device.marks["silent"]
    device._take(look(), config)
    assert device.marks == {} and device.events["reset"] == 1, "it answers again: it was reset"


def test_uncorrected_errors_mark_a_gpu_until_it_is_reset(tmp_path):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    device._take(look(ecc=3), config)
    assert "3 uncorrected" in device.marks["ecc"]
    before = device.changed
    device._take(look(ecc=0), config)
    assert device.marks == {} and device.changed > before


@pytest.mark.parametrize(
    "after", [{"events": [{"kind": "mig", "data": 0}]}, {"facts": {"driver": "2", "nvml": "ok"}}]
)
def test_a_change_of_mig_or_driver_has_the_evidence_compared(tmp_path, after):
    config, device = DaemonConfig(state=str(tmp_path)), gpu()
    device._take(look(), config)
    before = device.changed
    device._take(look(**after), config)
    assert device.changed > before


def test_a_driver_that_does_not_answer_marks_its_gpu_alone(tmp_path, monkeypatch):
    """The process that asks here never says a word, as one that hangs in the driver."""
    (tmp_path / "silent.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(driver, "_PROGRAM", str(tmp_path / "silent.py"))
    config = DaemonConfig(state=str(tmp_path), watch=WatchOptions(wedged_seconds=5.0))
    one, other = gpu(), cpu()
    for now in (100.0, 101.0, 107.0):
        one.watch(config, now, False)
        other.watch(config, now, False)
    assert "has not answered" in one.marks["wedged"] and other.marks == {}
    assert not one.free(config, tmp_path, 107.0)[0] and other.free(config, tmp_path, 107.0)[0]
    silent = one._sentinel
    one.close()
    assert not silent.alive


# -- HTTP


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


class Client(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.host)


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


# -- systemd


def test_systemd_is_told_over_its_socket(tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"})
        notifier.tell("READY=1", "STATUS=a")
        notifier.status("b")
        notifier.status("b")
        notifier.status("c")
        assert systemd.recv(100) == b"READY=1\nSTATUS=a"
        assert (systemd.recv(100), systemd.recv(100)) == (b"STATUS=b", b"STATUS=c")
    assert notifier.watchdog == 3.0
    notifier.tell("nobody listens any more")
    assert Notifier({}).watchdog is None
    assert Notifier({"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}).watchdog is None
    Notifier({}).tell("READY=1")


# -- from start to end


def told(systemd: socket.socket, want: str) -> list[str]:
    said: list[str] = []
    while not any(want in line for line in said):
        said += systemd.recv(4096).decode().splitlines()
    return said


def forget(systemd: socket.socket) -> None:
    """What was told meanwhile: the socket holds few messages, and drops those after them."""
    systemd.setblocking(False)
    try:
        while systemd.recv(4096):
            pass
    except BlockingIOError:
        systemd.settimeout(120)


def test_a_daemon_starts_compares_reloads_and_ends(tmp_path):
    place = tmp_path / "state"
    put(place, tmp_path / "site", ("fast", "1.0"))
    config = tmp_path / "daemon.toml"
    good = f'state = "{place}"\ngpus = ["none"]\n[http]\nlisten = "unix:{tmp_path}/d.sock"\n'
    config.write_text(good)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120)
        command = [sys.executable, "-m", "fp4tune.cli", "daemon", "--config", str(config)]
        env = {
            **os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"
        }  # fmt: skip
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        try:
            told(systemd, "READY=1")
            told(systemd, "WATCHDOG=1")
            second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert second.returncode == 2 and "holds the daemon of this state" in second.stderr
            config.write_text("colour = 1\n")
            forget(systemd)
            process.send_signal(signal.SIGHUP)
            assert any("RELOADING=1" in line for line in told(systemd, "READY=1"))
            config.write_text(good)
            process.send_signal(signal.SIGHUP)
            told(systemd, "READY=1")
            client = Client(f"{tmp_path}/d.sock")
            client.request("GET", "/v1/choices")
            assert json.loads(client.getresponse().read())["generation"] == 1
            client.close()
            process.terminate()
            told(systemd, "STOPPING=1")
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in said
    assert "stays as it was" in said and "was read again" in said
    assert not os.path.exists(tmp_path / "d.sock")


HANGS = """
import sys
from fp4tune.daemon import run, service
from fp4tune.daemon.config import DaemonConfig, HttpOptions
run.PATIENCE = 0.3

def tick(self):
    print("looks", flush=True)
    open(sys.argv[1])  # a pipe that nobody writes to, as a file system that never answers

service.Service.tick = tick
config = DaemonConfig(state=sys.argv[2], gpus=("none",), http=HttpOptions("none"))
sys.exit(run.run(config, lambda: config))
"""


def test_a_daemon_whose_files_hang_ends_all_the_same(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", HANGS, str(tmp_path / "pipe"), str(tmp_path / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"looks\n"
    process.terminate()
    assert process.wait(60) == 0
