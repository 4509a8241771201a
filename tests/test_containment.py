"""A worker is not believed, not waited for beyond its time, and nothing it starts escapes.

What attacks here is a program in the interpreter's place, or a backend in a real worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
from scripted import scripted
from stores import gone, spawn

from fp4tune.autotune.asking import survey
from fp4tune.machine import devices, last_words, processes
from fp4tune.probes.problem import Problem
from fp4tune.probes.worker import nursery
from fp4tune.probes.worker.supervisor import Worker, WorkerFailed

PROBLEM = Problem("nvfp4", 2, 64, 64)


@pytest.fixture
def worker(tmp_path):
    """worker(code) -> a context with a Worker whose process runs `code` (see `scripted`)."""
    return partial(scripted, tmp_path)


def failure(made: Worker, silence: float) -> WorkerFailed:
    with pytest.raises(WorkerFailed) as caught:
        made.ask("thing", silence)
    return caught.value


# -- what it says


FLOODS = {
    "no end of a line": 'b"x" * 65536',
    "empty lines": 'b"\\n" * 65536',
    "half of a message": "secret.encode() + b'{'",
    "messages without the secret": """b'{"event": "progress", "id": 1}\\n'""",
    "messages of no command": """(secret + '{"event": "progress", "id": 99}\\n').encode()""",
    "the secret and no more": "secret.encode() + b'\\n'",
}


@pytest.mark.parametrize("flood", FLOODS)
def test_whatever_arrives_is_no_sign_of_life(worker, flood):
    start = time.monotonic()
    with worker(f"read()\nwhile True: os.write(events, {FLOODS[flood]})") as made:
        failed = failure(made, 0.5)
        assert failed.kind == "hang" and not made.alive
    assert time.monotonic() - start < 30


def test_a_line_without_an_end_takes_no_more_memory_than_a_message(worker, monkeypatch):
    monkeypatch.setattr("fp4tune.probes.worker.protocol.MOST_BYTES", 1 << 20)
    code = """
        read()
        for _ in range(64):
            os.write(events, b"x" * 65536)
        os.write(events, b"\\n")
        say(event="done", result="right")
    """
    with worker(code) as made:
        assert made.ask("thing", 30.0) == "right"
        assert len(made._channel._pending) <= 1 << 20


FORGED = """
    read()
    for name in os.listdir("/proc/self/fd"):
        for text in ('{"event": "done", "result": "forged", "id": 1}', '{"event": "done"}'):
            try:
                os.write(int(name), b"\\n" + text.encode() + b"\\n" + text.encode())
            except OSError:
                pass
    say(event="done", result="right")
    read()
    say(event="done", result="second")
