"""Routing laws: which experts each token goes to. Pure, the same on every device.

A law gives int32 (tokens, top_k). The *regular* ones name different experts that are there; the
*odd* ones are what routers and all-to-all kernels leave behind: experts twice in a row, experts
that are elsewhere, rows that are padding, and rows of a router that gave NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..data.generator import below, hash_elements, hash_rows, stream_key

ZIPF = 1.2
Place = torch.device | str
BEHIND = 4096
"""More experts than any layer has: in `TokenRows` it stands for the number behind the last."""
BLOCKS = (8, 16, 32, 48, 64, 128, 192)
"""Tokens of one expert that kernels work on at once."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where tokens go.

    ids      int32 (tokens, top_k); one that is not in [0, groups) is elsewhere and adds nothing
    spoilt   bool (tokens,): rows of which nothing is asked but that they spoil no other's: their
             activations and router weights are NaN
    """

    ids: torch.Tensor
    spoilt: torch.Tensor


@dataclass(frozen=True, slots=True)
class Law:
    """A routing law. `draw` takes (tokens, experts, top_k, seed, device), and `experts` are those
    that tokens may go to, in ascending order."""

    name: str
    draw: Callable[[int, Sequence[int], int, int, Place], Routing]
    about: str


def _shuffled_experts(count: int, seed: int, device: Place) -> torch.Tensor:
    """A permutation of 0 .. count-1, int64."""
    return torch.argsort(hash_rows(count, stream_key(seed, "order"), device), stable=True)


def _named(places: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """Indices into `experts` as experts, int32."""
    return torch.tensor(list(experts), dtype=torch.int32, device=places.device)[places.long()]


def _right(ids: torch.Tensor) -> Routing:
    return Routing(
        ids.to(torch.int32), torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    )


def _balanced(tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place) -> Routing:
    count = len(experts)
    slots = torch.arange(tokens * top_k, device=device).view(tokens, top_k) % count
    return _right(_named(_shuffled_experts(count, seed, device)[slots], experts))


def _zipf(tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place) -> Routing:
    count = len(experts)
    bits = hash_elements(tokens, count, stream_key(seed, "zipf"), device).to(torch.int64)
    uniform = ((bits & 0xFFFFFF).double() + 0.5) / 2**24
    # Exponential races: the first top_k to arrive are a sample without replacement.
    rate = (torch.arange(count, dtype=torch.float64, device=device) + 1).pow(-ZIPF)
    first = (-uniform.log() / rate).argsort(dim=1, stable=True)[:, :top_k]
    return _right(_named(_shuffled_experts(count, seed, device)[first], experts))


def _one_takes_all(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """Each token's first expert is the same; the others are balanced."""
    order, count = _shuffled_experts(len(experts), seed, device), len(experts)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64, device=device)
    if top_k > 1:
        rest = torch.arange(tokens * (top_k - 1), device=device).view(tokens, top_k - 1) % (
            count - 1
        )
        ids[:, 1:] = 1 + rest
    return _right(_named(order[ids], experts))


def _the_same(tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place) -> Routing:
    """Every token to the same top_k experts: all others are idle, and these get a token each."""
    chosen = _shuffled_experts(len(experts), seed, device)[:top_k]
    return _right(_named(chosen.expand(tokens, top_k), experts))


def around_blocks() -> list[int]:
    """One less than each block size, as many, and one more."""
    return [size + more for size in BLOCKS for more in (-1, 0, 1)]


def run_lengths(seed: int) -> list[int]:
    """The lengths of runs, in the order in which the law ``runs`` of this seed has them."""
    lengths = around_blocks()
    return lengths[seed % len(lengths) :] + lengths[: seed % len(lengths)]


