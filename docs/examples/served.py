"""A small MLP that serves, watched; one of its layers breaks, is caught and quarantined.

python docs/examples/served.py
"""

import os
import tempfile

import torch

import fp4tune
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.problem import NVFP4
from fp4tune.witness import process
from fp4tune.witness.linear import Known


class Fp4Linear(torch.nn.Module):
    """A linear layer with an NVFP4 weight, as a checkpoint has it. `broken` leaves a tile out."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        weight = quantise(torch.randn(n, k) * k**-0.5, NVFP4)
        self.weight = torch.nn.Parameter(weight.codes, requires_grad=False)
        self.weight_scale = torch.nn.Parameter(weight.scales, requires_grad=False)
        self.weight_scale_2 = torch.nn.Parameter(weight.global_scale, requires_grad=False)
        self.values = dequantise(weight)
        self.broken = False

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        out = (a.float() @ self.values.T).to(a.dtype)
        if self.broken:
            out[:, 128:256] = 0
        return out


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Fp4Linear(768, 256)
        self.down = Fp4Linear(256, 768)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(a)))


def main() -> None:
    os.environ.update(
        FP4TUNE_STATE=tempfile.mkdtemp(),
        FP4TUNE_WATCH="every",  # every call; "few" is the default
        FP4TUNE_WATCH_COPIES="1",  # weights to judge a suspicion by, kept on the host
    )
    torch.manual_seed(0)
    mlp = Mlp()
    for name, layer in mlp.named_children():
        fp4tune.watch(layer, f"mlp.{name}", Known(backend="my-kernel"))

    def serve(requests: int) -> None:
        for m in range(1, requests + 1):
            mlp(torch.randn(m, 256).bfloat16())
        process.mine().witness.look()  # a thread does so once a second

    serve(40)
    counts = process.mine().witness.layers()
    print(f"{sum(c.counts['rows'] for c in counts)} rows judged")
    print(f"{sum(c.counts['suspicions'] for c in counts)} suspicious")
    mlp.down.broken = True
    serve(3)
    responder = process.mine().responder
    fault = responder.faults[0]
    print(f"{fault['layer']}: {fault['status']}, tile {fault['tile']}, regime {fault['regime']}")
    (reported,) = responder.reported
    print(f"quarantined: {reported.quarantine.where()}")


if __name__ == "__main__":
    main()
