"""A whole backend of routed experts in plain torch, which runs anywhere."""

from __future__ import annotations

import torch

from fp4tune.probes.formats import dequantise
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.tensors import ExpertWeights
from fp4tune.probes.problem import Device


class PlainExperts:
    """Every token by itself: its experts, one after another."""

    experts = True
    name = "example-experts"
    layout = "plain"

    def unsupported(self, problem: ExpertsProblem, device: Device) -> str | None:
        if device.kind != "cpu":
            return "it asks where tokens go, and a GPU would have to be waited for"
        return None

    def prepare(
        self, weights: ExpertWeights, problem: ExpertsProblem
    ) -> tuple[ExpertWeights, ExpertsProblem]:
        return weights, problem

    def run(
        self,
        state: tuple[ExpertWeights, ExpertsProblem],
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
        tactic: str,
    ) -> None:
        given, problem = state
        total = torch.zeros(x.shape, dtype=torch.float32)
        for expert in range(problem.groups):  # -1 and other ids that there are not add nothing
            token, place = (ids == expert).nonzero(as_tuple=True)
            if not token.numel():
                continue
            h = x[token].float() @ dequantise(given.w13.expert(expert)).T
            if given.b13 is not None:
                h = h + given.b13[expert]
            y = self.between(problem, h).to(x.dtype).float()
            y = y @ dequantise(given.w2.expert(expert)).T
            if given.b2 is not None:
                y = y + given.b2[expert]
            total.index_add_(0, token, y * weights[token, place].unsqueeze(1))
        out.copy_(total * problem.scaling)

    @staticmethod
    def between(problem: ExpertsProblem, h: torch.Tensor) -> torch.Tensor:
        act, n = problem.act, problem.n
        if not act.gated:
            return h.clamp(min=0).square()
        gate, up = h[:, :n], h[:, n:]  # gate rows come first
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        return gate * torch.sigmoid(act.alpha * gate) * (up + act.offset)
