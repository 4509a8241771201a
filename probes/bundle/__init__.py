"""A failure as a folder that runs without this program: a script, its data, and the call.

The maintainer of the backend needs torch and the backend. Where the backend says how it is called
(`call_source`), ``call.py`` is that and nothing of ours is in between; else its own file is copied,
with what it needs of what lies beside it, and with the modules of this package that it imports.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...machine import files
from ..check.reference import Expectation, expect, tile_limit
from ..data import draw as of_family
from ..data import exact, steady
from ..data.operands import Operands
from ..launch.case import Launch
from ..problem import FORMATS, Fp4Tensor, Problem
from .closure import NAME, PACKAGE, closure
from .siblings import beside
from .trial import RAN, trial

HARNESS = Path(__file__).with_name("harness.py")
MODES = ("serial", "graph", "streams", "side-stream", "graph-streams")
"""Regimes that the script recreates with plain torch."""
MOST_BYTES = 256 << 20
"""Launches around the failing one are left out where the data would be larger."""


@dataclass(frozen=True, slots=True)
class CallSource:
    """How a backend is called: its own ``source``, or else where it comes from.

    `file` is the module that defines it; `make` is source that leaves the backend in a variable
    ``backend``, for a copy of that module. `loaded` is None for a backend of this package or of
    another that is installed; for one in a file of its own it has the modules, by name, that the
    file brought along.
    """

    source: str | None
    file: str
    make: str
    loaded: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What a bundle shows: `launches[at]`, which failed in `regime`, among those around it.

    `problem.m` is that of the pools. `by_tile`: the output is held to the error of a tile and not
    to each element's bounds. `kind` is the finding's: one that ends a process does so here, too.
    """

    problem: Problem
    regime: str
    kind: str
    cases: Sequence[tuple[Operands, Expectation]]
    launches: Sequence[Launch]
    at: int
    by_tile: bool
    device: str


def write(
    path: Path,
    shown: Shown,
    call: CallSource,
    texts: Mapping[str, str],
    python: str | None = None,
) -> Path:
    """Write the bundle to `path`: a folder, or a zip where the name ends so; returns the path.

    `texts` are more files to put in, by name. It is run once before it is there, by `python` or
    this interpreter. Raises ValueError where something is there already, and where the bundle does
    not run by itself; then nothing is.
    """
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"--bundle {path}: something is there already")
    with tempfile.TemporaryDirectory(prefix="fp4tune-bundle-") as temporary:
        folder = Path(temporary) / (path.stem if path.suffix == ".zip" else path.name)
        folder.mkdir()
        torch.save(_bundle_data(shown), folder / "data.pt")
        shutil.copyfile(HARNESS, folder / "reproduce.py")
        for name, text in {**texts, "call.py": _call_text(folder, call)}.items():
            (folder / name).write_text(text, encoding="utf-8")
        _must_run(folder, shown.kind, python)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            shutil.make_archive(str(path.with_suffix("")), "zip", temporary, folder.name)
        else:
            shutil.copytree(folder, path, dirs_exist_ok=True)
    return path


def _must_run(folder: Path, kind: str, python: str | None) -> None:
    """Raises ValueError, with what it said, for a bundle that does not come to its launches."""
    code, said = trial(folder, python)
    ended = (code < 0 and code != -signal.SIGALRM and kind in ("crash", "poisoned")) or (
        code == -signal.SIGALRM and kind == "hang"
    )
    if code not in RAN and not ended:
        how = f"it was ended by signal {-code}" if code < 0 else said
        raise ValueError(f"the bundle does not run by itself, and is not kept: {how}")
    for rubbish in folder.rglob("__pycache__"):
        shutil.rmtree(rubbish, ignore_errors=True)


def _bundle_data(shown: Shown) -> dict[str, Any]:
    """What ``data.pt`` holds."""
    problem = shown.problem
    chosen = _fitting_places(shown.cases, shown.launches, shown.at, problem.n)
    return {
        "problem": _problem_data(problem),
        "regime": shown.regime,
        "mode": mode_of(shown.regime),
        "device": shown.device,
        "tile_limit": tile_limit(problem.k) if shown.by_tile else None,
        "weights": [_fp4(operands.weight) for operands, _ in shown.cases],
        "launches": [
            _launch_data(shown.cases, shown.launches[i], i == shown.at, shown.by_tile)
            for i in chosen
        ],
    }


def mode_of(regime: str) -> str:
    """The conditions of the script that come closest to those of a regime."""
    if regime in MODES:
        return regime
    if "streams" in regime or "threads" in regime:
        return "streams"
    return "graph" if "graph" in regime else "serial"


