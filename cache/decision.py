"""What a reader answers. Standard library only."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

FALLBACK = "torch-dequant"
EXPERTS_FALLBACK = "torch-experts"
"""What to use where nothing is proven: dequantise per call and multiply."""
TACTIC = "default"


class Decision:
    """Which backend to call, and how sure that is. Immutable.

    status            ``safe``: proven here (under `conditions`); ``unproven``: no evidence;
                      ``stale``: there was, and a file it rests on has changed since;
                      ``quarantined``: it failed in production, and nothing else is proven
    backend, tactic   what to call; the fallback unless the status is ``safe``
    recorded_backend, what the file names for this bucket, whatever became of it; None without one
    recorded_tactic
    median_us         measured time per call, None if unknown
    m_lo, m_hi        the bucket, both included
    bounds            regime -> launches, problems, failures and upper bound of the failure rate
    reason            one sentence where this is not what the file names, else empty

    Not a dataclass: importing `dataclasses` takes longer than all the rest of the reader.
    """

    __slots__ = (
        "backend",
        "tactic",
        "layout",
        "status",
        "conditions",
        "median_us",
        "launches",
        "problems",
        "m_lo",
        "m_hi",
        "fingerprint",
        "recorded_backend",
        "recorded_tactic",
        "default_backend",
        "bounds",
        "generation",
        "reason",
    )
    backend: str
    tactic: str
    layout: str | None
    status: str
    conditions: tuple[Any, ...]
    median_us: float | None
    launches: int
    problems: int
    m_lo: int | None
    m_hi: int | None
    fingerprint: str | None
    recorded_backend: str | None
    recorded_tactic: str | None
    default_backend: str | None
    bounds: dict[str, Any]
    generation: int
    reason: str

    def __init__(self, **values: Any) -> None:
        for name in self.__slots__:
            object.__setattr__(self, name, values.pop(name, None))
        if values:
            raise TypeError(f"a decision has no {', '.join(values)}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a decision cannot be changed: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a decision cannot be changed: {name}")

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def changed(self, **values: Any) -> Decision:
        """The same with other values."""
        return Decision(**{**self._values(), **values})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.backend, self.tactic, self.status, self.generation, self.m_lo, self.m_hi))

    def __repr__(self) -> str:
        return f"Decision({', '.join(f'{k}={v!r}' for k, v in self._values().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._values(),)


def _rebuild(values: dict[str, Any]) -> Decision:
    return Decision(**values)


def fallback(groups: object) -> str:
    """The floor of a layer: of routed experts, where it has several groups."""
    return EXPERTS_FALLBACK if type(groups) is int and groups > 1 else FALLBACK


def unproven(generation: int, reason: str) -> Decision:
    """The answer where there is nothing to go by."""
    return Decision(
        backend=FALLBACK,
        tactic=TACTIC,
        status="unproven",
        conditions=(),
        launches=0,
        problems=0,
        bounds={},
        generation=generation,
        reason=reason,
    )
