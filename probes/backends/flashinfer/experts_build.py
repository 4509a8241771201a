"""FlashInfer's CUTLASS experts for SM90, of which only what MXFP4 weights on bf16 tokens need.

The whole module is 154 generated units (0.6.12) or 220 (0.7.4) and some twenty by hand, of a minute
or two and 6 GB each. Here FlashInfer's own build is asked for fewer of its sources:

* of the generated kernels those of bf16 by FP4 that a tactic can select (`selectable`), eight a
  unit: 25 in 0.6.12, 100 in 0.7.4;
* of the units by hand those that this path runs, and of the runners' unit one runner.

What other formats need has a stand-in that says so and ends the process (`stand_ins`): this path
never calls it, but the library would not load without.

The library is found by `library`: in ``$FP4TUNE_FLASHINFER_EXPERTS/<FlashInfer's version>/``, where
one has been brought; else as FlashInfer keeps the whole module, compiled ahead; else where `build`
puts it, beside FlashInfer's other modules. Ahead of time, without a GPU::

    python -m fp4tune.probes.backends.flashinfer.experts_build FOLDER

writes ``FOLDER/<version>/fused_moe_90.so``, and beside it which kernels that holds. It needs nvcc
and the headers of cuBLAS and cuRAND, of the toolkit or of torch's wheels. ``MAX_JOBS`` says how
many units are compiled at once, and ``--units N`` leaves out all units of kernels but the first N:
one is what a plain call runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import settings
from ._support import version

FOLDER = "FP4TUNE_FLASHINFER_EXPERTS"
"""The variable that names a folder of libraries that were built elsewhere."""
MODULE = "fused_moe_90"
PARTIAL = "fp4tune_fused_moe_90"
"""What FlashInfer's cache calls the part of it."""
PER_UNIT = 8
"""Kernels of a unit, as FlashInfer has it: more need more than 6 GB."""
ONE = (1, 1, 1)
CLUSTERS = (ONE, (2, 1, 1), (1, 2, 1), (2, 2, 1))
"""In the order of FlashInfer's tactics."""
WORKSPACE_TILE = (128, 64, 256)
"""The tile of the kernel that is asked how much workspace any needs; it may never run."""

BY_HAND = frozenset(
    {
        "moe_gemm_tma_warp_specialized_input.cu",
        "moe_gemm_kernels_bf16_fp4.cu",
        "moe_gemm_mixed_utils.cu",
        "flashinfer_cutlass_fused_moe_binding.cu",
        "deepgemm_jit_setup.cu",
        "envUtils.cpp",
        "logger.cpp",
        "stringUtils.cpp",
        "tllmException.cpp",
        "memoryUtils.cu",
        "preQuantScaleKernel.cu",
        "cutlass_heuristic.cpp",
        "lora.cpp",
    }
)
"""Units by hand that are taken as they are."""
STAND_INS = "left_out.cpp"
RUNNERS = "cutlass_fused_moe_instantiation.cu"
HEURISTIC = "cutlass_heuristic.cpp"

_LAUNCHER = re.compile(r"^template void (\w+)<\s*(\w+),\s*(\w+),.*?;\n", re.MULTILINE | re.DOTALL)
_SHAPE = re.compile(r"cute::Shape<cute::Int<(\d+)>, cute::Int<(\d+)>, cute::Int<(\d+)>>")
_RUNNER = re.compile(r"^template class CutlassMoeFCRunner<.*?>;\n", re.MULTILINE | re.DOTALL)
_OURS = re.compile(r"<__nv_bfloat16, (?:Fp4Type|SafeFP4|__nv_fp4_e2m1)>")
_FP4 = ("SafeFP4", "__nv_fp4_e2m1")


Three = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Launcher:
    """One generated GEMM launcher: its tile (m, n, k) as CUTLASS has it, whose m is an expert's
    row and n a token, its cluster, its schedule, and the text that makes it."""

    tile: Three
    cluster: Three
    pingpong: bool
    text: str


