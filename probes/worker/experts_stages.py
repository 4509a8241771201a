"""One stage of routed experts by itself, where a backend can be cut, against the reference."""

from __future__ import annotations

from typing import Any

import torch

from ..grouped.backend import AsDense
from ..grouped.exact import Stages
from ..grouped.tensors import ExpertWeights, Routed
from ..launch.case import Case, blame


def routed_tokens(case: Case, tokens: int) -> Routed:
    """The first tokens of a case."""
    found: Any = case.rows(0, tokens)
    routed: Routed = found
    return routed


def weights_of(case: Case) -> ExpertWeights:
    """The experts of a case."""
    found: Any = case.operands.weight
    weights: ExpertWeights = found
    return weights


def cut_at(backend: AsDense, name: str, case: Case, right: Stages, tactic: str) -> tuple[int, str]:
    """How many elements of the stage `name` are wrong on the first tokens of a case, and what that
    is like. `right` are all stages of these tokens."""
    own: Any = backend.own
    tokens = right.h13.shape[0]
    routed = routed_tokens(case, tokens)
    here = right.here.unsqueeze(2)
    state = case.state
    with blame(backend):
        if name == "permute":
            rows, experts = own.permute(state, routed.ids, tactic)
            return _permutation(rows, experts, routed.ids, right.here)
        if name == "gemm1":
            found, wanted = own.gemm1(state, routed.x, routed.ids, tactic), right.h13
        elif name == "activate":
            found, wanted = own.activate(state, right.h13.clone(), tactic), right.h
        elif name == "gemm2":
            found, wanted = own.gemm2(state, right.h.clone(), routed.ids, tactic), right.y
        else:
            found = own.finalize(state, right.y.clone(), routed.ids, routed.weights, tactic)
            wanted, here = case.expectation.lo[:tokens], torch.ones_like(here[:, 0])
    if found.shape != wanted.shape:
        return wanted.numel(), f"its shape is {tuple(found.shape)}"
    wrong = ~(found == wanted) & here
    count = int(wrong.sum())
    return count, f"{count} of {wrong.numel()} elements are wrong"


def _permutation(
    rows: torch.Tensor, experts: torch.Tensor, ids: torch.Tensor, here: torch.Tensor
) -> tuple[int, str]:
    """What is wrong with a sorted order: each slot that is here once, as its own expert's."""
    slots, wanted = ids.numel(), here.flatten()
    named = rows.long()
    real = (named >= 0) & (named < slots)
    times = torch.bincount(named[real], minlength=slots)
    missing = int(((times != 1) & wanted).sum())
    mine = ids.flatten()[named[real]]
    others = int((experts[real] != mine).sum())
    return missing + others, f"{missing} slots are not there once, {others} are another expert's"