def _runs_around_blocks(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """Groups of experts in turn, for block - 1, block and block + 1 tokens of every block size."""
    turn = run_lengths(seed)
    run = torch.arange(len(turn), device=device).repeat_interleave(
        torch.tensor(turn, device=device)
    )
    run = run.repeat(math.ceil(tokens / len(run)) if tokens else 0)[:tokens]
    order, count = _shuffled_experts(len(experts), seed, device), len(experts)
    return _right(
        _named(order[(run[:, None] * top_k + torch.arange(top_k, device=device)) % count], experts)
    )


def _duplicates(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """Each row names one expert twice or more, as a router of NaNs does."""
    found = _balanced(tokens, experts, top_k, seed, device).ids
    if top_k > 1:
        found[:, -1] = found[:, 0]
        found[::3] = found[::3, :1]
    return _right(found)


def _on_other_ranks(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """-1 where an expert is on another rank; every fifth row has none here."""
    found = _balanced(tokens, experts, top_k, seed, device).ids
    bits = hash_elements(tokens, top_k, stream_key(seed, "elsewhere"), device)
    found[(bits & 1) == 1] = -1
    found[::5] = -1
    return _right(found)


def _foreign_numbers(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """Numbers beyond the experts here, and below -1, where an expert is on another rank."""
    found = _balanced(tokens, experts, top_k, seed, device).ids
    top = max(experts) + 1
    bits = hash_elements(tokens, top_k, stream_key(seed, "foreign"), device)
    beyond = torch.where((bits & 8) == 0, BEHIND, BEHIND + below(bits, 4, 12, top))
    number = torch.where((bits & 6) == 0, -2 - below(bits, 4, 12, top), beyond)
    elsewhere = (bits & 1) == 1
    elsewhere[::5] = True
    found[elsewhere] = number[elsewhere]
    return _right(found)


def _padding_rows(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """The last rows of every eight are padding, with experts that there are not."""
    found = _balanced(tokens, experts, top_k, seed, device).ids
    spoilt = torch.arange(tokens, device=device) % 8 >= 5
    top = max(experts) + 1
    bits = hash_elements(tokens, top_k, stream_key(seed, "garbage"), device).to(torch.int64)
    garbage = (bits & 0xFFFF) % (3 * top + 7) - top
    found[spoilt] = garbage[spoilt].to(torch.int32)
    return Routing(found, spoilt)


def _nan_router(
    tokens: int, experts: Sequence[int], top_k: int, seed: int, device: Place
) -> Routing:
    """Every third row is what a router of NaNs gives: the first expert, again and again."""
    found = _balanced(tokens, experts, top_k, seed, device).ids
    spoilt = torch.arange(tokens, device=device) % 3 == 1
    found[spoilt] = experts[0]
    return Routing(found, spoilt)


REGULAR = {
    law.name: law
    for law in (
        Law("balanced", _balanced, "as many tokens for each expert as can be"),
        Law("zipf", _zipf, f"experts are drawn by Zipf's law, exponent {ZIPF}"),
        Law("one-takes-all", _one_takes_all, "one expert has every token"),
        Law("idle", _the_same, "all but top-k experts are idle"),
        Law("runs", _runs_around_blocks, "experts with one token less and more than a block"),
    )
}
ODD = {
    law.name: law
    for law in (
        Law("duplicates", _duplicates, "an expert twice in a row"),
        Law("elsewhere", _on_other_ranks, "-1 for experts on other ranks"),
        Law("foreign-ids", _foreign_numbers, "other numbers for experts on other ranks"),
        Law("padding-ids", _padding_rows, "padding rows with experts that there are not"),
        Law("nan-router", _nan_router, "rows of a router that gave NaN"),
    )
}
LAWS = {**REGULAR, **ODD}


def route(
    law: str,
    tokens: int,
    experts: Sequence[int],
    top_k: int,
    seed: int,
    device: Place = "cpu",
) -> Routing:
    """Tokens routed by a law; a row does not depend on how many there are. Raises ValueError for a
    law that is not known, for fewer experts than top-k, and for none."""
    if law not in LAWS:
        raise ValueError(f"routing law {law!r} is not one of {', '.join(LAWS)}")
    if len(experts) < max(1, top_k):
        raise ValueError(f"top-k {top_k} of {len(experts)} experts")
    return LAWS[law].draw(tokens, experts, top_k, seed, device)


def counts(ids: torch.Tensor, groups: int) -> torch.Tensor:
    """int64 (groups,): slots of each expert; those that are elsewhere are left out."""
    here = ids[(ids >= 0) & (ids < groups)].long().flatten()
    return torch.bincount(here, minlength=groups)
