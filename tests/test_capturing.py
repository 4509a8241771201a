"""A capture that fails leaves the process as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fp4tune.probes.launch import outcome

MAIN, SIDE, OTHER = "main", "side", "another"


class Cuda:
    """What torch does of streams and captures: `torch.cuda.graph` leaves its own stream the current
    one where the capture does not end, and it does not end on another stream."""

    def __init__(self, monkeypatch) -> None:
        self.current, self.open, self.recording, self.broken = MAIN, False, False, False
        self.of_a_graph = False
        """Whether random numbers are taken for a graph's, until a capture ends well."""
        names = {
            "current_stream": lambda: self.current,
            "set_stream": self.set,
            "graph_pool_handle": lambda: (0, 1),
            "current_device": lambda: 0,
            "graph": lambda graph, pool, stream: self.within(graph, stream),
        }
        for name, function in names.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.stop, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: None, raising=False)
        monkeypatch.setattr(outcome, "_capture_one", self.one)
        self.graph = SimpleNamespace(capture_end=self.end)

    def one(self, stream: str) -> None:
        assert stream == SIDE == self.current and not self.open
        self.of_a_graph = False

    def set(self, stream: str) -> None:
        self.current = stream

    def stop(self, device: int, pool: tuple[int, int]) -> None:
        if not self.recording:
            raise RuntimeError("not recording")
        self.recording = False

    def end(self) -> None:
        if self.current != SIDE:
            raise RuntimeError("capture must end on the stream it began on")
        was_open, self.open = self.open, False
        if self.broken or not was_open:
            raise RuntimeError("the capture is invalid")
        self.recording = self.of_a_graph = False

    def within(self, graph, stream: str):
        cuda = self

        class Graph:
            def __enter__(self) -> None:
                cuda.current, cuda.open, cuda.recording, cuda.of_a_graph = stream, True, True, True

            def __exit__(self, *args: object) -> None:
                graph.capture_end()
                cuda.current = MAIN

        return Graph()


def fails(cuda: Cuda) -> None:
    cuda.broken = True
    raise ValueError("a call that waits")


def breaks(cuda: Cuda) -> None:
    cuda.broken = True


def leaves(cuda: Cuda) -> None:
    cuda.current = OTHER


@pytest.mark.parametrize("call", [fails, breaks, leaves])
def test_a_capture_that_fails_leaves_nothing_behind(call, monkeypatch):
    cuda = Cuda(monkeypatch)
    with pytest.raises(RuntimeError), outcome.capturing(cuda.graph, SIDE):
        call(cuda)
    assert (cuda.current, cuda.open, cuda.recording) == (MAIN, False, False)
    assert not cuda.of_a_graph


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_releasePool"])
def test_an_older_torch_has_other_names(name, monkeypatch):
    cuda = Cuda(monkeypatch)
    monkeypatch.delattr(torch._C, name)
    with pytest.raises(ValueError), outcome.capturing(cuda.graph, SIDE):
        raise ValueError("a call that fails")
    assert cuda.current == MAIN


def test_one_that_ends_is_left_alone(monkeypatch):
    cuda = Cuda(monkeypatch)
    with outcome.capturing(cuda.graph, SIDE):
        assert cuda.current == SIDE
    assert (cuda.current, cuda.open, cuda.recording) == (MAIN, False, False)
