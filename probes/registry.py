"""Which backends there are, and loading them by name.

Ours are in the table `BUILTIN`, so that they are found wherever the package can be imported, as
in a worker that runs a checkout in an engine's own interpreter. Others come from installed
distributions through the entry-point group ``fp4tune.backends``: an entry point named after its
backend loads to it, to a function without arguments that returns it, or to a list of either. A
file of one's own is loaded by ``path/to/file.py:NAME``. Names in a database are matched with
these and never imported.

Mutants (`zoo`) and ``controls`` load by their names too, and are in no list: none is a candidate.

Loading one backend imports its module and no other's.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from .backends import NAME, Backend
from .backends._returned import Returning
from .launch.process import Snapshot, differences, snapshot

GROUP = "fp4tune.backends"

FLASHINFER = (
    "flashinfer-cutlass",
    "flashinfer-cudnn",
    "flashinfer-trtllm",
    "flashinfer-cute-dsl",
    "flashinfer-cutedsl-low-latency",
    "flashinfer-b12x",
    "flashinfer-cake",
)

FLASHINFER_W4A16 = (
    "flashinfer-w4a16-cudnn",
    "flashinfer-w4a16-cute-dsl",
    "flashinfer-w4a16-cute-dsl-native",
    "flashinfer-w4a16-blackwell-native",
    "flashinfer-w4a16-blackwell-tiled",
)

FLASHINFER_EXPERTS = (
    "flashinfer-cutile-experts",
    "flashinfer-trtllm-experts",
    "flashinfer-prims-ts-experts",
    "flashinfer-b12x-experts",
    "flashinfer-sm12x-experts",
    "flashinfer-cutedsl-experts",
    "flashinfer-cutlass-nvfp4-experts",
    "flashinfer-trtllm-nvfp4-experts",
    "flashinfer-b12x-nvfp4-experts",
    "flashinfer-megamoe-experts",
)

BUILTIN: dict[str, str] = {
    "torch-dequant": "torch.dequant:torch_dequant",
    "torch-dequant-w4a4": "torch.dequant:torch_dequant_w4a4",
    "torch-compile": "torch.compiled:TorchCompile",
    "torch-bf16-resident": "torch.dequant:Resident",
    "triton-w4a16": "triton_w4a16.gemm:TritonW4A16",
    "marlin": "sglang_marlin.marlin:Marlin",
    "humming": "humming:Humming",
    "quack": "quack:Quack",
    **{name: "flashinfer.mm_fp4:backends" for name in FLASHINFER},
    **{name: "flashinfer.w4a16:backends" for name in FLASHINFER_W4A16},
    "cudnn-graph": "cudnn_graph:backends",
    "cudnn-graph-w4a16": "cudnn_graph:backends",
    "torch-scaled-mm": "torch.scaled_mm:TorchScaledMm",
    "vllm-cutlass": "vllm.cutlass:VllmCutlass",
    "vllm-marlin": "vllm.marlin:VllmMarlin",
}
"""Name to ``module:attribute`` in `backends`; the attribute is what an entry point may be."""

EXPERTS: dict[str, str] = {
    "torch-experts": "grouped.floor:TorchExperts",
    "humming-indexed": "backends.humming_experts:backends",
    "humming-grouped": "backends.humming_experts:backends",
    "humming-masked": "backends.humming_experts:backends",
    "marlin-experts": "backends.sglang_marlin.experts:MarlinExperts",
    "vllm-marlin-experts": "backends.vllm.experts:VllmMarlinExperts",
    "vllm-ogs": "backends.triton_kernels:backends",
    "vllm-ogs-unfused": "backends.triton_kernels:backends",
    "triton-kernels": "backends.triton_kernels:backends",
    "flashinfer-cutlass-experts": "backends.flashinfer.experts_cutlass:CutlassExperts",
    **{name: "backends.flashinfer.experts_layer:backends" for name in FLASHINFER_EXPERTS},
}
"""The same of routed experts, in `probes`: a provider's stand beside its dense ones."""

_ALLOWED = "up to 128 letters, digits, dots, dashes, underscores and plus signs"
_OURS = "this is the name of a backend of fp4tune's own"
_MUTANT = "zoo-"
_ROLES = ("controls",)
"""Names that stand for more than a backend in what is stored."""
_HOST = torch.device("cpu")
_TEXT_MEMBERS = ("name", "activation", "layout")
_OF_EXPERTS = {
    "unsupported": ("problem", "device"),
    "prepare": ("weights", "problem"),
    "run": ("state", "x", "ids", "weights", "out", "tactic"),
}
_METHODS = {
    "unsupported": ("problem", "device"),
    "prepare": ("weight", "problem"),
    "run": ("state", "a", "out", "tactic"),
}


