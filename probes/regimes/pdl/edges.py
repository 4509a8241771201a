"""What a CUDA graph under capture holds: its kernels, and which of its edges are programmatic.

A *programmatic* edge leads to a kernel that was launched with programmatic stream serialization
(PDL): it may start while the kernel before it still runs. Read through the CUDA driver, while the
capture is going on, so that it works whatever torch keeps of its graphs. Driver 12.3 and newer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Node = int
_KERNEL = 0
_PROGRAMMATIC = 1


class EdgesHidden(Exception):
    """The driver does not tell; the message says why."""


class _EdgeData(ctypes.Structure):
    _fields_ = (
        ("from_port", ctypes.c_uint8),
        ("to_port", ctypes.c_uint8),
        ("type", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 5),
    )


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Edge:
    """From one node of the graph to another; `programmatic` if the second may start early."""

    source: Node
    target: Node
    programmatic: bool


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EdgesHidden(f"no CUDA driver ({error})") from None
    for name in ("cuStreamGetCaptureInfo_v3", "cuGraphGetEdges_v2"):
        if not hasattr(driver, name):
            raise EdgesHidden(f"this CUDA driver has no {name}")
    return driver


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise EdgesHidden(f"{name} failed with CUDA error {code}")


def _state(stream: int) -> tuple[ctypes.c_void_p, tuple[Node, ...], int]:
    status, number = ctypes.c_int(), ctypes.c_uint64()
    graph, count = ctypes.c_void_p(), ctypes.c_size_t()
    nodes = ctypes.POINTER(ctypes.c_void_p)()
    data = ctypes.POINTER(_EdgeData)()
    _call(
        "cuStreamGetCaptureInfo_v3",
        ctypes.c_void_p(stream),
        ctypes.byref(status),
        ctypes.byref(number),
        ctypes.byref(graph),
        ctypes.byref(nodes),
        ctypes.byref(data),
        ctypes.byref(count),
    )
    if status.value != 1:
        raise EdgesHidden("the stream is not being captured")
    return graph, tuple(nodes[i] or 0 for i in range(count.value)), number.value


def capture_number(stream: int) -> int:
    """The driver's number of the capture that `stream` (a CUDA handle) is part of: another for each
    graph. Raises EdgesHidden."""
    return _state(stream)[2]


def tail(stream: int) -> tuple[Node, ...]:
    """The nodes that whatever is captured next on `stream` (a CUDA handle) will depend on."""
    return _state(stream)[1]


def captured_edges(stream: int) -> tuple[Edge, ...]:
    """Every edge of the graph that `stream` is captured into, as it is now."""
    graph, _, _ = _state(stream)
    size = 1024
    while True:
        # Asking for the number alone fails where any edge is programmatic.
        count = ctypes.c_size_t(size)
        sources, targets = (ctypes.c_void_p * size)(), (ctypes.c_void_p * size)()
        data = (_EdgeData * size)()
        _call("cuGraphGetEdges_v2", graph, sources, targets, data, ctypes.byref(count))
        if count.value < size:
            break
        size *= 4
    return tuple(
        Edge(sources[i] or 0, targets[i] or 0, data[i].type == _PROGRAMMATIC)
        for i in range(count.value)
    )


def name(node: Node) -> str:
    """The kernel of a node as the driver calls it, or what else the node is."""
    kind = ctypes.c_int()
    try:
        _call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        if kind.value != _KERNEL:
            return {1: "memcpy", 2: "memset", 3: "host", 10: "alloc", 11: "free"}.get(
                kind.value, "other"
            )
        params, text = _KernelParams(), ctypes.c_char_p()
        _call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
        if params.func:
            _call("cuFuncGetName", ctypes.byref(text), ctypes.c_void_p(params.func))
        else:
            _call("cuKernelGetName", ctypes.byref(text), ctypes.c_void_p(params.kernel))
        return (text.value or b"").decode(errors="replace")
    except (EdgesHidden, AttributeError):
        return "a kernel"


def after(found: Sequence[Edge], nodes: Sequence[Node]) -> list[Edge]:
    """The edges that leave `nodes`."""
    sources = set(nodes)
    return [edge for edge in found if edge.source in sources]
