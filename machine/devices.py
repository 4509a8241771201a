"""Which GPUs this process may use, by NVML, without creating a CUDA context."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..probes.problem import Device


@dataclass(frozen=True, slots=True)
class Target:
    """A device to probe, and how a worker is confined to it."""

    device: Device
    name: str
    uuid: str | None = None

    @property
    def label(self) -> str:
        """Short and safe in file names: ``cpu`` or ``gpu-0``."""
        return "cpu" if self.device.kind == "cpu" else f"gpu-{self.device.index}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the worker see this device alone, as its device 0."""
        return {"CUDA_VISIBLE_DEVICES": self.uuid or ""}


class NoSuchDevice(ValueError):
    """The device asked for is not here; the message says what is."""


def gpus() -> tuple[list[Target], str | None]:
    """The visible NVIDIA GPUs, or none and the reason.

    CUDA_VISIBLE_DEVICES is respected: indices are those a CUDA program started here would see.
    """
    try:
        import pynvml
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers ({error})"
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
            found.append((name, uuid, 10 * major + minor))
    except pynvml.NVMLError as error:
        return [], f"NVML failed ({error})"
    finally:
        pynvml.nvmlShutdown()
    visible = _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not visible:
        return [], "CUDA_VISIBLE_DEVICES hides every GPU" if found else "this machine has no GPU"
    return [
        Target(Device("cuda", sm, index), name, uuid)
        for index, (name, uuid, sm) in enumerate(visible)
    ], None


def cpu() -> Target:
    """The CPU as a target."""
    return Target(Device("cpu"), _cpu_name())


def select(gpu: str | None) -> list[Target]:
    """The targets that ``--gpu`` names: an index, ``all``, ``none`` (the CPU), or None for the
    first GPU, and the CPU where there is none.

    Raises NoSuchDevice.
    """
    if gpu == "none":
        return [cpu()]
    found, reason = gpus()
    if gpu is None:
        return found[:1] or [cpu()]
    if not found:
        raise NoSuchDevice(f"no GPU to probe: {reason}; use --gpu none to probe the CPU")
    if gpu == "all":
        return found
    if not _is_index(gpu):
        raise NoSuchDevice(f"--gpu {gpu!r} is not a GPU index, 'all' or 'none'")
    if int(gpu) >= len(found):
        raise NoSuchDevice(f"no GPU {gpu}: this machine shows {len(found)}, numbered from 0")
    return [found[int(gpu)]]


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


Listed = tuple[str, str, int]


def _visible(found: list[Listed], variable: str | None) -> list[Listed]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: stop at the first entry that names nothing."""
    if variable is None:
        return found
    chosen: list[Listed] = []
    for entry in (part.strip() for part in variable.split(",")):
        if _is_index(entry) and int(entry) < len(found):
            chosen.append(found[int(entry)])
            continue
        match = [gpu for gpu in found if entry and gpu[1].startswith(entry)]
        if len(match) != 1:
            break
        chosen.append(match[0])
    return chosen


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "CPU"