def drawn(
    problem: Problem,
    data: str,
    width: int | None,
    seed: int,
    device: torch.device | str,
    draw: int | None = None,
) -> tuple[Operands, Expectation]:
    """The operands of a seed again, with their answer; `draw` as in `OpenLayer.case_of`.

    Raises ValueError for unknown data.
    """
    if draw is not None:
        operands = steady(problem, width or 0, seed, device)
        assert operands.rows is not None
        operands.rows.fill(operands.a, draw)
    elif data == "exact":
        operands = exact(problem, width or 0, seed, device)
    else:
        operands = of_family(problem, data, seed, device)
    return operands, expect(operands, problem)


def _fitting_places(
    cases: Sequence[tuple[Operands, Expectation]], launches: Sequence[Launch], at: int, n: int
) -> list[int]:
    """Places of the chain, the failing one and those nearest to it, as many as are not too much."""
    chosen, size = [at], 0
    for i in sorted(range(len(launches)), key=lambda i: abs(i - at)):
        operands = cases[launches[i].case][0]
        size += launches[i].m * (2 * n + 2 * operands.a.shape[1])
        if i != at and size <= MOST_BYTES:
            chosen.append(i)
    return sorted(chosen)


def _problem_data(problem: Problem) -> dict[str, Any]:
    fmt = FORMATS[problem.format]
    return {
        "format": fmt.name,
        "activation": problem.activation,
        "n": problem.n,
        "k": problem.k,
        "rows": problem.m,
        "block": fmt.block,
        "scale": fmt.scale,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }


def _fp4(t: Fp4Tensor) -> dict[str, torch.Tensor]:
    parts = {"codes": t.codes, "scales": t.scales, "global_scale": t.global_scale}
    return {name: part.cpu().clone() for name, part in parts.items()}


def _launch_data(
    cases: Sequence[tuple[Operands, Expectation]], launch: Launch, target: bool, by_tile: bool
) -> dict[str, Any]:
    operands, expectation = cases[launch.case]
    rows = slice(launch.offset, launch.offset + launch.m)
    right = expectation.window(rows.start, rows.stop)
    a = operands.a
    if isinstance(a, Fp4Tensor):
        codes, scales = a.codes[rows], a.scales[rows]
        activation: Any = _fp4(Fp4Tensor(a.format, codes, scales, a.global_scale))
    else:
        activation = a[rows].cpu().clone()
    return {
        "weight": launch.case,
        "a": activation,
        "lo": right.lo.cpu().clone(),
        "hi": None if right.exact else right.hi.cpu().clone(),
        "ref": right.ref.float().cpu() if by_tile and right.ref is not None else None,
        "tactic": launch.tactic,
        "target": target,
    }


_VENDORED = '''"""Calls the backend as it was probed: a copy of its file, and of what that imports.

The backend documents no call without fp4tune, so the copy in `vendor` is what runs here.
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "vendor"), str(HERE / "backend")]

from fp4tune.probes.problem import FORMATS, Fp4Tensor, Problem


def _unfolded(made):
    """What a module gives: a backend, a function that returns one, or a list of either."""
    if isinstance(made, (list, tuple)):
        for each in made:
            yield from _unfolded(each)
    elif isinstance(made, type) or (callable(made) and not hasattr(made, "run")):
        yield from _unfolded(made())
    else:
        yield made


def _from_file(name, attribute):
    spec = importlib.util.spec_from_file_location("backend_under_test", HERE / "backend" / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, attribute)


{make}


def _tensor(parts, block):
    fmt = next(f for f in FORMATS.values() if f.block == block)
    return Fp4Tensor(fmt, parts["codes"], parts["scales"], parts["global_scale"])


def prepare(weight, problem):
    dtype = {{"bfloat16": "bf16", "float16": "fp16"}}[str(problem["dtype"]).split(".")[1]]
    shape = (problem["rows"], problem["n"], problem["k"])
    wanted = Problem(problem["format"], *shape, problem["activation"], dtype)
    return backend.prepare(_tensor(weight, problem["block"]), wanted)


def prepare_activation(a):
    if not isinstance(a, dict):
        return a
    block = a["codes"].shape[1] * 2 // a["scales"].shape[1]
    made = _tensor(a, block)
    own = getattr(backend, "prepare_activation", None)
    return own(made) if own else made


def run(state, a, out, tactic):
    backend.run(state, a, out, tactic)
'''


def _call_text(folder: Path, call: CallSource) -> str:
    """The text of ``call.py``; copies what it imports into `folder`."""
    if call.source is not None:
        return call.source
    file = Path(call.file)
    problems = PACKAGE / "probes" / "problem.py"
    theirs = {} if call.loaded is None else beside(file, call.loaded)
    for source, place in theirs.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.whole(source, MOST_BYTES, links=True))
    python = [source for source in theirs if source.suffix == ".py"]
    for module in closure([problems] if theirs else [file, problems], outside=python):
        target = folder / "vendor" / NAME / module.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)
    (folder / "vendor" / NAME / "__init__.py").write_text("", encoding="utf-8")
    return _VENDORED.format(make=call.make)
