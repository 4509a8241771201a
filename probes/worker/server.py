"""The process that runs one backend on one device. It may crash, hang or be killed.

Imports the standard library, torch and its provider only. It answers commands one at a time: any
number of ``progress`` events, then ``done`` with a result, or ``failed``. After ``failed`` with
``poisoned`` the process ends, since its CUDA context is lost.
"""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from .protocol import Channel, Closed, Message

_PR_SET_PDEATHSIG = 1


def main(read_fd: int, write_fd: int) -> None:
    """Serve commands until the channel closes."""
    _die_with_parent()
    if _hung_up(read_fd):
        return  # the parent died before this process could ask to die with it
    channel = Channel(read_fd, write_fd)
    # A child of a backend must not hold the channel open, nor write to it.
    os.set_inheritable(read_fd, False)
    os.set_inheritable(write_fd, False)
    server = Server(channel)
    # While nobody waits for it: a replacement is started before it is needed.
    import torch  # noqa: F401

    while True:
        try:
            message = channel.receive()
        except Closed:
            return
        if not server.answer(message):
            return


class Server:
    """Holds the backend, the device and the open layer between commands."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._backend: Any = None
        self._device: Any = None
        self._layer: Any = None

    def answer(self, message: Message) -> bool:
        """Carry out one command; False when the process must end."""
        handler: Callable[..., Any] | None = getattr(self, f"do_{message.get('do')}", None)
        if handler is None:
            self._failed(f"no command {message.get('do')!r}", "protocol")
            return True
        try:
            result = handler(**{k: v for k, v in message.items() if k != "do"})
        except Closed:
            return False
        except BaseException as error:
            return self._explain(error)
        self._channel.send({"event": "done", "result": result})
        return not self._poisoned()

    def _explain(self, error: BaseException) -> bool:
        from ..backends.registry import BadBackend, UnknownBackend
        from ..launch.case import BackendRaised
        from ..regimes import NotApplicable
        from .session import Poisoned, sentence

        traceback.print_exc()
        if isinstance(error, NotApplicable):
            self._failed(str(error), "not applicable")
        elif isinstance(error, (UnknownBackend, BadBackend)):
            self._failed(str(error), "no backend")
        elif isinstance(error, Poisoned):
            self._failed(str(error), "poisoned")
            return False
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._failed(f"the backend raised {type(error).__name__}", "error")
            return False
        else:
            kind = "error" if isinstance(error, (RuntimeError, BackendRaised)) else "internal"
            if type(error).__name__ == "OutOfMemoryError":
                kind = "out of memory"
            lost = self._poisoned()
            self._failed(sentence(error), "poisoned" if lost else kind)
            return not lost
        return True

    def _failed(self, message: str, kind: str) -> None:
        self._channel.send({"event": "failed", "kind": kind, "message": message})

    def _progress(self, text: str) -> None:
        self._channel.send({"event": "progress", "text": text})

    def _poisoned(self) -> bool:
        if self._device is None or self._device.kind != "cuda":
            return False
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    # Commands

    def do_hello(self, backend: str, kind: str, sm: int | None) -> dict[str, Any]:
        """Load the backend; say what this interpreter, its torch and its device are."""
        import torch

        from ..backends.registry import load_one
        from ..problem import Device

        self._device = Device(kind, sm)
        self._census(True)
        self._backend = _quantiser(backend) or load_one(backend)
        torch.backends.cuda.matmul.allow_tf32 = False
        return {
            "pid": os.getpid(),
            "python": platform.python_version(),
            "executable": sys.executable,
            **_identity(self._backend),
            "versions": _versions(getattr(self._backend, "distributions", ())),
            "metadata": _metadata(getattr(self._backend, "distributions", ())),
            "source": _source(self._backend, backend),
            "has_files": hasattr(self._backend, "files"),
            "device": _describe(self._device),
        }

    def do_survey(
        self, backends: list[str], kind: str, sm: int | None, problems: list[dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """What each backend is, and why each problem cannot run with it (None if it can)."""
        from ..backends.registry import BadBackend, UnknownBackend, load_one
        from ..problem import Device

        device, wanted = Device(kind, sm), [_problem(p) for p in problems]
        answers: dict[str, dict[str, Any]] = {}
        for spec in backends:
            self._progress(spec)
            try:
                backend = load_one(spec)
                reasons = [_mismatch(backend, p) or backend.unsupported(p, device) for p in wanted]
                answers[spec] = {**_identity(backend), "reasons": reasons}
            except (BadBackend, UnknownBackend) as error:
                answers[spec] = {"error": str(error)}
            except Exception as error:
                answers[spec] = {"error": f"{type(error).__name__}: {error}"}
        return answers

    def do_tactics(self, problems: list[dict[str, Any]]) -> list[list[str]]:
        from ..backends import tactics

        return [list(tactics(self._backend, _problem(p), self._device)) for p in problems]

    def do_build(self, problems: list[dict[str, Any]], workers: int) -> dict[str, Any]:
        """Compile everything these problems need; seconds taken and the files that hold it."""
        from ..backends import build

        start = time.perf_counter()
        build(self._backend, [_problem(p) for p in problems], self._device, workers)
        return {"seconds": time.perf_counter() - start}

    def do_files(self) -> list[str]:
        """The compiled files that hold the backend's kernels."""
        files = getattr(self._backend, "files", None)
        return [str(path) for path in files()] if files else []

    def do_open(
        self, problem: dict[str, Any], seed: int, memory: int, regimes: list[str] | None = None
    ) -> None:
        """Open a layer; `problem.m` is the rows of its activation pools.

        `regimes` are to come: what takes long to start for them is started meanwhile.
        """
        from ..regimes import STARTS
        from .session import Layer

        self.do_close()
        self._census(True)
        for regime in regimes or ():
            if regime in STARTS:
                STARTS[regime](self._device)
        self._layer = Layer(
            self._backend, self._device, _problem(problem), seed, memory, self._progress
        )

    def do_close(self) -> None:
        """Let go of the open layer's memory."""
        self._layer = None
        if self._device.kind == "cuda":
            import gc

            import torch

            gc.collect()
            torch.cuda.empty_cache()

    def _census(self, on: bool) -> None:
        """Whether code is recorded as it is loaded: from before CUDA starts until all is graded,
        and not while anything is timed or tried under a regime's conditions."""
        if self._device.kind == "cuda":
            from .. import census

            if on:
                census.attach()
            else:
                census.detach()

    def do_census(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Which kernels graded items launch; the last that is done before they are timed."""
        try:
            return self._layer.census(_items(items))
        finally:
            self._census(False)

    def do_census_timed(self) -> list[list[dict[str, Any]]]:
        """What is wrong with the kernels of the items that were timed, before their end."""
        try:
            return self._layer.census_timed()
        finally:
            self._census(False)

    def do_grade(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self._layer.grade(_items(items))

    def do_family(self, name: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self._layer.family(name, _items(items))

    def do_regime(
        self,
        name: str,
        items: list[dict[str, Any]],
        budget: dict[str, Any],
        turn: int = 0,
        windows: int = 1,
    ) -> dict[str, Any]:
        from ..regimes import Budget

        self._census(False)
        return self._layer.regime(name, _items(items), Budget(**budget), turn, windows)

    def do_replay(
        self, name: str, bad: dict[str, Any], budget: dict[str, Any], look: bool = True
    ) -> dict[str, Any]:
        """One failure again, in the regime `name`; how often it failed, and what it is like."""
        from ..regimes import Budget

        return self._layer.replay(name, bad, Budget(**budget), look)

    def do_call(self, spec: str) -> dict[str, str | None]:
        """How the backend is called: its own source for that, or else where it is defined."""
        from ..backends.registry import origin

        own = getattr(self._backend, "call_source", None)
        file, make = origin(spec)
        return {"source": own() if own else None, "file": str(file), "make": make}

    def do_quantiser_unsupported(self) -> str | None:
        return self._backend.unsupported(self._device)

    def do_quantise(self, dtype: str, k: int, seed: int) -> list[dict[str, Any]]:
        """Probe the quantiser this worker was greeted with; see `quantisers.probe`."""
        from ..quantisers import probe

        return probe(self._backend, dtype, k, seed, self._device)

    def do_open_quantiser_timing(self, dtype: str, k: int, ms: list[int], seed: int) -> None:
        """Prepare the quantiser for timing at each m; `do_sample` takes the samples."""
        from ..quantisers import Timing

        self._census(False)
        self._layer = Timing(self._backend, dtype, k, ms, seed, self._device)

    def do_open_timing(self, items: list[dict[str, Any]], cache_bytes: int) -> list[float | None]:
        # First uses load code, which is seen then or never; launches are recorded by a census only.
        self._census(True)
        try:
            return self._layer.open_timing(_items(items), cache_bytes)
        finally:
            self._census(False)

    def do_sample(self, indices: list[int]) -> list[float]:
        return self._layer.sample(indices)

    def do_close_timing(self) -> None:
        from ..regimes import settled

        self._layer.close_timing()
        # What is still starting would take device memory under a regime that looks for leaks.
        settled(lambda: self._progress("waiting for another process to start"))


def _identity(backend: Any) -> dict[str, Any]:
    return {
        "name": backend.name,
        "activation": backend.activation,
        "layout": backend.layout,
        "reference_line": bool(getattr(backend, "reference_line", False)),
    }


def _quantiser(name: str) -> Any:
    from ..quantisers import find

    return find(name)


def _mismatch(backend: Any, problem: Any) -> str | None:
    if backend.activation == problem.activation:
        return None
    return f"it takes {backend.activation} activations, not {problem.activation}"


def _problem(fields: dict[str, Any]) -> Any:
    from ..problem import Problem

    return Problem(**fields)


def _items(items: list[dict[str, Any]]) -> list[Any]:
    from .session import Item

    return [Item(tuple(i["ms"]), i["tactic"], i.get("width", 24)) for i in items]


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Versions of torch and of `distributions`, from metadata, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", *distributions):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _metadata(distributions: tuple[str, ...]) -> list[str]:
    """The METADATA file of each installed distribution: it is replaced when the distribution is."""
    from importlib.metadata import PackageNotFoundError, distribution

    found = []
    for name in dict.fromkeys(("torch", "triton", *distributions)):
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        folder = f"{name.replace('-', '_')}-{installed.version}.dist-info"
        path = str(installed.locate_file(f"{folder}/METADATA"))
        if os.path.isfile(path):
            found.append(path)
    return found


def _source(backend: Any, spec: str) -> list[str]:
    """The Python files that a backend from elsewhere was loaded from: the file named, those that
    define its class and what that inherits from, and those beside its own in one package. What
    fp4tune brings is left out."""
    from ..backends.registry import is_file, origin

    found = {str(origin(spec)[0])} if is_file(spec) else set()
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    names = [each.__module__ for each in type(backend).__mro__]
    classes = [sys.modules.get(n) for n in names if n.split(".")[0] not in sys.stdlib_module_names]
    package = getattr(classes[0] if classes else None, "__package__", None)
    beside = [m for m in list(sys.modules.values()) if getattr(m, "__package__", None) == package]
    for module in [*classes, *(beside if package else [])]:
        path = getattr(module, "__file__", None)
        if path and path.endswith(".py") and os.path.isfile(path):
            found.add(os.path.abspath(path))
    return sorted(path for path in found if not path.startswith(ours))


def _describe(device: Any) -> dict[str, Any]:
    """What the worker sees of its device; memory in bytes."""
    import torch

    if device.kind == "cpu":
        return {"kind": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "kind": "cuda",
        "name": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory": total,
        "free": free,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the probe dies, however it dies (Linux)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return


def _hung_up(read_fd: int) -> bool:
    """Whether the other end of this pipe is closed."""
    poll = select.poll()
    poll.register(read_fd, 0)
    return bool(poll.poll(0))
