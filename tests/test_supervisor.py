"""Whatever a worker does, asking it ends in time, and nothing it started lives on.

The workers here are programs of a few lines in the place of the interpreter, so that each does
exactly one thing; the real one is in test_probe.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from scripted import scripted
from stores import gone

from fp4tune.probes.worker.supervisor import Worker, WorkerFailed


@pytest.fixture
def worker(tmp_path):
    """worker(code) -> a context with a Worker whose process runs `code` (see `scripted`)."""
    return partial(scripted, tmp_path)


def failure(made: Worker, silence: float = 5.0) -> WorkerFailed:
    with pytest.raises(WorkerFailed) as caught:
        made.ask("thing", silence)
    return caught.value


def test_a_command_gets_its_result_and_its_progress(worker):
    said = []
    code = """
        while True:
            command = read()
            say(event="progress", text="half way")
            say(event="done", result=command)
    """
    with worker(code) as made:
        for number in range(3):
            result = made.ask("thing", 5.0, said.append, number=number)
            assert result == {"do": "thing", "number": number}
        assert said == ["half way"] * 3 and made.alive


@pytest.mark.parametrize("kind", ["error", "out of memory", "not applicable", "no backend"])
def test_a_failed_command_leaves_the_worker_alive(worker, kind):
    code = f"""
        read()
        say(event="failed", kind="{kind}", message="it broke")
        read()
        say(event="done", result=7)
    """
    with worker(code) as made:
        failed = failure(made)
        assert (failed.kind, str(failed), failed.fatal) == (kind, "it broke", False)
        assert made.ask("next", 5.0) == 7


def test_a_poisoned_worker_is_ended(worker):
    code = 'read(); say(event="failed", kind="poisoned", message="lost"); time.sleep(60)'
    with worker(code) as made:
        assert failure(made).fatal and not made.alive


def test_messages_it_does_not_know_are_dropped(worker):
    code = """
        read()
        say(event="hello"), say(), say(event=None, kind="error"), os.write(events, b"{")
        os.write(events, b"\\n")
        say(event="done", result="right")
    """
    with worker(code) as made:
        assert made.ask("thing", 5.0) == "right"


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("os._exit(3)", "code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), 40)", "signal 40"),
        ("raise MemoryError('no room')", "code 1; it last said: MemoryError: no room"),
        ("sys.exit(0)", "code 0"),
    ],
)
def test_how_it_died_is_said(worker, ending, words):
    with worker(f'read(); say(event="progress", text="at it"); {ending}') as made:
        failed = failure(made)
    assert failed.kind == "crash" and words in str(failed) and failed.doing == "at it"
    assert "\n" not in str(failed)


def test_a_silent_worker_is_killed_in_time(worker):
    start = time.monotonic()
    with worker("signal.signal(signal.SIGTERM, signal.SIG_IGN); read(); time.sleep(60)") as made:
        failed = failure(made, silence=0.6)
        assert failed.kind == "hang" and "0.6 s" in str(failed) and not made.alive
    assert time.monotonic() - start < 5


def test_signs_of_life_keep_a_slow_worker_alive(worker):
    code = """
        read()
        for _ in range(8):
            time.sleep(0.2)
            say(event="progress", text="slowly")
        say(event="done", result=1)
    """
    with worker(code) as made:
        assert made.ask("thing", 0.9) == 1


def test_a_worker_that_closes_its_channel_and_stays_is_a_crash(worker, monkeypatch):
    monkeypatch.setattr("fp4tune.probes.worker.supervisor._KILL_WAIT", 0.5)
    with worker("read(); os.close(events); time.sleep(60)") as made:
        failed = failure(made)
        assert failed.kind == "crash" and not made.alive


def test_a_worker_that_stopped_itself_is_a_hang(worker):
    with worker("read(); os.kill(os.getpid(), signal.SIGSTOP)") as made:
        assert failure(made, silence=0.6).kind == "hang" and not made.alive


def test_asking_the_dead_is_a_crash_every_time(worker):
    with worker("read(); os._exit(1)") as made:
        assert [failure(made).kind for _ in range(3)] == ["crash"] * 3


CHILD = """
read()
pids = []
for own_session in (False, True):
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if own_session:
            os.setsid()
            if os.fork():
                os._exit(0)
        open(sys.argv[0] + f".{os.getpid()}", "w").close()
        time.sleep(60)
time.sleep(0.2)
"""


@pytest.mark.parametrize(
    "ending",
    ["say(event='done', result=None)", "os._exit(3)", "time.sleep(60)", "os.close(events)"],
    ids=["closed", "crash", "hang", "channel"],
)
def test_no_child_is_left_however_it_ends(worker, tmp_path, ending, monkeypatch):
    """Neither a plain one nor a daemon's, which hold the channel open besides."""
    monkeypatch.setattr("fp4tune.probes.worker.supervisor._KILL_WAIT", 0.5)
    start = time.monotonic()
    with worker(CHILD + ending) as made:
        if ending.startswith("say"):
            made.ask("thing", 5.0)
        else:
            expected = "hang" if "sleep" in ending else "crash"
            if ending == "os._exit(3)":
                assert "code 3" in str(failure(made, 3.0))
            else:
                assert failure(made, 1.0).kind in (expected, "hang")
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("script.py.*")]
    assert len(pids) == 2 and gone(pids)
    assert time.monotonic() - start < 10


def test_what_it_printed_is_kept_to_its_end(worker):
    code = 'read(); print("x" * 5000); print("the last words", flush=True); os._exit(1)'
    with worker(code) as made:
        failed = failure(made)
    assert failed.log.strip().endswith("the last words") and len(failed.log) <= 2000


def test_it_sees_its_own_environment_and_no_stdin(worker):
    code = """
        read()
        say(event="done", result=[os.environ.get("ONLY_HERE"), sys.stdin.read(), os.getsid(0)])
    """
    with worker(code, environment={"ONLY_HERE": "yes"}) as made:
        value, stdin, session = made.ask("thing", 5.0)
    assert (value, stdin) == ("yes", "") and session != os.getsid(0)
    assert "ONLY_HERE" not in os.environ


def test_nothing_is_left_open(worker):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with worker("read(); os._exit(1)") as made:
        failure(made)
    before = descriptors()
    for code in ("read(); os._exit(1)", "read(); time.sleep(60)", "pass"):
        with worker(code) as made:
            failure(made, 0.5)
    assert descriptors() == before


def test_what_is_not_done_until_then_is_late_however_often_it_says_that_it_lives(worker):
    code = """
        read()
        while True:
            time.sleep(0.1)
            say(event="progress", text="slowly")
    """
    with worker(code) as made:
        start = time.monotonic()
        with pytest.raises(WorkerFailed) as failed:
            made.ask("thing", 60.0, until=start + 0.6)
        assert failed.value.kind == "late" and failed.value.fatal and not made.alive
        assert 0.6 <= time.monotonic() - start < 5


def test_one_thread_closes_what_another_is_asking(worker):
    """As a probe does that ends early: neither may find the other listening, nor wait long."""
    with worker("read()\ntime.sleep(60)") as made:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(made.ask, "thing", 60.0)
            time.sleep(0.3)
            start = time.monotonic()
            made.close()
            assert isinstance(asked.exception(timeout=10), (WorkerFailed, OSError, ValueError))
        assert time.monotonic() - start < 8 and not made.alive
