"""Workers are forked from a process that has torch, and are what a new interpreter would be."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from fp4tune.probes.worker import fork_server, nursery
from fp4tune.probes.worker.supervisor import Worker

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def start():
    """start(...) -> a Worker, closed at the end; for what `Worker` takes."""
    made: list[Worker] = []

    def one(**how) -> Worker:
        made.append(Worker(**how))
        return made[-1]

    yield one
    for worker in made:
        worker.close()


def greeted(worker: Worker) -> dict:
    return worker.ask("hello", 180.0, backend="torch-dequant", kind="cpu", sm=None)


def server_of(worker: Worker) -> int:
    """The process that the worker's keeper was forked from."""
    assert worker.pid
    keeper = parent(worker.pid)
    return parent(keeper)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_workers_come_from_one_process_with_one_thread_that_never_asked_for_cuda(start):
    workers = [start(environment=CPU) for _ in range(3)]
    assert [worker.alone for worker in workers] == [None] * 3
    (server,) = {server_of(worker) for worker in workers}
    assert len(os.listdir(f"/proc/{server}/task")) == 1
    opened = {os.readlink(f"/proc/{server}/fd/{fd}") for fd in os.listdir(f"/proc/{server}/fd")}
    assert not [path for path in opened if path.startswith("/dev/nvidia")]
    assert server != os.getpid() and parent(server) == os.getpid()


def test_a_forked_worker_is_a_process_of_its_own(start, tmp_path, monkeypatch):
    monkeypatch.setenv("ONLY_HERE", "yes")
    monkeypatch.chdir(tmp_path)
    worker, other = start(environment=CPU), start(environment={**CPU, "HERE_TOO": "yes"})
    said = [greeted(worker), greeted(other)]
    assert [s["pid"] for s in said] == [worker.pid, other.pid] and worker.pid != other.pid
    assert said[0]["name"] == "torch-dequant" and said[0]["versions"]["torch"]
    assert len({os.getsid(w.pid) for w in (worker, other)} | {os.getsid(0)}) == 3
    assert os.readlink(f"/proc/{worker.pid}/cwd") == str(tmp_path)
    held = {
        os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{worker.pid}/fd")
    }
    # Its channel, its log and nothing: no other worker's pipe, no socket of its keeper's.
    assert len([h for h in held if h.startswith("pipe:")]) == 3
    assert held - {h for h in held if h.startswith("pipe:")} == {"/dev/null"}


def test_a_worker_has_the_environment_that_is_asked_for(start, tmp_path, monkeypatch):
    file = tmp_path / "mirror.py"
    file.write_text(
        "import os\n"
        "from fp4tune.probes.zoo.floor import Right\n"
        "def mirror():\n"
        "    made = Right(os.environ.get('LATE', 'none') + os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    assert 'GONE' not in os.environ and 'OPENBLAS_NUM_THREADS' not in os.environ\n"
        "    return made\n"
    )
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("GONE", "1")
    assert start(environment=CPU).alone is None
    monkeypatch.delenv("GONE")
    for late, devices in (("one", "GPU-1"), ("two", "")):
        worker = start(environment={"LATE": late, "CUDA_VISIBLE_DEVICES": devices})
        said = worker.ask(
            "survey", 60.0, backend=f"{file}:mirror", kind="cpu", sm=None, problems=[]
        )
        assert said["name"] == late + devices and worker.alone is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"alone": True},
        {"environment": {"LD_PRELOAD": "libm.so.6"}},
        {"environment": {"OMP_NUM_THREADS": "7"}},
        {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}},
    ],
    ids=["a truly first call", "a preload", "OpenMP", "the allocator"],
)
def test_what_has_to_be_there_from_the_start_takes_an_interpreter_of_its_own(start, how):
    worker = start(**how)
    assert worker.alone == "it was asked for"
    while b"work" not in Path(f"/proc/{worker.pid}/cmdline").read_bytes().split(b"\0"):
        time.sleep(0.01)  # forked, and about to become the interpreter
    began = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    for name, value in how.get("environment", {}).items():
        assert f"{name}={value}".encode() in began


@pytest.mark.slow
def test_a_variable_that_is_read_at_load_and_has_changed_takes_another_server(start, monkeypatch):
    first = start(environment=CPU)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    # Asked for as an interpreter, so that the second server has nothing to import.
    second = start(alone=True)
    assert server_of(first) != server_of(second)
    assert b"OMP_NUM_THREADS=3" in Path(f"/proc/{second.pid}/environ").read_bytes().split(b"\0")


def test_a_process_with_two_threads_is_not_forked_from():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        why = fork_server.unfit()
    finally:
        stop.set()
        thread.join()
    assert why and "threads" in why and "\n" not in why


def test_nor_one_that_has_initialised_cuda_or_opened_the_driver(monkeypatch):
    if len(os.listdir("/proc/self/task")) != 1:
        monkeypatch.setattr(fork_server.os, "listdir", lambda path: ["1"])
    assert fork_server.unfit() is None or torch.cuda.is_initialized()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert "CUDA" in str(fork_server.unfit())
    monkeypatch.setattr(fork_server, "_driver_files", lambda: ["/dev/nvidiactl"])
    assert "/dev/nvidiactl" in str(fork_server.unfit())


@pytest.mark.slow
def test_where_the_server_may_not_fork_the_worker_is_an_interpreter_and_says_why(
    start, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = start(environment=CPU)
    assert "threads" in str(worker.alone)
    assert greeted(worker)["name"] == "torch-dequant"


@pytest.mark.slow
def test_a_forked_worker_says_of_itself_what_an_interpreter_does(start):
    forked, new = start(environment=CPU), start(environment=CPU, alone=True)
    said = [greeted(forked), greeted(new)]
    assert (forked.alone, new.alone) == (None, "it was asked for")
    for each in said:
        del each["pid"]
    assert said[0] == said[1]


def test_settings_are_told_and_not_inherited(monkeypatch):
    monkeypatch.setenv("FP4TUNE_CENSUS", "0")
    assert nursery.settings()["FP4TUNE_CENSUS"] == "0"
    assert not [name for name in nursery.environment() if name.startswith("FP4TUNE_")]
