"""One backend on one device over a whole probe: its worker, and what to do when that dies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from ..machine.devices import Target
from ..probes.problem import Problem
from ..probes.worker.supervisor import Worker, WorkerFailed

Progress = Callable[[str, str], None]
"""Called with a backend's name and what it is doing."""

SILENCE = {"cpu": 120.0, "cuda": 30.0}
"""Seconds of silence that count as a hang. A CPU computes in seconds what a GPU does in
milliseconds; a GPU that two dozen processes share, or a busy host, must not be called hung: 10 s
called right kernels that."""
MOST_DEATHS = 8
"""A backend whose worker died this often is not started again."""


class Stopped(Exception):
    """The probe was told to end, and its workers with it: what dies now is nobody's fault."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds of silence that count as a hang, by kind of work.

    What is run tells that it lives each time the device has caught up. That takes a fraction of a
    second where the device is ours alone, and seconds where others take turns on it; a real hang is
    waited for while others go on.
    """

    run: float
    build: float = 1800.0
    start: float = 180.0


@dataclass(slots=True, eq=False)
class Runner:
    """A backend's worker. `ask` raises WorkerFailed; a dead worker is replaced on the next ask.
    Once closed it raises Stopped, also where it was being asked by another thread."""

    spec: str
    """What ``--backend`` named: a registered name or ``FILE.py:NAME``."""
    target: Target
    patience: Patience
    python: str | None
    progress: Progress
    hello: dict[str, Any] = field(default_factory=dict)
    deaths: int = 0
    _worker: Worker | None = None
    _fresh: bool = False
    """The worker was only spawned, and has yet to be brought to where the last one was."""
    _partial: bool = False
    """The worker replaced another and has built for the layers opened since only."""
    _built: tuple[list[dict[str, Any]], int] | None = None
    _layer: dict[str, Any] | None = None
    _closed: bool = False
    _second: Runner | None = None

    @property
    def name(self) -> str:
        return str(self.hello.get("name", self.spec))

    def spawn(self) -> None:
        """Start the worker's process; it loads nothing yet."""
        if self._closed:
            raise Stopped
        if self.deaths >= MOST_DEATHS:
            raise WorkerFailed("crash", f"its worker died {self.deaths} times", "starting")
        self._worker = Worker(self.python, self.target.environment)
        if self._closed:  # meanwhile, by another thread, which found none to close
            self._worker.close()
            raise Stopped

    def greet(self) -> None:
        """Have the worker load the backend; `hello` is what it says of itself."""
        device = self.target.device
        self.hello = self._ask(
            "hello", self.patience.start, backend=self.spec, kind=device.kind, sm=device.sm
        )

    def start(self) -> None:
        """Start the worker and bring it to where the last one was."""
        if self._worker is None:
            self.spawn()
        self.greet()
        if self._built and self._layer:
            # Compiled code that lives in the process only is gone with it. The open layer's is
            # enough: others' is compiled, from files where there are any, when they are opened.
            problems, workers = self._built
            mine = [p for p in problems if _same_layer(p, self._layer["problem"])]
            self._ask("build", self.patience.build, problems=mine, workers=workers)
            self._ask("open", self.patience.run, **self._layer)
        self._fresh = False

    def ask(self, do: str, silence: float | None = None, **arguments: Any) -> Any:
        """Have the worker do something, starting or replacing it first where needed."""
        if self._closed:
            raise Stopped
        if self._worker is None or self._fresh:
            self.start()
        return self._ask(do, silence or self.patience.run, **arguments)

    def _ask(self, do: str, silence: float, **arguments: Any) -> Any:
        worker = self._worker
        if worker is None:
            raise Stopped
        try:
            return worker.ask(do, silence, lambda text: self.progress(self.name, text), **arguments)
        except Exception as failure:
            if self._closed:
                raise Stopped from failure
            if isinstance(failure, WorkerFailed) and failure.fatal:
                self.deaths += 1
                self._worker = None
                self._partial = True
                if self.deaths < MOST_DEATHS:
                    # Python and torch load while others work; `ask` does the rest.
                    self.spawn()
                    self._fresh = True
            raise

    def build(self, problems: Sequence[Problem], workers: int, until: float = inf) -> float:
        """Compile for `problems`, `until` then (of `time.monotonic`) at most; the seconds it
        took."""
        wanted = [asdict(problem) for problem in problems]
        result = self.ask(
            "build", self.patience.build, problems=wanted, workers=workers, until=until
        )
        self._built = (wanted, workers)
        return float(result["seconds"])

    def tactics(self, problems: Sequence[Problem]) -> list[list[str]]:
        return self.ask("tactics", problems=[asdict(problem) for problem in problems])

    def open(
        self,
        problem: Problem,
        seed: int,
        memory: int,
        behind: Problem | None = None,
        regimes: Sequence[str] = (),
    ) -> None:
        """Open a layer whose pools have `problem.m` rows; slots take `memory` bytes at a time.

        `regimes` are those it is opened for, as far as they are known.

        A worker that replaced another compiles for it first, and for the layer that is run `behind`
        it in a chain.
        """
        if self._partial and self._built:
            problems, workers = self._built
            both = [asdict(p) for p in (problem, behind) if p is not None]
            mine = [p for p in problems if any(_same_layer(p, each) for each in both)]
            self.ask("build", self.patience.build, problems=mine, workers=workers)
        self._layer = {"problem": asdict(problem), "seed": seed, "memory": memory}
        self._layer["regimes"] = list(regimes)
        self.ask("open", **self._layer)

    def second(self) -> Runner:
        """Another worker of this backend, that compiles for the layers opened in it only; it is
        closed with this one."""
        if self._second is None:
            self._second = Runner(
                self.spec,
                self.target,
                self.patience,
                self.python,
                self.progress,
                hello=self.hello,
                _partial=True,
            )
        self._second._built = self._built
        return self._second

    def close_layer(self) -> None:
        self._layer = None
        if self._second is not None:
            with suppress(WorkerFailed):
                self._second.close_layer()
        if self._worker is not None and not self._fresh:
            self.ask("close")

    def close(self) -> None:
        self._closed = True
        if self._second is not None:
            self._second.close()
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@dataclass(frozen=True, slots=True)
class Readied:
    """What came of starting backends, or of compiling them."""

    runners: list[Runner] = field(default_factory=list)
    """Those that worked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By backend, of those that were compiled."""
    failed: dict[str, tuple[str, WorkerFailed]] = field(default_factory=dict)
    """By backend: what it was doing, and how it failed."""


def close_all(runners: Sequence[Runner]) -> None:
    """Close these at once: each takes a third of a second to give back what it has of a GPU."""
    with ThreadPoolExecutor(max_workers=max(1, len(runners))) as pool:
        list(pool.map(Runner.close, runners))


def _same_layer(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two problems differ in nothing but m."""
    return {**a, "m": 0} == {**b, "m": 0}