"""


def test_a_forged_answer_is_not_believed_and_shifts_no_later_one(worker):
    with worker(FORGED) as made:
        assert made.ask("thing", 10.0) == "right"
        assert made.ask("next", 10.0) == "second"


@pytest.mark.parametrize("number", ["number - 1", "number + 1", "None", "str(number)", "True"])
def test_an_answer_to_another_command_is_none_to_this(worker, number):
    code = f"""
        read(); say(event="done", result=0)
        read(); say(event="done", result="late", id={number}); say(event="done", result="right")
    """
    with worker(code) as made:
        made.ask("first", 10.0)
        assert made.ask("second", 10.0) == "right"


def test_a_command_that_nobody_reads_is_a_hang(worker):
    with worker("os.kill(os.getpid(), signal.SIGSTOP)") as made:
        with pytest.raises(WorkerFailed) as caught:
            made.ask("thing", 0.5, text="x" * (1 << 20))
        assert caught.value.kind == "hang" and not made.alive


def test_what_is_printed_without_end_takes_neither_memory_nor_disk(worker):
    code = """
        read()
        for _ in range(1200):
            os.write(1 + _ % 2, b"spam and eggs " * 4096)
        os.write(2, b"the last words")
        say(event="done", result=None)
        read()  # its keeper ends with it, and is looked at
    """
    with worker(code) as made:
        before = memory(keeper_of(made))
        made.ask("thing", 60.0)
        assert made.log_tail().endswith("the last words") and len(made.log_tail()) <= 2000
        # 70 MB were printed. What a keeper has read since is its own pages of the log.
        assert memory(keeper_of(made)) - before < 8 << 20
        files = [os.readlink(f"/proc/{keeper_of(made)}/fd/{fd}") for fd in (0, 1, 2)]
        assert not [name for name in files if name.startswith("/tmp")]
        assert os.readlink(f"/proc/{made.pid}/fd/1").startswith("pipe:")


def memory(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(x.split()[1]) for x in text.splitlines() if x.startswith("RssAnon")) << 10


def test_a_ring_keeps_the_end_and_no_more():
    ring = last_words.Ring()
    for number in range(200_000):
        ring.add(b"%d " % number)
        assert len(ring._kept) <= 2 * last_words.KEPT_BYTES + 8
    assert (
        ring.tail(100).endswith("199998 199999 ")
        and len(ring.tail(1 << 30)) <= last_words.KEPT_BYTES
    )


# -- what it starts


ESCAPES = {
    "a session and no environment": """
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.execve("/bin/sleep", ["sleep", "600"], {})
            os._exit(0)
    """,
    "many times orphaned": """
        for depth in range(6):
            if os.fork():
                if depth: os._exit(0)
                break
            os.setsid()
        else:
            time.sleep(600)
    """,
    "an adopter of its own": """
        if not os.fork():
            import ctypes
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
            os.setsid()
            if not os.fork():
                if not os.fork():
                    time.sleep(600)
                os._exit(0)
            time.sleep(600)
    """,
    "deaf": """
        if not os.fork():
            for number in range(1, 32):
                if number not in (9, 19):
                    signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(600)
    """,
    "one after another": """
        if not os.fork():
            os.setsid()
            while True:
                if os.fork():
                    os._exit(0)
                time.sleep(0.001)
    """,
    "a session each": """
        if not os.fork():
            while True:
                os.setsid()
                if os.fork():
                    os._exit(0)
    """,
    "many": """
        for _ in range(40):
            if not os.fork():
                os.setsid()
                os.execve("/bin/sleep", ["sleep", "600"], {})
    """,
}


@pytest.mark.parametrize("ending", ["done", "exits", "hangs"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_a_worker_starts_escapes(worker, tmp_path, escape, ending):
    code = "read()\n" + textwrap.dedent(ESCAPES[escape]) + "time.sleep(0.1)\n"
    code += 'say(event="progress", text="started")\n'
    code += 'while not os.path.exists(sys.argv[0] + ".seen"): time.sleep(0.01)\n'
    code += 'say(event="done")\nread()\n'
    endings = {"done": 'say(event="done")', "exits": "os._exit(3)", "hangs": "time.sleep(600)"}
    code += endings[ending]
    seen: list[int] = []

    def look(text: str) -> None:
        seen.extend(below(made))
        (tmp_path / "script.py.seen").touch()

    with worker(code) as made:
        keeper_pid = keeper_of(made)
        made.ask("thing", 60.0, look)
        if ending == "done":
            made.ask("thing", 60.0)
            made.close()
        else:
            with pytest.raises(WorkerFailed):
                made.ask("thing", 1.0)
        assert made._kept.left == []
        assert seen and gone([*seen, keeper_pid])


def test_who_kills_its_keeper_ends_too_with_what_it_started(worker):
    code = """
        read()
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.execve("/bin/sleep", ["sleep", "600"], {})
            os._exit(0)
        time.sleep(0.1)
        say(event="progress", text="started")
        time.sleep(0.1)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    """
    seen: list[int] = []
    with worker(code) as made:
        with pytest.raises(WorkerFailed) as caught:
            made.ask("thing", 20.0, lambda text: seen.extend(below(made)))
        assert caught.value.kind == "crash" and len(seen) == 2
        assert gone(seen)


@pytest.mark.slow
def test_who_kills_all_that_keep_it_ends_with_the_command(tmp_path):
    backend = tmp_path / "it.py"
    backend.write_text(
        textwrap.dedent("""
        import os, time
        from fp4tune.probes.zoo.floor import Right
        def parent(pid):
            return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
        class It(Right):
            def __init__(self):
                super().__init__("it")
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        while parent(os.getpid()) == os.getsid(0):
                            time.sleep(0.01)
                        keeper = parent(os.getpid())
                        server = parent(keeper)
                        for pid in (server, keeper):
                            os.kill(pid, 9)
                        open(__file__ + ".escaped", "w").write(str(os.getpid()))
                        os.execve("/bin/sleep", ["sleep", "600"], {})
                    os._exit(0)
                time.sleep(600)
        """)
    )
    code = """
        import sys
        from fp4tune import cli
        from fp4tune.probes.worker.supervisor import Worker, WorkerFailed
        cli.contain()
        try:
            Worker().ask("hello", 120.0, backend=sys.argv[1], kind="cpu", sm=None)
        except WorkerFailed as error:
            print(error.kind)
    """
    with spawn(code, f"{backend}:It", stdout=subprocess.PIPE) as command:
        assert command.communicate(timeout=200)[0] == b"crash\n"
    assert gone([int(Path(f"{backend}.escaped").read_text())])


def keeper_of(made: Worker) -> int:
    assert made.pid and made._kept._keeper
    return made._kept._keeper


def below(made: Worker) -> list[int]:
    return processes.descendants(keeper_of(made))


@pytest.mark.slow
def test_who_stops_its_keeper_is_ended_all_the_same(worker, monkeypatch):
    monkeypatch.setattr("fp4tune.probes.worker.supervisor._KILL_WAIT", 0.3)
    monkeypatch.setattr("fp4tune.probes.worker.supervisor._ANSWERS", 0.3)
    code = """
        read()
        if not os.fork():
            os.setsid()
            time.sleep(600)
        say(event="progress", text="started")
        time.sleep(0.1)
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(600)
    """
    seen: list[int] = []
    with worker(code) as made:
        with pytest.raises(WorkerFailed) as caught:
            made.ask("thing", 3.0, lambda text: seen.extend(below(made)))
        assert caught.value.kind == "hang" and len(seen) == 2
        assert gone(seen)


def test_who_kills_the_server_stops_nobody_else(worker, tmp_path):
    code = """
        read()
        with open(f"/proc/{os.getppid()}/stat") as file:
            server = int(file.read().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        say(event="done", result=server)
        read(); say(event="done", result="still here")
    """
    with worker(code) as made:
        server = made.ask("thing", 20.0)
        assert made.ask("next", 20.0) == "still here"
    with worker("read(); say(event='done', result='new')") as made:
        assert made.ask("thing", 20.0) == "new"
    assert server != os.getpid() and gone([server])


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_who_was_asked_for_when_the_server_died_is_started_by_another(worker, end):
    """As on a busy host, where a server that was killed seems to live for a while."""
    with worker("read(); say(event='done', result=os.getppid())") as first:
        server = parent(first.ask("thing", 20.0))
        os.kill(server, signal.SIGSTOP)
        with worker("say(event='done', result=read()['x'])") as made:
            if end == "killed":
                os.kill(server, signal.SIGKILL)
            else:
                nursery.nursery.close()
            assert made.ask("thing", 20.0, x="y" * 70_000) == "y" * 70_000
            held = os.readlink(f"/proc/self/fd/{made._channel._read_fd}")
            # The worker's end of its channel is the worker's alone: its death is seen by that.
            assert [os.readlink(f"/proc/self/fd/{fd}") for fd in open_files()].count(held) == 1
        assert parent(keeper_of(made)) != server and gone([server])


def test_servers_that_die_one_after_another_are_not_asked_for_ever(worker, monkeypatch):
    monkeypatch.setattr(nursery.sys, "executable", "/bin/false")
    nursery.nursery.close()
    try:
        with pytest.raises((WorkerFailed, OSError)), worker("read()") as made:
            made.ask("thing", 20.0)
    finally:
        nursery.nursery.close()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_probe(tmp_path, number):
    code = """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from scripted import scripted
        from fp4tune.machine import processes
        escape = '''
            read()
            if not os.fork():
                os.setsid()
                if not os.fork():
                    os.execve("/bin/sleep", ["sleep", "600"], {})
                os._exit(0)
            time.sleep(0.1)
            say(event="done", result=None)
            time.sleep(600)
        '''
        with scripted(Path(sys.argv[2]), escape) as made:
            made.ask("thing", 20.0)
            import os
            print(*processes.descendants(os.getpid()), flush=True)
            time.sleep(600)
    """
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with spawn(code, Path(__file__).parent, tmp_path, **pipes) as other:
        assert other.stdout is not None
        pids = [int(pid) for pid in other.stdout.readline().split()]
        os.kill(other.pid, number)
        other.communicate(timeout=30)
    assert len(pids) == 4  # the server, a keeper, its worker, and what that left behind
    assert gone(pids)


def test_a_child_that_asks_to_dies_with_its_parent():
    code = """
        import subprocess, sys, time
        from fp4tune.machine.processes import dying_with_parent
        other = subprocess.Popen(["sleep", "600"], preexec_fn=dying_with_parent())
        print(other.pid, flush=True)
        time.sleep(600)
    """
    with spawn(code, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        pid = int(other.stdout.readline())
        other.kill()
        other.communicate(timeout=30)
    assert gone([pid])


def test_a_worker_is_not_told_who_started_it(monkeypatch):
    """systemd, sudo and a shell say it in the environment, by name or by value."""
    told = {
        "FP4TUNE_STATE": "/x", "STATE_DIRECTORY": "/var/lib/fp4tune", "NOTIFY_SOCKET": "/run/n",
        "CACHE_DIRECTORY": "/var/cache/fp4tune", "INVOCATION_ID": "7", "SUDO_COMMAND": "fp4tune x",
        "_": "/usr/bin/fp4tune", "JOURNAL_STREAM": "8:1", "LISTEN_FDS": "1",
        "SYSTEMD_EXEC_PID": "9",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    given_ = nursery.environment()
    assert not told.keys() & given_.keys() and given_["CUDA_VISIBLE_DEVICES"] == "0"


# -- backends in a real worker


BACKEND = """
import os, sys, threading, time
from fp4tune.probes.zoo.floor import Right

class Plain(Right):
    def __init__(self):
        super().__init__(type(self).__name__.lower())

class Looks(Plain):
    def unsupported(self, problem, device):
        with open("/proc/self/environ", "rb") as file:
            began = file.read().decode(errors="replace").split(chr(0))
        now = [f"{name}={value}" for name, value in os.environ.items()]
        found = [each for each in [*began, *now] if "fp4tune" in each.partition("=")[0].lower()]
        return f"found {found}"

class Forges(Plain):
    def unsupported(self, problem, device):
        text = b'\\n{"event": "done", "result": {"error": "forged"}, "id": 1}\\n'
        text += text.replace(b"1}", b"2}")
        for fd in range(1, 1024):
            try:
                os.write(fd, text)
            except OSError:
                pass
        print('{"event": "done"}', flush=True)
"""
"""What a backend may try, in the file of a user."""
DEADLOCK = """
import threading
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def surveyed(folder: Path, *wanted: str, **other) -> dict:
    file = folder / "attack.py"
    file.write_text(BACKEND)
    specs = [f"{file}:{name}" for name in wanted]
    found = survey(devices.cpu(), specs, [PROBLEM], **other)
    return {name: found[spec] for name, spec in zip(wanted, specs, strict=True)}


@pytest.mark.slow
def test_nothing_in_a_worker_s_environment_names_the_harness(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4TUNE_SPOOL", str(tmp_path))
    (reason,) = surveyed(tmp_path, "Looks")["Looks"]["reasons"]
    assert reason == "found []"


def test_what_a_backend_writes_everywhere_is_not_believed(tmp_path):
    found = surveyed(tmp_path, "Forges", "Plain")
    assert found["Forges"]["name"] == "forges" and found["Forges"]["reasons"] == [None]
    assert found["Plain"]["reasons"] == [None]


def test_an_import_that_deadlocks_is_its_own_affair(tmp_path):
    """Its limit is the one of hangs, its process its own, and the others are asked meanwhile."""
    stuck = tmp_path / "stuck.py"
    stuck.write_text(DEADLOCK)
    good = tmp_path / "attack.py"
    good.write_text(BACKEND)
    wanted = [f"{stuck}:One", f"{stuck}:Two", f"{good}:Plain", "torch-dequant"]
    found = survey(devices.cpu(), wanted, [PROBLEM], hang_seconds=1.0)
    assert list(found) == wanted
    assert all("silent for 1 s" in found[spec]["error"] for spec in wanted[:2])
    assert all(found[spec]["reasons"] == [None] for spec in wanted[2:])


def test_a_worker_is_told_what_its_environment_does_not_say(monkeypatch, tmp_path):
    """`FP4TUNE_CACHE` and the like still reach our own code in it."""
    monkeypatch.setenv("FP4TUNE_CACHE", str(tmp_path / "here"))
    file = tmp_path / "told.py"
    file.write_text(
        BACKEND + "\nclass Told(Plain):\n    def unsupported(self, problem, device):\n"
        "        from fp4tune.probes.census.shim import cache_folder\n"
        "        return str(cache_folder())\n"
    )
    found = survey(devices.cpu(), [f"{file}:Told"], [PROBLEM])
    assert found[f"{file}:Told"]["reasons"] == [str(tmp_path / "here" / "census")]
    assert sys.executable