class UnknownBackend(ValueError):
    """No backend has this name. The message suggests close ones."""


class BadBackend(ValueError):
    """A backend was found but cannot be loaded, or is not one."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A backend that is installed and could not be loaded."""

    name: str
    reason: str


def is_ours(name: str) -> bool:
    """Whether a name is, or may be, that of something of ours: no plugin may have it."""
    return name in BUILTIN or name in EXPERTS or name in _ROLES or name.startswith(_MUTANT)


def _entry_points() -> dict[str, metadata.EntryPoint]:
    found = metadata.entry_points(group=GROUP)
    return {e.name: e for e in found if not is_ours(e.name) and NAME.fullmatch(e.name)}


def misnamed() -> list[Broken]:
    """Installed plugins that are left out because their name is none, or one of ours."""
    found = metadata.entry_points(group=GROUP)
    left = [Broken(e.name, _OURS) for e in found if is_ours(e.name)]
    unfit = (ascii(e.name)[:100] for e in found if not NAME.fullmatch(e.name))
    return [*left, *(Broken(name, f"a backend's name is {_ALLOWED}") for name in unfit)]


def names() -> list[str]:
    """Every name `load` knows: ours, then those of installed plugins, without importing any."""
    return [*BUILTIN, *sorted(_entry_points())]


def experts_names() -> list[str]:
    """Every name of ours that computes routed experts."""
    return list(EXPERTS)


def check(candidate: Any, where: str) -> Backend:
    """`candidate`, if it has all that the `Backend` protocol asks for; one of routed experts, as
    what launches dense ones can launch (`grouped.backend.AsDense`).

    Raises BadBackend, one sentence naming what is missing; `where` says where it came from.
    """
    if getattr(candidate, "experts", False):
        return _of_experts(candidate, where)
    if not callable(getattr(candidate, "run", None)) and callable(
        getattr(candidate, "matmul", None)
    ):
        candidate = Returning(candidate)
    missing = [m for m in _TEXT_MEMBERS if not isinstance(getattr(candidate, m, None), str)]
    missing += [m + "()" for m in _METHODS if not callable(getattr(candidate, m, None))]
    if missing:
        raise BadBackend(f"{where} is not a backend: it lacks {', '.join(missing)}")
    if not NAME.fullmatch(candidate.name):
        raise BadBackend(f"{where} is called {ascii(candidate.name)[:100]}; a name is {_ALLOWED}")
    if candidate.activation not in ("bf16", "fp4"):
        raise BadBackend(
            f"{where} has activation {candidate.activation!r}, which is neither bf16 nor fp4"
        )
    for method, arguments in _METHODS.items():
        try:
            inspect.signature(getattr(candidate, method)).bind(*arguments)
        except TypeError:
            raise BadBackend(
                f"{where} is not a backend: {method}() does not take ({', '.join(arguments)})"
            ) from None
        except ValueError:  # a compiled function without a signature
            continue
    backend: Backend = candidate
    return backend


def _of_experts(candidate: Any, where: str) -> Backend:
    """A backend of routed experts, wrapped. Raises BadBackend, one sentence."""
    from .grouped.backend import STAGES, AsDense

    backend: Any = candidate
    if isinstance(candidate, AsDense):
        return backend
    missing = [m for m in ("name", "layout") if not isinstance(getattr(candidate, m, None), str)]
    missing += [f"{m}()" for m in _OF_EXPERTS if not callable(getattr(candidate, m, None))]
    if missing:
        raise BadBackend(f"{where} computes no routed experts: it lacks {', '.join(missing)}")
    if not NAME.fullmatch(candidate.name):
        raise BadBackend(f"{where} is called {ascii(candidate.name)[:100]}; a name is {_ALLOWED}")
    cut = {m: a for m, a in STAGES.items() if callable(getattr(candidate, m, None))}
    for method, arguments in (*_OF_EXPERTS.items(), *cut.items()):
        try:
            inspect.signature(getattr(candidate, method)).bind(*arguments)
        except TypeError:
            wanted = ", ".join(arguments)
            raise BadBackend(
                f"{where} computes no routed experts: {method}() does not take ({wanted})"
            ) from None
        except ValueError:  # a compiled function without a signature
            continue
    backend = AsDense(candidate)
    return backend


