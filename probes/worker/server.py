"""The process that runs one backend on one device. It may crash, hang or be killed.

Imports the standard library, torch and its provider only. It answers commands one at a time: any
number of ``progress`` events, then ``done`` with a result, or ``failed``. After ``failed`` with
``poisoned`` the process ends, since its CUDA context is lost.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import platform
import random
import resource
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from .. import settings
from .protocol import Channel, Closed, Message

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_FEWEST, _MOST = 200, 1000
"""Between these numbers the channel's descriptors are put, at random."""
_IDLE = 1 << 30
"""Bytes of a device that torch may keep between two commands without anything in them."""


def main(read_fd: int, write_fd: int) -> NoReturn:
    """Serve commands until the channel closes; ends the process."""
    try:
        _serve_commands(read_fd, write_fd)
        atexit._run_exitfuncs()
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Taking torch apart object by object takes longer than all the rest, and serves nothing.
    os._exit(0)


def _serve_commands(read_fd: int, write_fd: int) -> None:
    channel = Channel(_hidden(read_fd), _hidden(write_fd))
    try:
        greeting = channel.receive()
    except Closed:
        return
    channel.signs = greeting["secret"].encode()
    settings.tell(greeting["settings"])
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


def _hidden(fd: int) -> int:
    """The same file under a number that is not guessed, which programs that are started do not
    inherit: what a backend writes to descriptors it does not own should hit nothing of ours."""
    limit = min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    first = random.SystemRandom().randrange(_FEWEST, limit) if limit > _FEWEST else 0
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first)
    except OSError:  # none is free from there on
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return moved


