"""Which devices a program started here may use, without creating a CUDA context.

GPUs are those that CUDA would show, by `visible`, from what the driver says of the node, by
`driver`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import driver, visible
from .device import Device
from .hardware import cpu_name


@dataclass(frozen=True, slots=True)
class Target:
    """A device to probe, and how a worker is confined to it."""

    device: Device
    name: str
    uuid: str | None = None
    """A GPU's or a MIG instance's, as nvidia-smi prints it; None for the CPU."""

    @property
    def label(self) -> str:
        """Short and safe in file names: ``cpu`` or ``gpu-0``."""
        return "cpu" if self.device.kind == "cpu" else f"gpu-{self.device.index}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the worker see this device alone, as its device 0."""
        return {visible.DEVICES: self.uuid or ""}


class NoSuchDevice(ValueError):
    """The device asked for is not here; the message says what is."""


def gpus() -> tuple[list[Target], str | None]:
    """The visible NVIDIA GPUs, or none and the reason.

    CUDA_VISIBLE_DEVICES is respected: indices are those a CUDA program started here would see.
    Raises DriverSilent.
    """
    try:
        node = visible.node(driver.ask("gpus"))
    except driver.NvmlError as error:
        if error.kind == "absent":
            return [], "nvidia-ml-py is not installed"
        if error.kind == "unusable":
            return [], f"no NVIDIA driver answers ({error})"
        return [], f"NVML failed ({error})"
    found = visible.seen(node, os.environ).devices
    if not found:
        return [], _why_none(node)
    return [
        Target(Device("cuda", sm, index), name, uuid)
        for index, (uuid, name, sm) in enumerate(found)
    ], None


def _why_none(node: tuple[visible.NodeGpu, ...]) -> str:
    if not node:
        return "this machine has no GPU"
    if not visible.seen(node, {}).devices:
        return "MIG is on, and there is no instance; make one with nvidia-smi mig"
    return "CUDA_VISIBLE_DEVICES hides every GPU"


def order_is_certain() -> bool:
    """Whether an index names the same GPU here as in CUDA: False on a node with several models
    whose order CUDA alone knows. Raises DriverSilent; True where there is no driver to ask."""
    try:
        return visible.seen(visible.node(driver.ask("gpus")), os.environ).certain
    except driver.NvmlError:
        return True


def cpu() -> Target:
    """The CPU as a target."""
    return Target(Device("cpu"), cpu_name())


def select(gpu: str | None) -> list[Target]:
    """The targets that ``--gpu`` names: an index, ``all``, ``none`` (the CPU), or None for the
    first GPU, and the CPU where there is none.

    Raises NoSuchDevice, and DriverSilent but for ``none``: a GPU whose driver hangs is no reason to
    probe the CPU in its place.
    """
    if gpu == "none":
        return [cpu()]
    if gpu not in (None, "all") and not (gpu.isascii() and gpu.isdigit()):
        raise NoSuchDevice(
            f"--gpu {gpu!r} is not the index of a GPU, nor all; --gpu none is the CPU"
        )
    found, reason = gpus()
    if gpu is None:
        return found[:1] or [cpu()]
    if not found:
        raise NoSuchDevice(f"no GPU to probe: {reason}; use --gpu none to probe the CPU")
    if gpu == "all":
        return found
    if int(gpu) >= len(found):
        raise NoSuchDevice(f"no GPU {gpu}: this machine shows {len(found)}, numbered from 0")
    return [found[int(gpu)]]
