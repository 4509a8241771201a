"""How long calls by the hundred thousand go on, on a device that is slow, busy or fast."""

from __future__ import annotations

import copy

import pytest
import torch

from fp4tune.probes.regimes.host import history


class Gpu:
    """A device and a thread by a clock of their own: a round takes `host` seconds of the thread,
    `device` of the device, and the clock goes on by what is waited."""

    def __init__(self, monkeypatch, host: float, device: float, room: int = 1 << 30):
        self.now = self.busy = self.free = 0.0
        self.host, self.device, self.room = host, device, room
        self.ends: list[float] = []
        monkeypatch.setattr(history, "time", self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(history, "wait", lambda device: self._wait_until(self.free))

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.busy

    def round(self) -> None:
        self._work(self.host)
        if len(self.ends) >= self.room:  # a launch waits where the queue is full, and is busy
            self._wait_until(self.ends[-self.room])
        self.free = max(self.free, self.now) + self.device
        self.ends.append(self.free)

    def record_event(self) -> Gpu:
        event = copy.copy(self)
        event.synchronize = lambda end=self.free: self._wait_until(end)
        return event

    def behind(self) -> int:
        return sum(end > self.now for end in self.ends)

    def _work(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds

    def _wait_until(self, end: float) -> None:
        self._work(max(0.0, end - self.now))


def paced(gpu: Gpu, calls_of_a_round: int = 65, seconds: float = 5.0):
    """The calls that are made, the most rounds that were behind, and the seconds that count."""
    pace, made, most = history._Pace(torch.device("cuda")), 0, 0
    limits = history._Limits(history.CALLS, history._LEAST, seconds, lambda: None)
    while made < limits.calls and pace.goes_on(made, limits):
        gpu.round()
        made += calls_of_a_round
        pace.follow()
        most = max(most, gpu.behind())
    return made, most, pace.end(limits)


def test_the_device_is_a_few_rounds_behind_and_is_never_kept_waiting(monkeypatch):
    gpu = Gpu(monkeypatch, host=1e-3, device=2e-3)
    made, most, seconds = paced(gpu)
    assert made >= history.CALLS and most == history._QUEUED
    assert gpu.now == pytest.approx(2e-3 * made / 65, rel=0.01)
    # Of which waiting for the device is none.
    assert seconds == pytest.approx(max(1e-3 * made / 65, gpu.now / history._BUSY), rel=0.01)


def test_cheap_calls_come_to_their_number_while_the_device_does_others_work(monkeypatch):
    gpu = Gpu(monkeypatch, host=2e-3, device=9e-3)
    assert paced(gpu)[0] >= history.CALLS and gpu.now > 3 * 5.0


@pytest.mark.parametrize(
    ("device", "made", "seconds"),
    [
        (0.015, 1 << 16, 15.4),  # 16 bits wrap, and 17 would not
        (0.025, 1 << 15, 13.0),
        (0.080, 8000, 10.0),  # 15 bits would not
    ],
)
def test_a_slow_device_is_given_up_after_the_last_counter_that_can_wrap(
    monkeypatch, device, made, seconds
):
    gpu = Gpu(monkeypatch, host=1e-3, device=device)
    calls, _, counted = paced(gpu)
    assert calls == pytest.approx(made, rel=0.04) and calls > made - 200
    assert gpu.now == pytest.approx(seconds, rel=0.03)
    assert counted == pytest.approx(5.0, rel=0.02), "the next tactic has not what this one lost"


def test_a_thread_that_others_keep_busy_is_no_slow_device(monkeypatch):
    gpu = Gpu(monkeypatch, host=1e-3, device=1e-4)
    work = gpu._work

    def crowded(seconds: float) -> None:
        work(seconds)
        gpu.now += 60 * seconds

    gpu._work = crowded
    paced(gpu)
    assert gpu.now == pytest.approx(4 * 5.0, rel=0.02)


def test_launches_that_wait_for_room_in_the_queue_are_no_work_of_their_own(monkeypatch):
    gpu = Gpu(monkeypatch, host=1e-4, device=9.8e-3, room=1)
    assert paced(gpu)[0] >= history.CALLS and gpu.busy > 15