def kernels(source: str) -> Iterator[Launcher]:
    """The bf16 by FP4 launchers of a generated unit."""
    for found in _LAUNCHER.finditer(source):
        if found[2] != "__nv_bfloat16" or found[3] not in _FP4:
            continue
        tile, cluster = ((int(m), int(n), int(k)) for m, n, k in _SHAPE.findall(found[0])[:2])
        yield Launcher(tile, cluster, "Pingpong" in found[0], found[0])


def numbered(heuristic: str) -> list[tuple[Three, Three]]:
    """Tile and cluster of each of the tactics for grouped GEMMs with weights of their own type, in
    FlashInfer's order, from the source of `HEURISTIC`.

    Raises ValueError where it is not the one this was written for.
    """
    _, _, rest = heuristic.partition("get_candidate_tiles_sm90(")
    listed = r"GROUPED_GEMM\) \{\s*if \(config & \S+WEIGHT_ONLY\) \{(.*?)\}\s*;"
    found = re.search(listed, rest, re.DOTALL)
    tiles = re.findall(r"CtaShape(\d+)x(\d+)x(\d+)B", found[1]) if found else []
    if not tiles:
        raise ValueError(f"this FlashInfer's {HEURISTIC} lists no tiles for grouped SM90 GEMMs")
    shapes = [(int(m), int(n), int(k)) for m, n, k in tiles]
    if re.search(r"CtaShape128x128x128B\) continue", heuristic):  # before 0.7
        # One tile is left out, and another stands for a narrower one.
        narrow = {(64, 128, 128): (64, 64, 128)}
        shapes = [narrow.get(s, s) for s in shapes if s != (128, 128, 128)]
    return [(shape, cluster) for shape in shapes for cluster in CLUSTERS]


def selectable(kernel: Launcher, tiles: frozenset[Three]) -> bool:
    """Whether a tactic selects the kernel, or the workspace is asked of it.

    Tactics run tiles of 64 rows by pingpong and larger ones cooperatively. What FlashInfer keeps
    from tactics since 0.7 is left out: tiles too large for 16-bit tokens.
    """
    m, n, k = kernel.tile
    if kernel.pingpong != (m == 64):
        return False
    if kernel.tile == WORKSPACE_TILE and kernel.cluster == ONE:
        return True
    too_large = (k == 256 and {m, n} == {128, 256}) or (k == 512 and n >= 128)
    return kernel.tile in tiles and not too_large


def generated_units(sources: Sequence[Path], heuristic: str) -> list[str]:
    """Units of at most `PER_UNIT` selectable kernels each, in a fixed order: those of a plain call
    first."""
    tiles = frozenset(tile for tile, _ in numbered(heuristic))
    taken: list[Launcher] = []
    frame: tuple[str, str] | None = None
    for source in sorted(sources):
        text = source.read_text()
        found = [k for k in kernels(text) if selectable(k, tiles)]
        if found:
            frame = frame or (text[: text.index("template void")], text[text.rindex("\n\n}") :])
            taken += found
    if frame is None:
        raise ValueError("this FlashInfer generates no bf16 by FP4 kernels for SM90")
    taken.sort(key=lambda k: (k.tile, k.cluster))
    # What a plain call runs, in the first unit.
    least = [taken[0], *(k for k in taken[1:] if k.tile == WORKSPACE_TILE and k.cluster == ONE)]
    rest = [k for k in taken if k not in least]
    parts = [least, *(rest[i : i + PER_UNIT] for i in range(0, len(rest), PER_UNIT))]
    return [frame[0] + "\n".join(k.text for k in part) + frame[1] for part in parts]


def one_runner(source: str) -> str:
    """The runners' unit with the runner of bf16 tokens and FP4 weights alone.

    Raises ValueError where there is not exactly one.
    """
    kept = [r for r in _RUNNER.findall(source) if _OURS.search(r)]
    if len(kept) != 1:
        raise ValueError(f"{len(kept)} runners of bf16 by FP4 in {RUNNERS}, and one is expected")
    return _RUNNER.sub(lambda r: r[0] if _OURS.search(r[0]) else "", source)