def _unfolded(loaded: Any, where: str) -> Iterable[Backend]:
    """Unfold what an entry point or a file may give: a backend, a factory, or a list of them."""
    if isinstance(loaded, (list, tuple)):
        for each in loaded:
            yield from _unfolded(each, where)
    elif inspect.isclass(loaded) or (
        callable(loaded) and not (hasattr(loaded, "run") or hasattr(loaded, "matmul"))
    ):
        try:
            made = loaded()
        except Exception as error:
            raise BadBackend(f"{where} failed when called: {error!r}") from error
        if inspect.isclass(made) or inspect.isroutine(made):
            raise BadBackend(f"{where} returns {made!r}, which is not a backend")
        yield from _unfolded(made, where)
    else:
        yield check(loaded, where)


def _select(name: str, found: Iterable[Backend], where: str) -> Backend:
    named = {backend.name: backend for backend in found}
    if name in named:
        return named[name]
    has = ", ".join(sorted(named)) or "none"
    raise BadBackend(f"{where} holds no backend named {name!r} (it has {has})")


def _import(load: Callable[[], Any], where: str) -> Any:
    try:
        return load()
    except Exception as error:  # a plugin may raise anything while it is imported
        raise BadBackend(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


def _load_builtin(name: str) -> Backend:
    module, _, attribute = BUILTIN[name].partition(":")

    def load() -> Any:
        return getattr(importlib.import_module(f".backends.{module}", __package__), attribute)

    return _select(name, _unfolded(_import(load, name), name), name)


def _load_experts(name: str) -> Backend:
    """One of ours that computes routed experts, or a mutant of those."""
    if name in EXPERTS:
        module, _, attribute = EXPERTS[name].partition(":")

        def load() -> Any:
            return getattr(importlib.import_module(f".{module}", __package__), attribute)

        return _select(name, _unfolded(_import(load, name), name), name)
    from .grouped import zoo

    try:
        return check(zoo.named(name), name)
    except KeyError:
        raise UnknownBackend(f"there is no mutant {name!r}") from None


def _load_mutant(name: str) -> Backend:
    from . import zoo

    try:
        return zoo.named(name)
    except KeyError:
        raise UnknownBackend(f"there is no mutant {name!r}") from None


def _load_entry_point(entry: metadata.EntryPoint) -> Backend:
    where = f"{entry.name} ({entry.value})"
    return _select(entry.name, _unfolded(_import(entry.load, where), where), where)


def is_file(spec: str) -> bool:
    """Whether a ``--backend`` value means a file (``FILE.py:NAME``) and not a name."""
    return ".py:" in spec or spec.endswith(".py")


def _file_of(spec: str) -> tuple[Path, str]:
    path_text, _, attribute = spec.rpartition(":")
    if not path_text.endswith(".py") or not attribute.isidentifier():
        raise BadBackend(f"{spec!r} is not of the form FILE.py:NAME")
    path = Path(path_text).expanduser().resolve()
    if not path.is_file():
        raise BadBackend(f"there is no file {path}")
    return path, attribute


class _Source(SourceFileLoader):
    """A file as its text says. Bytecode kept beside it may be that of an earlier text of the same
    second and length, and what is proven is proven of the text."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_file(spec: str) -> Backend:
    """The backend `NAME` of the file in ``path/to/file.py:NAME``; NAME as an entry point's.

    The file runs with all your rights: never pass one that came from a database or a bundle.
    Raises BadBackend.
    """
    path, attribute = _file_of(spec)

    def load() -> Any:
        # The path's digest keeps two files of one name apart; the module must be in sys.modules
        # for dataclasses and pickling in it.
        name = f"fp4tune_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        source = _Source(name, str(path))
        found = importlib.util.spec_from_file_location(name, path, loader=source)
        assert found is not None and found.loader is not None  # true of every .py path
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    module = _import(load, str(path))
    if not hasattr(module, attribute):
        raise BadBackend(f"{path} has no {attribute!r}")
    made = list(_unfolded(getattr(module, attribute), spec))
    if len(made) != 1:
        raise BadBackend(f"{spec} is {len(made)} backends, and one was asked for")
    if is_ours(made[0].name):
        raise BadBackend(f"{spec} is called {made[0].name}: {_OURS}")
    return made[0]


def known(name: str) -> None:
    """Check that `name` is a backend's, or a file's, without importing anything.

    Raises UnknownBackend, or BadBackend for a file that is not there.
    """
    if is_file(name):
        _file_of(name)
    elif name not in EXPERTS and name not in names():
        raise _unknown(name)


def _unknown(name: str) -> UnknownBackend:
    everyone = [*names(), *EXPERTS]
    close = difflib.get_close_matches(name, everyone, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(everyone)}"
    return UnknownBackend(f"there is no backend {name!r}; {hint}")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A backend, the name it was loaded by, and the process's settings around that."""

    backend: Backend
    spec: str
    before: Snapshot
    after: Snapshot


_loaded: dict[int, _Loaded] = {}
"""By the id of the backend."""


def load_one(name: str) -> Backend:
    """The backend called `name`, or the one in the file ``FILE.py:NAME``.

    Raises UnknownBackend or BadBackend (both ValueError), one sentence each.
    """
    before = snapshot(_HOST)
    backend = _load(name)
    _loaded[id(backend)] = _Loaded(backend, name, before, snapshot(_HOST))
    return backend


def effects_of(backend: Backend) -> dict[str, str]:
    """What loading the backend changed of the process, by setting (`launch.process`)."""
    found = _loaded.get(id(backend))
    return differences(found.before, found.after) if found else {}


def settings_of(backend: Backend) -> Snapshot:
    """What the process was set to when the backend had been loaded; empty where it was not."""
    found = _loaded.get(id(backend))
    return found.after if found else {}


def spec_of(backend: Backend) -> str | None:
    """The name that the backend was loaded by; None for one that was made otherwise."""
    found = _loaded.get(id(backend))
    return found.spec if found else None


def _load(name: str) -> Backend:
    if is_file(name):
        return load_file(name)
    if name in BUILTIN:
        return _load_builtin(name)
    if name in EXPERTS or name.startswith("zoo-experts-"):
        return _load_experts(name)
    if name.startswith("zoo-"):
        return _load_mutant(name)
    if name == "controls":
        from .zoo.controls import controls

        return controls()
    if name == "controls-experts":
        from .grouped.zoo.controls import ExpertsControls

        return check(ExpertsControls(), name)
    plugins = _entry_points()
    if name in plugins:
        return _load_entry_point(plugins[name])
    raise _unknown(name)


def origin(name: str) -> tuple[Path, str]:
    """Where `load_one` takes a backend from: its file, and Python source that makes it again.

    The source leaves it in ``backend``; it uses ``_unfolded`` and ``_from_file``, which a bundle
    defines (`probes.bundle`). Raises UnknownBackend or BadBackend.
    """
    here = Path(__file__).resolve().parent
    if is_file(name):
        path, attribute = _file_of(name)
        return path, f"(backend,) = _unfolded(_from_file({path.name!r}, {attribute!r}))\n"
    if name in EXPERTS or name.startswith("zoo-experts-"):
        module = EXPERTS.get(name, "grouped.zoo").partition(":")[0]
        make = f"from fp4tune.probes import registry\n\nbackend = registry.load_one({name!r})\n"
        place = here.joinpath(*module.split("."))
        return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")), make
    if name.startswith("zoo-"):
        make = f"from fp4tune.probes import zoo\n\nbackend = zoo.named({name!r})\n"
        return here / "zoo" / "__init__.py", make
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        source, file = (
            f"fp4tune.probes.backends.{module}",
            here.joinpath("backends", *module.split(".")).with_suffix(".py"),
        )
    elif name in _entry_points():
        entry = _entry_points()[name]
        source, attribute, file = entry.module, entry.attr, here / "problem.py"
    else:
        raise _unknown(name)
    make = f"from {source} import {attribute} as made\n\n"
    return file, make + f"backend = next(b for b in _unfolded(made) if b.name == {name!r})\n"


def load_all() -> tuple[dict[str, Backend], list[Broken]]:
    """Every backend that can be loaded, by name, and why each of the others cannot."""
    loaded: dict[str, Backend] = {}
    broken = misnamed()
    for name in names():
        try:
            loaded[name] = load_one(name)
        except ValueError as error:
            broken.append(Broken(name, str(error)))
    return loaded, broken


def load(wanted: Sequence[str] | None = None) -> dict[str, Backend]:
    """Backends by name: those `wanted` (names or ``FILE.py:NAME``), or all that can be loaded.

    With `wanted`, one that is unknown or broken raises; without, broken ones are left out and
    `load_all` says why.
    """
    if wanted is None:
        return load_all()[0]
    backends = (load_one(name) for name in wanted)
    return {backend.name: backend for backend in backends}
