"""cuDNN's graph API, without an engine between: block-scale dequantise, multiply, scale.

``cudnn-graph`` (W4A4) takes 128x4 scales on both sides, ``cudnn-graph-w4a16`` a 16-bit activation
and linear weight scales. Written from cuDNN's documentation, not run on hardware yet.

cuDNN decides what it supports when it builds a graph's plans, and says so only on such a GPU:
`unsupported` knows compute capabilities and versions. One graph serves every m where cuDNN can
override shapes (9.23.1), else each m has its own. A tactic is a plan, by cuDNN's own name for it.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layouts import padded
from ..problem import FORMATS, Device, Fp4Tensor, Problem
from . import DEFAULT_TACTIC
from ._block_scaled import Swizzled
from .torch.dequant import not_dense

SMS = (100, 103, 107, 110, 120, 121)
LOWEST = {"fp4": 91300, "bf16": 92301}
"""The first cuDNN whose FP4 engines all take a global scale, and the first that dequantises one
side only."""
LOWEST_MXFP4_SM12 = 91400
OVERRIDE = 92301
"""The first cuDNN that runs one graph on other shapes."""
LARGEST_M = 8192
"""The m a graph that serves all is planned for."""

A, B, A_SCALE, B_SCALE, ALPHA, OUT = range(1, 7)
"""Names (uids) of the graph's tensors."""

_DISTRIBUTIONS = ("nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def cudnn_library() -> Any:
    """nvidia-cudnn-frontend. Raises ImportError, or RuntimeError without a cuDNN library."""
    cudnn = importlib.import_module("cudnn")
    cudnn.backend_version()
    return cudnn


@functools.cache
def _cudnn_version() -> int | str:
    """cuDNN's version (9.23.1 is 92301), or why there is none."""
    try:
        return int(cudnn_library().backend_version())
    except Exception as error:  # ImportError, RuntimeError, what a broken library raises
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def dotted(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


@dataclass(frozen=True, slots=True)
class Key:
    """What a graph is built for. `m` is `LARGEST_M` where shapes can be overridden."""

    m: int
    n: int
    k: int
    format: str
    activation: str
    out_dtype: torch.dtype
    has_alpha: bool


def geometry(key: Key, m: int) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """(dimensions, strides in elements) of every tensor but alpha, by uid, for `m` rows.

    Operands are (1, m, k) row-major and (1, k, n) column-major. 128x4 scales are given by their
    padded size, linear ones by their own.
    """
    n, k = key.n, key.k
    blocks = k // FORMATS[key.format].block
    found: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
        A: ((1, m, k), (m * k, k, 1)),
        B: ((1, k, n), (k * n, 1, k)),
        OUT: ((1, m, n), (m * n, n, 1)),
    }
    if key.activation == "fp4":
        rows, cols = padded(m, blocks, "128x4")
        found[A_SCALE] = ((1, rows, cols), (rows * cols, cols, 1))
        rows, cols = padded(n, blocks, "128x4")
        found[B_SCALE] = ((1, cols, rows), (rows * cols, 1, cols))
    else:
        found[B_SCALE] = ((1, blocks, n), (blocks * n, 1, blocks))
    return found


def build_graph(cudnn: Any, graph: Any, key: Key) -> None:
    """Write the computation into a `cudnn.pygraph`; plans are not made yet."""
    kinds = cudnn.data_type
    dtypes = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}
    fmt = FORMATS[key.format]
    scale = kinds.FP8_E4M3 if fmt.scale == "e4m3" else kinds.FP8_E8M0
    shapes = geometry(key, key.m)
    w4a4 = key.activation == "fp4"

    def tensor(name: str, uid: int, dtype: Any, **more: Any) -> Any:
        dim, stride = shapes[uid]
        made = graph.tensor(name=name, dim=dim, stride=stride, data_type=dtype, **more)
        made.set_uid(uid)
        return made

    def dequantised(name: str, value: Any, uid: int, block: list[int], dtype: Any) -> Any:
        reordering = cudnn.tensor_reordering
        order = reordering.F8_128x4 if w4a4 else reordering.NONE
        scales = tensor(f"{name}_scale", uid, scale, reordering_type=order)
        made = graph.block_scale_dequantize(
            value, scales, block_size=block, name=f"dequantise_{name}"
        )
        made.set_data_type(dtype)
        return made

    left = tensor("a", A, kinds.FP4_E2M1 if w4a4 else dtypes[key.out_dtype])
    inner = kinds.FLOAT if w4a4 else dtypes[key.out_dtype]
    if w4a4:
        left = dequantised("a", left, A_SCALE, [1, fmt.block], inner)
    right = dequantised("b", tensor("b", B, kinds.FP4_E2M1), B_SCALE, [fmt.block, 1], inner)
    result = graph.matmul(left, right, compute_data_type=kinds.FLOAT, name="multiply")
    result.set_data_type(kinds.FLOAT)
    if key.has_alpha:
        alpha = graph.tensor(name="alpha", dim=(1, 1, 1), stride=(1, 1, 1), data_type=kinds.FLOAT)
        alpha.set_uid(ALPHA)
        result = graph.mul(name="scale", a=result, b=alpha, compute_data_type=kinds.FLOAT)
    result.set_name("out").set_output(True).set_data_type(dtypes[key.out_dtype])
    result.set_uid(OUT)


