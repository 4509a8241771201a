"""What simpler tests say of the zoo's mutants: one line of JSON a mutant, on stdout.

* `calm`: one launch at m=128, synchronised, each 128x128 tile compared with a float64 reference;
* `cosine`: the same output has a cosine similarity of at most 0.97 with the reference, or a NaN;
* `allclose`: the same output is not within ``rtol=0.1, atol=0.1``;
* `stress`: 50 rounds of 64 requests, each with a stream and a random m from 1 to 500, all outputs
  NaN before: a NaN is left (`nan`), or a whole output is off by more than 5 % (`off`).

An exception counts as caught. Used by mutant_matrix.py, which notices crashes and hangs.

    python benchmarks/mutant_compare.py zoo-rows-swapped zoo-wait-missing
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import torch

from fp4tune.probes.backends import tactics
from fp4tune.probes.check.reference import tile_error, tile_limit
from fp4tune.probes.data import draw
from fp4tune.probes.launch.case import Case, case, prepared_activation
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.registry import load_one

MARK = "@@"
"""What the lines that count begin with; a backend may print, too."""
N, K = 1088, 1040
CALM_M = 128
MOST_M = 500
ROUNDS, REQUESTS = 50, 64
OFF = 0.05


def say(**fields: Any) -> None:
    print(MARK + json.dumps(fields), flush=True)


def reference(chosen: Case, offset: int, m: int) -> torch.Tensor:
    found = chosen.expectation.window(offset, offset + m)
    return found.lo.float() if found.ref is None else found.ref


def calm(backend: Any, chosen: Case, tactic: str) -> dict[str, Any]:
    """One launch and three ways to look at it."""
    problem = chosen.problem
    a = prepared_activation(backend, chosen.rows(0, CALM_M))
    out = torch.empty(CALM_M, problem.n, dtype=problem.dtype, device=chosen.expectation.lo.device)
    backend.run(chosen.state, a, out, tactic)
    torch.cuda.synchronize()
    right = reference(chosen, 0, CALM_M)
    worst = float(tile_error(out, right).max())
    got, want = out.double().flatten(), right.double().flatten()
    cosine = float(torch.nn.functional.cosine_similarity(got, want, dim=0))
    return {
        "calm": not worst <= tile_limit(problem.k),
        "cosine": not cosine > 0.97,
        "allclose": not torch.allclose(out.float(), right, rtol=0.1, atol=0.1),
        "cosine_value": cosine if cosine == cosine else None,
    }


def stress(backend: Any, chosen: Case, tactic: str, seed: int) -> dict[str, Any]:
    """The engines' test: requests that were left NaN, and requests that were wrong."""
    rng = random.Random(seed)
    device = chosen.expectation.lo.device
    n = chosen.problem.n
    streams = [torch.cuda.Stream(device) for _ in range(REQUESTS)]
    outs = torch.empty(REQUESTS, MOST_M, n, dtype=chosen.problem.dtype, device=device)
    bad = torch.zeros(2, dtype=torch.int64, device=device)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        outs.fill_(float("nan"))
        requests = []
        for _ in range(REQUESTS):
            m = rng.randint(1, MOST_M)
            requests.append((rng.randint(0, chosen.problem.m - m), m))
        inputs = [prepared_activation(backend, chosen.rows(offset, m)) for offset, m in requests]
        torch.cuda.synchronize()
        for index, ((_, m), a) in enumerate(zip(requests, inputs, strict=True)):
            with torch.cuda.stream(streams[index]):
                backend.run(chosen.state, a, outs[index, :m], tactic)
        torch.cuda.synchronize()
        for index, (offset, m) in enumerate(requests):
            out, right = outs[index, :m].float(), reference(chosen, offset, m)
            left = out.isnan().any()
            off = ~((out - right).norm() <= OFF * right.norm())
            bad += torch.stack((left, off)).long()
    nan, off = bad.tolist()
    return {
        "stress": bool(nan or off),
        "stress_nan": nan,
        "stress_off": off,
        "stress_requests": ROUNDS * REQUESTS,
        "stress_seconds": round(time.perf_counter() - start, 2),
    }


def compare(name: str, device: Device, seed: int) -> None:
    """All four for one mutant; what was learnt is said as it comes."""
    backend = load_one(name)
    problem = Problem("nvfp4", MOST_M, N, K, backend.activation)
    say(name=name, stage="calm")
    try:
        chosen = case(backend, problem, draw(problem, "realistic", seed, device.torch))
        tactic = tactics(backend, problem, device)[0]
        say(name=name, **calm(backend, chosen, tactic))
        say(name=name, stage="stress")
        say(name=name, **stress(backend, chosen, tactic, seed))
    except Exception as error:
        torch.cuda.synchronize()  # a lost context ends this process, and says so by that
        say(name=name, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    say(name=name, done=True)


def main() -> int:
    major, minor = torch.cuda.get_device_capability()
    for name in sys.argv[1:]:
        compare(name, Device("cuda", 10 * major + minor), seed=5)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
