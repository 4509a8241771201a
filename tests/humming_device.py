"""An H200's facts for humming's heuristics, where there is no GPU to ask."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fp4tune.probes.problem import Device

FACTS = SimpleNamespace(
    index=0,
    name="NVIDIA H200",
    is_ppu=False,
    sm_version=90,
    sm_major=9,
    sm_minor=0,
    sm_count=132,
    max_registers_per_sm=65536,
    max_smem_size=227 * 1024,
    memory_bandwidth_gbps=4917.0,
    tensorcore_tops={"bfloat16": 1070.0, "float16": 1070.0},
)


def or_h200(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The GPU that is there; else humming is told an H200's facts.

    Without libcuda humming cannot ask a device, and a CPU build of torch cannot select one.
    """
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Device("cuda", 10 * major + minor)
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: FACTS.name)
    from humming.utils import device

    if hasattr(device, "_extension"):
        told = SimpleNamespace(_DeviceInfo=lambda index: FACTS)
        monkeypatch.setattr(device, "_extension", told)
    return Device("cuda", 90)