def make_plan(cudnn: Any, graph: Any) -> None:
    """Let cuDNN choose engines for a described graph. Raises what it raises if it has none."""
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()


class _Handles(threading.local):
    """cuDNN handles of this thread, by device: setting a handle's stream is not thread-safe."""

    def __init__(self) -> None:
        self.by_device: dict[int | None, Any] = {}


class CudnnGraph:
    """One of the two; `run` of the W4A4 one takes what `prepare_activation` returns."""

    distributions = _DISTRIBUTIONS
    reference_line = False

    def __init__(self, name: str, activation: str, layout: str) -> None:
        self.name, self.activation, self.layout = name, activation, layout
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()
        self._handles = _Handles()

    def unsupported(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cuda" or device.sm is None:
            return f"{self.name} needs a CUDA GPU"
        if reason := not_dense(self, problem):
            return reason
        if device.sm not in SMS:
            listed = ", ".join(map(str, SMS))
            return f"cuDNN multiplies FP4 on SM {listed}, not on SM {device.sm}"
        found = _cudnn_version()
        if isinstance(found, str):
            return f"{self.name} needs nvidia-cudnn-frontend and a cuDNN library ({found})"
        needed = LOWEST[self.activation]
        if problem.format == "mxfp4" and device.sm // 10 == 12:
            needed = max(needed, LOWEST_MXFP4_SM12)
        if found < needed:
            return f"{self.name} needs cuDNN {dotted(needed)}, and has {dotted(found)}"
        return None

    def tactics(self, problem: Problem, device: Device) -> Sequence[str]:
        """cuDNN's first choice, then every plan it proposes by name."""
        if problem.m == 0:
            return (DEFAULT_TACTIC,)
        key = self._key(problem.m, problem.n, problem.k, problem.format, problem.dtype)
        graph = self._graph(key, device.torch)
        count = graph.get_execution_plan_count()
        names = [graph.get_plan_name_at_index(i) for i in range(count)]
        return (DEFAULT_TACTIC, *dict.fromkeys(names))

    def build(self, problems: Sequence[Problem], device: Device, workers: int) -> None:
        """Plan and compile the default of every problem."""
        for p in problems:
            if p.m and self.unsupported(p, device) is None:
                graph = self._graph(self._key(p.m, p.n, p.k, p.format, p.dtype), device.torch)
                self._built(graph, DEFAULT_TACTIC)

    def prepare(self, weight: Fp4Tensor, problem: Problem) -> Swizzled | Fp4Tensor:
        """128x4 scales for W4A4, the plain layout for W4A16."""
        return Swizzled.of(weight) if self.activation == "fp4" else weight

    def prepare_activation(self, a: Fp4Tensor) -> Swizzled:
        return Swizzled.of(a)

    def run(self, state: Any, a: Any, out: torch.Tensor, tactic: str) -> None:
        m, n = out.shape
        if m == 0:
            return
        k = 2 * state.codes.shape[1]
        key = self._key(m, n, k, state.format.name, out.dtype)
        graph = self._graph(key, out.device)
        pack = {B: _fp4_view(state.codes), B_SCALE: state.scales, OUT: out}
        alpha: torch.Tensor | None
        if self.activation == "fp4":
            alpha = a.alpha(state)
            pack |= {A: _fp4_view(a.codes), A_SCALE: a.scales}
        else:
            alpha = state.global_scale if state.format.has_global else None
            pack |= {A: a}
        if alpha is not None:
            pack[ALPHA] = alpha
        index = self._built(graph, tactic)
        handle = self._handle(out.device)
        override: dict[str, Any] = {}
        if key.m == m:
            size = graph.get_workspace_size_plan_at_index(index)
        else:
            shapes = geometry(key, m)
            override = {
                "override_uids": list(shapes),
                "override_shapes": [list(dim) for dim, _ in shapes.values()],
                "override_strides": [list(stride) for _, stride in shapes.values()],
            }
            size = graph.get_workspace_size_plan_at_index(index, handle, *override.values())
        # Of this call's own, since calls on several streams share the graph.
        workspace = torch.empty(max(1, int(size)), dtype=torch.uint8, device=out.device)
        graph.execute_plan_at_index(pack, workspace, index, handle=handle, **override)

    def _key(self, m: int, n: int, k: int, fmt: str, dtype: torch.dtype) -> Key:
        version = _cudnn_version()
        one_for_all = isinstance(version, int) and version >= OVERRIDE
        has_alpha = FORMATS[fmt].has_global
        return Key(LARGEST_M if one_for_all else m, n, k, fmt, self.activation, dtype, has_alpha)

    def _graph(self, key: Key, device: torch.device) -> Any:
        """The planned graph of `key`, made once."""
        where = (key, device)
        with self._lock:
            graph = self._graphs.get(where)
            if graph is None:
                cudnn = cudnn_library()
                shared = {"is_override_shape_enabled": True} if key.m == LARGEST_M else {}
                graph = cudnn.pygraph(
                    io_data_type=cudnn.data_type.FLOAT,
                    intermediate_data_type=cudnn.data_type.FLOAT,
                    compute_data_type=cudnn.data_type.FLOAT,
                    handle=self._handle(device),
                    **shared,
                )
                build_graph(cudnn, graph, key)
                make_plan(cudnn, graph)
                self._graphs[where] = graph
        return graph

    def _built(self, graph: Any, tactic: str) -> int:
        """The index of a tactic's plan, compiled. The default is the first that compiles.

        Raises ValueError for a name cuDNN did not propose, RuntimeError where none compiles.
        """
        with self._lock:
            known = self._graphs.setdefault(("built", id(graph)), {})
            if tactic not in known:
                known[tactic] = _compiled_plan(graph, tactic)
            return int(known[tactic])

    def _handle(self, device: torch.device) -> Any:
        """This thread's handle, on the current stream."""
        cudnn = cudnn_library()
        handles = self._handles.by_device
        if device.index not in handles:
            handles[device.index] = cudnn.create_handle()
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
            cudnn.set_stream(handle=handles[device.index], stream=stream)
        return handles[device.index]


def _compiled_plan(graph: Any, tactic: str) -> int:
    last: Exception | None = None
    for index in range(graph.get_execution_plan_count()):
        if tactic not in (DEFAULT_TACTIC, graph.get_plan_name_at_index(index)):
            continue
        try:
            graph.build_plan_at_index(index)
            return index
        except Exception as error:  # cudnnGraphNotSupportedError, RuntimeError
            last = error
    if last is None:
        raise ValueError(f"cuDNN has no plan {tactic!r} for this problem")
    raise RuntimeError(f"cuDNN compiled no plan for {tactic}: {last}") from last


def _fp4_view(codes: torch.Tensor) -> torch.Tensor:
    """Packed codes under the dtype that tells cuDNN there are two in a byte."""
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    return codes if dtype is None else codes.view(dtype)


def backends() -> list[CudnnGraph]:
    return [
        CudnnGraph("cudnn-graph", "fp4", "swizzled"),
        CudnnGraph("cudnn-graph-w4a16", "bf16", "plain"),
    ]