def _whole_module() -> Any:
    """FlashInfer's specification of the whole module."""
    return importlib.import_module("flashinfer.jit.fused_moe").gen_cutlass_fused_moe_sm90_module()


def brought() -> Path | None:
    """The library that was built elsewhere for this version, if there is one."""
    folder = settings.value(FOLDER)
    path = Path(folder, version(), f"{MODULE}.so") if folder else None
    return path if path is not None and path.is_file() else None


def _built_place(name: str) -> Path:
    env = importlib.import_module("flashinfer.jit.env")
    return Path(env.FLASHINFER_JIT_DIR, name, f"{name}.so")


def library() -> Path | None:
    """The library to load; None where none is built. See the module's docstring."""
    env = importlib.import_module("flashinfer.jit.env")
    ahead = [Path(d, MODULE, f"{MODULE}.so") for d in _ahead_folders(env)]
    places = [brought(), *ahead, _built_place(MODULE), _built_place(PARTIAL)]
    return next((p for p in places if p is not None and p.is_file()), None)


def _ahead_folders(env: Any) -> Sequence[Any]:
    return getattr(env, "FLASHINFER_AOT_DIRS", None) or (env.FLASHINFER_AOT_DIR,)


def missing() -> str | None:
    """What keeps the module from being built here, in one sentence; None if nothing does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if shutil.which("nvcc") is None and not Path(home or "/usr/local/cuda", "bin/nvcc").is_file():
        return "nvcc is not on PATH, in CUDA_HOME or in /usr/local/cuda"
    return None


def wheels_headers() -> list[str]:
    """Flags for CUDA's headers as torch's wheels bring them, to be looked into last: an image with
    nvcc need not have those of cuBLAS and cuRAND."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    found = [d for place in places or () for d in sorted(Path(place).glob("*/include"))]
    return [flag for d in found if (d / "cublasLt.h").is_file() for flag in ("-isystem", str(d))]


def driver_to_link(folder: Path) -> list[str]:
    """Flags that name the driver's library where there is none to link with, as in an image without
    a GPU and without CUDA's stubs: an empty one that is called so."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    stubs = [Path(home, "lib64", *more, "libcuda.so") for more in ((), ("stubs",))]
    if any(path.exists() for path in stubs):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CXX", "c++"), "-shared", "-x", "c++", os.devnull, "-o"]
    command += [str(folder / "libcuda.so"), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True)
    # Nothing of it is used, and the library is to ask for it all the same.
    return [f"-L{folder}", "-Wl,--no-as-needed", "-lcuda"]


def _write_source(path: Path, text: str) -> Path:
    """Write a source where it is not so already: what is newer is compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return path


def heuristic() -> str:
    """The source that says which tactics there are."""
    env = importlib.import_module("flashinfer.jit.env")
    found = next(Path(env.FLASHINFER_CSRC_DIR).rglob(HEURISTIC), None)
    if found is None:
        raise ValueError(f"this FlashInfer has no {HEURISTIC}")
    return found.read_text()


