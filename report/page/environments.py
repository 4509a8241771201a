"""What evidence holds for: the devices, then each backend's versions and code digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...cache.rows import Environment

_MOST = 200
_FIRST = ("name", "gpu", "kind", "sm", "sm_count", "driver", "cuda", "cudnn")
_NAMES = ("name", "gpu", "cpu", "kind")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    name: str
    facts: tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class EnvironmentRow:
    """A backend's environment. `versions` and `variables` are lines."""

    backend: str
    arch: str
    fingerprint: str
    versions: tuple[str, ...]
    variables: tuple[str, ...]
    code: str


@dataclass(frozen=True, slots=True)
class Environments:
    devices: tuple[DeviceFacts, ...]
    rows: tuple[EnvironmentRow, ...]
    more: int


def environments(found: Sequence[Environment]) -> Environments | None:
    """None where there are none."""
    devices: dict[str, Mapping[str, object]] = {}
    rows = []
    for e in found[:_MOST]:
        facts = e.facts if isinstance(e.facts, Mapping) else {}
        device = facts.get("device")
        if isinstance(device, Mapping):
            devices.setdefault(repr(sorted(map(str, device.items()))), device)
        rows.append(
            EnvironmentRow(
                e.backend,
                e.arch,
                e.fingerprint,
                _fact_lines(facts.get("distributions")),
                _fact_lines(facts.get("variables")),
                str(facts.get("code") or facts.get("code_how") or ""),
            )
        )
    if not rows:
        return None
    more = len(found) - len(rows)
    return Environments(tuple(map(_device_facts, devices.values())), tuple(rows), more)


def _device_facts(device: Mapping[str, object]) -> DeviceFacts:
    order = [*(n for n in _FIRST if n in device), *sorted(set(device) - set(_FIRST), key=str)]
    name = next((device[n] for n in _NAMES if device.get(n)), "device")
    return DeviceFacts(str(name), tuple((n, device[n]) for n in order))


def _fact_lines(found: object) -> tuple[str, ...]:
    if isinstance(found, Mapping):
        return tuple(f"{name} {value}" for name, value in found.items())
    return (str(found),) if found else ()
