"""What a process is set to: everything that one backend can change and another then runs under.

A snapshot is plain values by name. `DECIDES` are those that change what others compute.
"""

from __future__ import annotations

import gc
import locale
import os
import random
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch

Snapshot = dict[str, Any]
DECIDES = frozenset(
    {
        "random state of Python",
        "random state of torch",
        "random state of NumPy",
        "random state of the GPU",
        "default dtype",
        "default device",
        "TF32 in matrix products",
        "TF32 in cuDNN",
        "precision of float32 products",
        "sums in 16 bits",
        "split sums in 16 bits",
        "deterministic algorithms",
        "filling of uninitialised memory",
        "benchmarks of cuDNN",
        "gradients",
        "inference mode",
        "autocast",
        "denormals",
        "torch function modes",
        "torch dispatch modes",
        "current device",
        "current stream",
        "capture",
        "working directory",
    }
)
"""Settings that change what other code computes, or where: a change of one is a fault."""

LASTING = (DECIDES | {"environment", "signal handlers", "signal mask", "file mode mask"}) - {
    name for name in DECIDES if name.startswith("random state")
}
"""Settings that nothing but a backend changes in a worker's whole life."""


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or not hasattr(numpy, "random"):
        return None
    kind, keys, *rest = numpy.random.get_state()
    return kind, keys.tobytes(), tuple(rest)


def _denormals() -> bool:
    """Whether this thread flushes denormal numbers to zero."""
    return float(torch.tensor([1e-40], dtype=torch.float32).mul_(1.0)[0]) == 0.0


def _signals() -> dict[int, Any]:
    found = {}
    for number in signal.valid_signals():
        with suppress(ValueError, OSError):
            found[int(number)] = signal.getsignal(number)
    return found


def _open_files() -> set[str]:
    """Open files by number and target; the folder that is being listed is not among them."""
    found = set()
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with suppress(OSError):
            found.add(f"{name} -> {os.readlink(os.path.join(folder, name))}")
    return {each for each in found if "/proc/" not in each}


def _limits() -> dict[str, tuple[int, int]]:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    found = {}
    for name in names:
        with suppress(ValueError, OSError):
            found[name] = resource.getrlimit(getattr(resource, name))
    return found


def _fills_memory() -> bool:
    return bool(getattr(torch.utils.deterministic, "fill_uninitialized_memory", True))


def _umask() -> int:
    with suppress(OSError, ValueError), open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return -1


def _autocast() -> tuple[Any, ...]:
    # The names with a device type came with torch 2.4.
    found = []
    for kind in ("cpu", "cuda"):
        found += [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    return (*found, torch.is_autocast_cache_enabled())


def _modes(kind: str) -> int:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = _get_current_function_mode_stack if kind == "function" else None
    return len((stack or _get_current_dispatch_mode_stack)())


_ANYWHERE: dict[str, Callable[[], Any]] = {
    "random state of Python": random.getstate,
    "random state of torch": lambda: torch.random.get_rng_state().numpy().tobytes(),
    "random state of NumPy": _numpy_state,
    "default dtype": torch.get_default_dtype,
    "default device": lambda: str(torch.get_default_device()),
    "TF32 in matrix products": lambda: torch.backends.cuda.matmul.allow_tf32,
    "TF32 in cuDNN": lambda: torch.backends.cudnn.allow_tf32,
    "precision of float32 products": torch.get_float32_matmul_precision,
    "sums in 16 bits": lambda: (
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    ),
    "deterministic algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
    ),
    "filling of uninitialised memory": _fills_memory,
    "benchmarks of cuDNN": lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
    "gradients": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": _autocast,
    "denormals": _denormals,
    "torch function modes": lambda: _modes("function"),
    "torch dispatch modes": lambda: _modes("dispatch"),
    "threads of torch": torch.get_num_threads,
    "working directory": os.getcwd,
    "environment": lambda: dict(os.environ),
    "file mode mask": _umask,
    "signal handlers": _signals,
    "signal mask": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    "open files": _open_files,
    "threads": lambda: sorted(str(thread.name) for thread in threading.enumerate()),
    "limits of resources": _limits,
    "nice value": lambda: os.getpriority(os.PRIO_PROCESS, 0),
    "processors": lambda: sorted(os.sched_getaffinity(0)),
    "locale": lambda: locale.setlocale(locale.LC_ALL),
    "hooks": lambda: (id(sys.excepthook), id(sys.gettrace()), id(sys.getprofile())),
    "recursion limit": sys.getrecursionlimit,
    "switch interval": sys.getswitchinterval,
    "collection of garbage": lambda: (gc.isenabled(), gc.get_threshold()),
    "search path of modules": lambda: list(sys.path),
    "time-out of sockets": socket.getdefaulttimeout,
    "warnings": lambda: len(warnings.filters),
}


