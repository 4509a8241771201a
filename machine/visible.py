"""The one parser of CUDA_VISIBLE_DEVICES: which GPUs of a node a CUDA program sees, in its order.

By the CUDA programming guide's section on environment variables: entries are indices or UUIDs, of
which the beginning is enough where it names one GPU alone, and the list ends before the first entry
that names nothing. By what drivers do beyond it: an index may be followed by other letters
(``1x``), and a list that names a device twice shows none. And by NVIDIA's MIG guide: a program sees
one MIG instance and nothing beside it.

What cannot be known without CUDA: indices count GPUs from the fastest, by a measure that is not
published, unless CUDA_DEVICE_ORDER is PCI_BUS_ID. Among GPUs of one model both orders are that of
the bus; where models differ `VisibleDevices.certain` is False. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEVICES = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
BY_BUS = "PCI_BUS_ID"

_NUMBER = re.compile(r"\+?([0-9]{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Instance:
    """A MIG instance of a GPU; `uuid` begins with ``MIG-``."""

    uuid: str
    name: str


@dataclass(frozen=True, slots=True)
class NodeGpu:
    """A GPU as NVML shows it. `sm` is its compute capability (90, 120), `bus` its PCI address where
    that is known, `instances` what MIG cuts it into: None where MIG is off."""

    uuid: str
    name: str
    sm: int
    bus: str | None = None
    instances: tuple[Instance, ...] | None = None


@dataclass(frozen=True, slots=True)
class VisibleDevices:
    """The devices a CUDA program sees, as (UUID, name, SM), in CUDA's order.

    `certain` is False where only CUDA can tell which GPU an index means.
    """

    devices: tuple[tuple[str, str, int], ...]
    certain: bool = True


def node(listed: Sequence[Mapping[str, object]]) -> tuple[NodeGpu, ...]:
    """The GPUs of this node from what `nvml.gpus` answers."""
    found = []
    for gpu in listed:
        mig = gpu["mig"]
        instances = None
        if isinstance(mig, list):
            instances = tuple(Instance(str(one["uuid"]), str(one["name"])) for one in mig)
        bus = gpu["bus"]
        found.append(
            NodeGpu(
                str(gpu["uuid"]),
                str(gpu["name"]),
                int(str(gpu["sm"])),
                None if bus is None else str(bus),
                instances,
            )
        )
    return tuple(found)


def seen(gpus: Sequence[NodeGpu], environ: Mapping[str, str]) -> VisibleDevices:
    """What a CUDA program with these variables sees of these GPUs."""
    numbered = _by_bus(gpus)
    of_one_kind = len({(gpu.name, gpu.sm) for gpu in gpus}) <= 1
    ordered = environ.get(ORDER, "").strip() == BY_BUS or of_one_kind
    variable = environ.get(DEVICES)
    found: list[_Part]
    if variable is None:
        found, by_index = [*numbered], True
    else:
        found, by_index = _entries_named(numbered, variable)
    devices = [device for part in found for device in _cuda_devices(part)]
    instances = [device for device in devices if device[0].startswith("MIG-")]
    return VisibleDevices(tuple(instances[:1] or devices), ordered or not by_index)


def named(gpus: Sequence[NodeGpu], uuid: str) -> str | None:
    """The whole UUID of the GPU or MIG instance that `uuid`, or its beginning, names; None where it
    names none or several."""
    part = _by_uuid(gpus, uuid)
    if part is None:
        return None
    return part[1].uuid if isinstance(part, tuple) else part.uuid


_Part = NodeGpu | tuple[NodeGpu, Instance]


def _by_bus(gpus: Sequence[NodeGpu]) -> list[NodeGpu]:
    """In the order of the PCI bus, where every address is known; else as NVML has them."""
    if any(gpu.bus is None for gpu in gpus):
        return list(gpus)
    return sorted(
        gpus, key=lambda gpu: [int(part, 16) for part in re.findall(r"[0-9a-fA-F]+", gpu.bus or "")]
    )


def _entries_named(gpus: Sequence[NodeGpu], variable: str) -> tuple[list[_Part], bool]:
    """What the entries name, up to the first that names nothing, and whether any is an index."""
    found: list[_Part] = []
    by_index = False
    for entry in (part.strip() for part in variable.split(",")):
        part = _by_uuid(gpus, entry)
        number = _NUMBER.match(entry)
        is_index = number is not None and (part is None or number.end() == len(entry))
        if number is not None and is_index:
            index = int(number[1])
            part = gpus[index] if index < len(gpus) else None
        if part is None:
            break
        by_index = by_index or is_index
        if part in found:
            return [], by_index
        found.append(part)
    return found, by_index


def _by_uuid(gpus: Sequence[NodeGpu], entry: str) -> _Part | None:
    """The one GPU or instance whose UUID begins so, with or without the ``GPU-`` before it."""
    found: list[_Part] = []
    if entry.startswith("MIG-"):
        parts = ((gpu, one) for gpu in gpus for one in gpu.instances or ())
        found += [part for part in parts if part[1].uuid.startswith(entry)]
    elif entry:
        wanted = "GPU-" + entry.removeprefix("GPU-")
        found += [gpu for gpu in gpus if gpu.uuid.startswith(wanted)]
    return found[0] if len(found) == 1 else None


def _cuda_devices(part: _Part) -> list[tuple[str, str, int]]:
    """What CUDA can run on of a GPU: itself, or its instances where MIG is on."""
    if isinstance(part, tuple):
        gpu, one = part
        return [(one.uuid, one.name, gpu.sm)]
    if part.instances is None:
        return [(part.uuid, part.name, part.sm)]
    return [(one.uuid, one.name, part.sm) for one in part.instances]