class Server:
    """Holds the backend, the device and the open layer between commands."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._number = 0
        """Of the command that is being carried out."""
        self._backend: Any = None
        self._device: Any = None
        self._layer: Any = None
        self._seen: Any = {}
        """What the census of the open layer saw."""

    def answer(self, message: Message) -> bool:
        """Carry out one command; False when the process must end."""
        self._number = message.get("id", 0)
        handler: Callable[..., Any] | None = getattr(self, f"do_{message.get('do')}", None)
        if handler is None:
            self._failed(f"no command {message.get('do')!r}", "protocol")
            return True
        try:
            result = handler(**message.get("arguments", {}))
        except Closed:
            return False
        except BaseException as error:
            return self._explain(error)
        if message.get("do") in ("grade", "family", "regime"):
            self._give_back()
        self._say(event="done", result=result)
        return not self._poisoned()

    def _explain(self, error: BaseException) -> bool:
        from ...machine.memory import is_out_of_memory
        from ..launch.case import BackendRaised
        from ..regimes import NotApplicable
        from ..registry import BadBackend, UnknownBackend
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
            if is_out_of_memory(error):
                kind = "out of memory"
                self._give_back()
            lost = self._poisoned()
            self._failed(sentence(error), "poisoned" if lost else kind)
            return not lost
        return True

    def _failed(self, message: str, kind: str) -> None:
        self._say(event="failed", kind=kind, message=message)

    def _progress(self, text: str) -> None:
        self._say(event="progress", text=text)

    def _say(self, **message: Any) -> None:
        self._channel.send({"id": self._number, **message})

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

        from ..problem import Device
        from ..registry import load_one

        self._device = Device(kind, sm)
        self._census(True)
        self._backend = _quantiser(backend) or load_one(backend)
        torch.backends.cuda.matmul.allow_tf32 = False
        # What is loaded stays: to look through it after each question took seconds of a layer.
        gc.collect()
        gc.freeze()
        return {
            "pid": os.getpid(),
            "python": platform.python_version(),
            "executable": sys.executable,
            **_backend_facts(self._backend),
            "versions": _versions(getattr(self._backend, "distributions", ())),
            "metadata": _metadata(getattr(self._backend, "distributions", ())),
            "source": _source_files(self._backend, backend),
            "has_files": hasattr(self._backend, "files"),
            "device": _describe(self._device),
        }

    def do_ready(self) -> None:
        """Nothing: answered once this process has torch."""

    def do_survey(
        self, backend: str, kind: str, sm: int | None, problems: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """What the backend is, and why each problem cannot run with it (None if it can)."""
        from ..problem import Device
        from ..registry import BadBackend, UnknownBackend, load_one

        device, wanted = Device(kind, sm), [_problem_of_fields(p) for p in problems]
        try:
            loaded = load_one(backend)
            reasons = [_mismatch(loaded, p) or loaded.unsupported(p, device) for p in wanted]
            return {**_backend_facts(loaded), "reasons": reasons}
        except (BadBackend, UnknownBackend) as error:
            return {"error": str(error)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def do_tactics(self, problems: list[dict[str, Any]]) -> list[list[str]]:
        from ..backends import tactics

        return [list(tactics(self._backend, _problem_of_fields(p), self._device)) for p in problems]

    def do_build(self, problems: list[dict[str, Any]], workers: int) -> dict[str, Any]:
        """Compile everything these problems need; seconds taken and the files that hold it."""
        from ..backends import build_kernels

        start = time.perf_counter()
        build_kernels(
            self._backend, [_problem_of_fields(p) for p in problems], self._device, workers
        )
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
        from ..grouped.problem import is_grouped
        from ..regimes import STARTS
        from .experts import OpenExperts
        from .session import OpenLayer

        self.do_close()
        self._census(True)
        for regime in regimes or ():
            if regime in STARTS:
                STARTS[regime](self._backend, self._device)
        kind = OpenExperts if is_grouped(problem) else OpenLayer
        self._layer = kind(
            self._backend, self._device, _problem_of_fields(problem), seed, memory, self._progress
        )

    def do_close(self) -> None:
        """Let go of the open layer's memory."""
        self._layer, self._seen = None, {}
        self._give_back(most=0)

    def _give_back(self, most: int = _IDLE) -> None:
        """Return memory that torch keeps and nothing uses, where it is more than `most` bytes: the
        other workers on this device have none but what each leaves."""
        import torch

        if self._device is None or self._device.kind != "cuda":
            return
        with suppress(RuntimeError):  # of a context that is lost: the next to look says so
            if torch.cuda.memory_reserved() > most:
                gc.collect()
            if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > most:
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
        from .census import checked

        try:
            results, self._seen = checked(self._layer, _items(items))
            return results
        finally:
            self._census(False)

    def do_census_timed(self) -> list[list[dict[str, Any]]]:
        """What is wrong with the kernels of the items that were timed, before their end."""
        from .census import timed

        try:
            return timed(self._layer, self._seen)
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
        aim: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        from ..launch.item import LaunchAim
        from ..regimes import Budget

        self._census(False)
        wanted = LaunchAim(**aim) if aim else None
        return self._layer.regime(name, _items(items), Budget(**budget), wanted)

    def do_replay(
        self, name: str, bad: dict[str, Any], budget: dict[str, Any], look: bool = True
    ) -> dict[str, Any]:
        """One failure again, in the regime `name`; how often it failed, and what it is like."""
        from ..regimes import Budget
        from .replay import replay

        return replay(self._layer, name, bad, Budget(**budget), look)

    def do_collective(self, **asked: Any) -> dict[str, Any]:
        """This device's part of sums over two; `asked` are the fields of a `RankPart`."""
        from ..regimes.host.collective import RankPart, take_part

        self.do_close()
        self._census(False)
        fields = {**asked, "problem": _problem_of_fields(asked["problem"])}
        fields |= {"ms": tuple(asked["ms"]), "tactics": tuple(asked["tactics"])}
        part = RankPart(**fields)
        return take_part(self._backend, part, self._device.torch, self._progress)

    def do_call(self, spec: str) -> dict[str, Any]:
        """How the backend is called: its own source for that, or else where it is defined, with the
        modules that its file brought along."""
        from ..registry import is_file, origin

        own = getattr(self._backend, "call_source", None)
        file, make = origin(spec)
        found = {"source": own() if own else None, "file": str(file), "make": make}
        return {**found, "loaded": _brought(str(file)) if is_file(spec) else None}

    def do_quantiser_unsupported(self) -> str | None:
        return self._backend.unsupported(self._device)

    def do_quantise(self, dtype: str, k: int, seed: int) -> list[dict[str, Any]]:
        """Probe the quantiser this worker was greeted with; see `quantisers.probe`."""
        from ..quantisers import probe_quantiser

        return probe_quantiser(self._backend, dtype, k, seed, self._device)

    def do_open_quantiser_timing(self, dtype: str, k: int, ms: list[int], seed: int) -> None:
        """Prepare the quantiser for timing at each m; `do_sample` takes the samples."""
        from ..quantisers import QuantiserTiming

        self._census(False)
        self._layer = QuantiserTiming(self._backend, dtype, k, ms, seed, self._device)

    def do_open_timing(self, items: list[dict[str, Any]], cache_bytes: int) -> list[float | None]:
        # First uses load code, which is seen then or never; launches are recorded by a census only.
        self._census(True)
        try:
            return self._layer.open_timing(_items(items), cache_bytes)
        finally:
            self._census(False)

    def do_sample(self, indices: list[int]) -> list[float]:
        return self._layer.sample(indices)

    def do_times_by_law(self) -> list[dict[str, list[float]]]:
        """The median time of routed experts under each routing law, of each item that is timed."""
        found: list[dict[str, list[float]]] = self._layer.times_by_law()
        return found

    def do_close_timing(self) -> list[list[tuple[int, float]]]:
        """The end of timing; (m, median microseconds) of each item."""
        from ..regimes import settled

        found: list[list[tuple[int, float]]] = self._layer.close_timing()
        # What is still starting would take device memory under a regime that looks for leaks.
        settled(lambda: self._progress("waiting for another process to start"))
        return found