def _gpu(device: torch.device) -> dict[str, Callable[[], Any]]:
    return {
        "random state of the GPU": lambda: torch.cuda.get_rng_state(device).numpy().tobytes(),
        "current device": torch.cuda.current_device,
        "current stream": lambda: torch.cuda.current_stream(device).cuda_stream,
        "capture": torch.cuda.is_current_stream_capturing,
        "preferred BLAS": lambda: str(torch.backends.cuda.preferred_blas_library()),
        "limit of the allocator": lambda: torch.cuda.get_per_process_memory_fraction(device),
        "backend of the allocator": torch.cuda.get_allocator_backend,
    }


def snapshot(device: torch.device) -> Snapshot:
    """Every setting that can be read here, by name, without those that this torch does not have."""
    found: Snapshot = {}
    readers = {**_ANYWHERE, **(_gpu(device) if device.type == "cuda" else {})}
    for name, read in readers.items():
        with suppress(AttributeError, RuntimeError, OSError, ImportError, TypeError):
            found[name] = read()
    return found


def stir(device: torch.device) -> None:
    """Draw a number from every random state: one that is set by a constant each time is told from
    one that is left alone by having been moved in between."""
    random.random()
    torch.rand((), device="cpu")
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.random()
    if device.type == "cuda":
        torch.rand((), device=device)


def restore(device: torch.device, before: Snapshot, names: Collection[str]) -> None:
    """Set these settings back to what they were, as far as there is a way to."""
    for name in sorted(_WAYS_BACK.keys() & set(names)):
        _WAYS_BACK[name](before[name])
    if device.type == "cuda" and set(names) & {"current device", "current stream"}:
        torch.cuda.set_device(before["current device"])
        stream = before["current stream"]
        torch.cuda.set_stream(
            torch.cuda.ExternalStream(stream, device=device)
            if stream
            else torch.cuda.default_stream(device)
        )


def _set_torch_random(state: bytes) -> None:
    torch.random.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _set_deterministic(state: tuple[bool, bool, bool]) -> None:
    # The public function imports a compiler to tell it, too.
    torch._C._set_deterministic_algorithms(state[0], warn_only=state[1])
    torch.backends.cudnn.deterministic = state[2]


def _set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


def _set_environment(state: dict[str, str]) -> None:
    for name in os.environ.keys() - state.keys():
        del os.environ[name]
    os.environ.update(state)


_WAYS_BACK: dict[str, Callable[[Any], Any]] = {
    "random state of Python": random.setstate,
    "random state of torch": _set_torch_random,
    "default dtype": torch.set_default_dtype,
    "default device": lambda name: torch.set_default_device(None if name == "cpu" else name),
    "TF32 in matrix products": _set_tf32,
    "precision of float32 products": torch.set_float32_matmul_precision,
    "deterministic algorithms": _set_deterministic,
    "gradients": torch.set_grad_enabled,
    "denormals": torch.set_flush_denormal,
    "threads of torch": torch.set_num_threads,
    "working directory": os.chdir,
    "environment": _set_environment,
    "switch interval": sys.setswitchinterval,
}


def differences(before: Snapshot, after: Snapshot) -> dict[str, str]:
    """What changed, by name, each in a few words."""
    return {
        name: _told(before.get(name), value)
        for name, value in after.items()
        if name in before and before[name] != value
    }


def _told(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {*before, *after} if before.get(key) != after.get(key)]
        return ", ".join(sorted(map(str, keys))[:4])
    if isinstance(before, set) and isinstance(after, set):
        return ", ".join(sorted(map(str, before ^ after))[:4])
    if isinstance(before, (bool, int, float, str, torch.dtype)):
        return f"{before} before, {after} after"
    return "another one"