def specification(most: int | None = None) -> Any:
    """FlashInfer's own build of the module, with fewer sources; of the units of
    kernels the first `most`, or all."""
    whole, env = _whole_module(), importlib.import_module("flashinfer.jit.env")
    own = {p.name: Path(p) for p in whole.sources if ".generated." not in p.name}
    folder = Path(env.FLASHINFER_GEN_SRC_DIR, PARTIAL)
    every = [Path(p) for p in whole.sources if ".generated." in p.name]
    units = generated_units(every, own[HEURISTIC].read_text())[:most]
    sources = [_write_source(folder / f"fp4_{i:02}.generated.cu", u) for i, u in enumerate(units)]
    sources.append(_write_source(folder / RUNNERS, one_runner(own[RUNNERS].read_text())))
    sources += [path for name, path in own.items() if name in BY_HAND]
    if not (stubs := folder / STAND_INS).is_file():
        _write_source(stubs, stand_ins(()))
    sources.append(stubs)  # the last, so that what is there is taken before
    flags = [*dict.fromkeys([*(whole.extra_cuda_cflags or []), "--compress-mode=size"])]
    # NVRTC is for FP8 experts alone, and a library of its own that need not be there.
    ldflags = [f for f in whole.extra_ldflags or [] if f != "-lnvrtc"]
    # What NVRTC would be called for is left out, and bound when it is called.
    ldflags += [*driver_to_link(folder / "stubs"), "-Wl,-z,lazy"]
    return dataclasses.replace(
        whole,
        name=PARTIAL,
        sources=sources,
        extra_cflags=[*(whole.extra_cflags or []), *wheels_headers()],
        extra_cuda_cflags=[*flags, *wheels_headers()],
        extra_ldflags=ldflags,
        # The runners' unit stands beside its headers, and its copy does not.
        extra_include_dirs=[*(whole.extra_include_dirs or []), own[RUNNERS].parent],
    )


def build(workers: int) -> Path:
    """Compile the part that is needed, unless a library is there. Raises RuntimeError with the
    compiler's words."""
    found = library()
    if found is not None and found != _built_place(PARTIAL):
        return found
    os.environ["MAX_JOBS"] = str(workers)  # what FlashInfer passes to ninja
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    return _complete(specification())


def left_out(path: Path) -> list[str]:
    """The symbols of TensorRT-LLM's that a library asks for and nothing of it defines."""
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = (line.split()[-1] for line in done.stdout.splitlines())
    return sorted(n for n in names if "12tensorrt_llm" in n)


def stand_ins(names: Sequence[str]) -> str:
    """C++ that defines these symbols: whoever calls one is told so, and the process ends.

    They are weak, so that what is built later is taken instead.
    """
    lines = [
        "#include <cstdio>",
        "#include <cstdlib>",
        'extern "C" void fp4tune_left_out() {',
        '  std::fputs("this was left out of the library of experts\\n", stderr);',
        "  std::abort();",
        "}",
    ]
    for name in names:
        lines.append(
            f'asm(".weak {name}\\n.type {name}, @function\\n.set {name}, fp4tune_left_out");'
        )
    return "\n".join(lines) + "\n"


def _complete(asked: Any) -> Path:
    """Build a specification, and give what it leaves out a stand-in: tables of virtual functions
    name those of other formats, and are filled when the library is loaded, not when it is used."""
    path, stubs = _built_place(PARTIAL), Path(asked.sources[-1])
    asked.build(False)
    if names := left_out(path):
        _write_source(stubs, stand_ins(names))
        asked.build(False)
    if names := left_out(path):
        raise RuntimeError(f"{path} would not load: it lacks {', '.join(names[:3])}")
    return path


def held(path: Path) -> frozenset[tuple[Three, Three]] | None:
    """Tile and cluster of the kernels in a library that was built ahead; None where it does not
    say, as of one that FlashInfer built."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    said = json.loads(beside.read_text())["kernels"]
    return frozenset((tuple(tile), tuple(cluster)) for tile, cluster in said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build ahead into the folder named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, help="of the units of kernels only the first ones")
    given = parser.parse_args(arguments)
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    place = given.folder / version() / f"{MODULE}.so"
    place.parent.mkdir(parents=True, exist_ok=True)
    asked = specification(given.units)
    subprocess.run(["strip", "-o", str(place), str(_complete(asked))], check=True)
    texts = (Path(p).read_text() for p in asked.sources if ".generated." in Path(p).name)
    made = sorted((k.tile, k.cluster) for text in texts for k in kernels(text))
    about = {"flashinfer": version(), "kernels": made}
    place.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{place}: {place.stat().st_size / 2**20:.1f} MiB, {len(made)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