def _backend_facts(backend: Any) -> dict[str, Any]:
    return {
        "name": backend.name,
        "experts": bool(getattr(backend, "experts", False)),
        "activation": backend.activation,
        "layout": backend.layout,
        "reference_line": bool(getattr(backend, "reference_line", False)),
    }


def _quantiser(name: str) -> Any:
    from ..quantisers import find

    return find(name)


def _mismatch(backend: Any, problem: Any) -> str | None:
    of_experts = bool(getattr(backend, "experts", False))
    if of_experts or hasattr(problem, "top_k"):
        if of_experts and hasattr(problem, "top_k"):
            return None
        own, asked = ("routed experts", "a dense layer")[:: 1 if of_experts else -1]
        return f"it computes {own.removeprefix('a ')}, and this is {asked}"
    if backend.activation == problem.activation:
        return None
    return f"it takes {backend.activation} activations, not {problem.activation}"


def _problem_of_fields(fields: dict[str, Any]) -> Any:
    from ..grouped.problem import is_grouped, of_fields
    from ..problem import Problem

    return of_fields(fields) if is_grouped(fields) else Problem(**fields)


def _items(items: list[dict[str, Any]]) -> list[Any]:
    from ..launch.item import Item

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


def _source_files(backend: Any, spec: str) -> list[str]:
    """The Python files that a backend from elsewhere was loaded from: the file named, those that
    define its class and what that inherits from, and those beside its own in one package. What
    fp4tune brings is left out."""
    from ..registry import is_file, origin

    found = {str(origin(spec)[0])} if is_file(spec) else set()
    ours = os.path.join(_PACKAGE, "probes") + os.sep
    names = [each.__module__ for each in type(backend).__mro__]
    classes = [sys.modules.get(n) for n in names if n.split(".")[0] not in sys.stdlib_module_names]
    package = getattr(classes[0] if classes else None, "__package__", None)
    beside = [m for m in list(sys.modules.values()) if getattr(m, "__package__", None) == package]
    for module in [*classes, *(beside if package else [])]:
        path = getattr(module, "__file__", None)
        if path and path.endswith(".py") and os.path.isfile(path):
            found.add(os.path.abspath(path))
    return sorted(path for path in found if not path.startswith(ours))


def _brought(plugin: str) -> dict[str, str]:
    """Modules by name that are neither installed nor part of Python or fp4tune: a plugin's."""
    installed = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")]
    folders = [os.path.realpath(folder) + os.sep for folder in installed]
    found = {}
    for name, module in list(sys.modules.items()):
        path = os.path.realpath(getattr(module, "__file__", None) or "")
        known = path.startswith(tuple(folders)) or "site-packages" in path.split(os.sep)
        ours = name.split(".")[0] in ("fp4tune", "__main__") or path == os.path.realpath(plugin)
        if os.path.isfile(path) and not known and not ours:
            found[name] = path
    return found


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
