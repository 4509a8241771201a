"""A grouped problem: the routed experts of one layer, bf16 or fp16 in and out.

For each token t with experts e_j and router weights w_j::

    h_j = act(x_t @ W13[e_j].T + b13[e_j])          gemm1: gate and up, then the activation
    out_t = scaling * sum_j w_j * (h_j @ W2[e_j].T + b2[e_j])      gemm2, finalize

W13 is (2 * intermediate, hidden), gate rows first; (intermediate, hidden) where nothing gates. An
expert below 0 or not below `groups` is elsewhere and adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from ...words import ExpertsKey, experts_key
from ..problem import FORMATS, Problem


@dataclass(frozen=True, slots=True)
class Gate:
    """What is between the two GEMMs.

    gated: ``min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + offset)``;
    otherwise ``relu(g) ** 2``. `biased`: both GEMMs add a bias per expert.
    """

    name: str
    gated: bool = True
    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None
    biased: bool = False


GATES = {
    gate.name: gate
    for gate in (
        Gate("swiglu"),
        Gate("swiglu-oai", alpha=1.702, offset=1.0, limit=7.0, biased=True),
        Gate("swiglu-oai-unbiased", alpha=1.702, offset=1.0, limit=7.0),
        Gate("swiglu-10", limit=10.0),
        Gate("relu2", gated=False),
    )
}
"""``swiglu-oai`` is gpt-oss's, ``swiglu-oai-unbiased`` MiniMax-M3's, ``swiglu-10`` DeepSeek V4's,
``relu2`` Nemotron 3's."""


@dataclass(frozen=True, slots=True)
class ExpertsProblem(Problem):
    """The routed experts of one layer on one rank: among dense problems it is one more.

    m           tokens
    n, k        intermediate and hidden size on this rank
    groups      experts on this rank
    scaling     what the sum over a token's experts is multiplied with (routed scaling)

    Raises ValueError, one sentence, for a problem that no backend could compute.
    """

    activation: str = field(init=False, default="")
    """What stands where a dense layer has its activation: ``bf16``, top-k, the gate, and the routed
    scaling where it is not 1."""
    groups: int = 2
    top_k: int = 1
    gate: str = "swiglu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.out_dtype != "bf16":
            raise ValueError(f"routed experts are probed in bf16, and not in {self.out_dtype}")
        if self.gate not in GATES:
            raise ValueError(f"activation {self.gate!r} is not one of {', '.join(GATES)}")
        if self.groups < 2 or not 1 <= self.top_k <= self.groups:
            raise ValueError(
                f"{self.groups} experts, top-k {self.top_k}: there must be two experts at least, "
                "and no token can have more than there are"
            )
        block = FORMATS[self.format].block
        for name, size in (("intermediate", self.n), ("hidden", self.k)):
            if size < 1 or size % block:
                raise ValueError(
                    f"the {name} size {size} is not a multiple of {self.format}'s block of {block}"
                )
        if self.m < 0:
            raise ValueError(f"{self.m} tokens: a batch has none or more")
        if not 0 < self.scaling < 1024:
            raise ValueError(f"a routed scaling of {self.scaling:g} is not in (0, 1024)")
        key = ExpertsKey(self.top_k, self.gate, self.scaling)
        object.__setattr__(self, "activation", str(key))

    @property
    def act(self) -> Gate:
        return GATES[self.gate]

    @property
    def rows13(self) -> int:
        """Rows of W13."""
        return 2 * self.n if self.act.gated else self.n

    @property
    def parameters(self) -> int:
        """FP4 elements of all experts."""
        return self.groups * (self.rows13 + self.n) * self.k

    def at(self, m: int) -> ExpertsProblem:
        """The same problem with another number of tokens."""
        return replace(self, m=m)


_FIELDS = tuple(f.name for f in fields(ExpertsProblem) if f.init)


def is_grouped(fields: dict[str, Any]) -> bool:
    """Whether these are the fields of an `ExpertsProblem`, or of a row about one."""
    return "top_k" in fields or experts_key(fields.get("activation")) is not None


def of_fields(fields: dict[str, Any]) -> ExpertsProblem:
    """The problem of its own fields, or of a row's, where `activation` holds what a dense row has
    no place for. Raises ValueError."""
    known = {name: fields[name] for name in _FIELDS if name in fields}
    if "top_k" in fields:
        return ExpertsProblem(**known)
    found = experts_key(fields.get("activation"))
    if found is None:
        raise ValueError(f"{fields.get('activation')!r} is no routed-experts layer")
    return ExpertsProblem(**known, top_k=found.top_k, gate=found.gate, scaling=found.scaling)


_DIGITS = 9
"""Of a number in a layer that is typed in."""


def parse_experts(text: str) -> tuple[int, int, int, int, str, float]:
    """(experts, top-k, intermediate, hidden, gate, scaling) of ``128,8,768,2048``, of
    ``32,4,2880,2880,swiglu-oai`` or of ``256,8,256,7168,swiglu,2.5``.

    Raises ValueError, one sentence.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if not all(p.isascii() and p.isdecimal() and len(p) <= _DIGITS for p in parts[:4]):
            raise ValueError
        groups, top_k, n, k = (int(part) for part in parts[:4])
        gate = parts[4] if len(parts) > 4 else "swiglu"
        scaling = float(parts[5]) if len(parts) > 5 else 1.0
        if len(parts) > 6 or min(groups, top_k, n, k) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text[:80]!r} is no layer of routed experts: E,TOP_K,INTERMEDIATE,HIDDEN is expected,"
            " four positive integers, and then perhaps one of "
            f"{', '.join(GATES)} and a routed scaling"
        ) from None
    if gate not in GATES:
        known = ", ".join(GATES)
        raise ValueError(f"{text[:80]!r}: the activation {gate[:40]!r} is not one of {known}")
    return groups, top_k, n, k, gate, scaling


def experts_row(text: str) -> dict[str, Any]:
    """The same as the columns that a row about it has: ``groups``, ``n``, ``k``, ``activation``.
    Raises ValueError."""
    groups, top_k, n, k, gate, scaling = parse_experts(text)
    key = ExpertsKey(top_k, gate, scaling)
    return {"groups": groups, "n": n, "k": k, "activation": str(key)}
