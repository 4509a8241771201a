"""After how many launches the witness speaks: the zoo's kernels that give wrong numbers, served.

A chain of layers with weights of their own serves requests of varying m on real-looking data (a
graph for each m on a GPU, eagerly where capture fails and on a CPU). On a GPU a kernel that lets
the next one begin early writes each layer's activation, as norms with PDL do. Each mutant serves it
twice: with every call watched, and with a few. What is truly wrong is told apart by a float64
reference of every launch; one that is right in the first hundred rounds of real-looking data is
left. First the racy kernel of 2026 under the stress of that time: rounds of 64 requests, each on a
stream of its own, m from 1 to 500, outputs and activations poisoned, behind a producer of that
kind; in every second round they queue up behind a kernel that keeps all streams waiting, since a
host in Python is slower than the GPU.

    python benchmarks/witness_detect.py --out DIR [--seconds 240] [--device cuda] [--only race]

Partial results are in DIR/witness_detect.json after every mutant.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import machine, write

from fp4tune.machine.device import Device
from fp4tune.probes import zoo
from fp4tune.probes.backends import build_kernels
from fp4tune.probes.check.reference import tolerance
from fp4tune.probes.check.sweep import POISON
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.launch.outcome import capturing
from fp4tune.probes.problem import NVFP4, Fp4Tensor, Problem
from fp4tune.witness.calls import Unreadable
from fp4tune.witness.confirm import FAULT
from fp4tune.witness.rows import WatchedCall
from fp4tune.witness.sources import HostCopy
from fp4tune.witness.watcher import WatchSubject, Witness, WitnessOptions

LAYERS = 4
MS = tuple(range(1, 65))
IDLE = 100
"""Rounds without a wrong launch, after which there is nothing to be seen."""
SELDOM = 10
"""Times more rounds for what is wrong once in thousands of launches."""
THREADS = 4
NOT_VALUES = (
    "zoo-input-modified", "zoo-host-leak", "zoo-device-leak", "zoo-plan-per-m", "zoo-host-sync",
    "zoo-error-at-one-m", "zoo-tactic-falls-back", "zoo-row-out-of-bounds", "zoo-scratch-overrun",
    "zoo-scratch-underrun",
)  # fmt: skip
"""Mutants whose fault is in no output."""


def real_looking(m: int, k: int, device: str, g: torch.Generator) -> torch.Tensor:
    """Activations with channels of very different size, and a few outliers."""
    x = torch.randn(m, k, generator=g) * torch.exp(torch.randn(k, generator=g) * 0.7)
    x = torch.where(torch.rand(m, k, generator=g) < 1e-3, x * 20, x)
    return x.to(device)


class Served:
    """A chain of one backend's layers. `serve` makes one launch a layer; `truth` says which of them
    gave something wrong."""

    def __init__(self, name: str, n: int, k: int, device: str) -> None:
        self.name, self.device, self.n, self.k = name, device, n, k
        self.backend = zoo.named(name)
        self.fp4 = self.backend.activation == "fp4"
        g = torch.Generator().manual_seed(1)
        self.weights = [
            quantise(torch.randn(n, k, generator=g) * 0.02, NVFP4).to(device) for _ in range(LAYERS)
        ]
        self.values = [dequantise(w, torch.float64, with_global=False) for w in self.weights]
        self.problem = Problem("nvfp4", max(MS), n, k, self.backend.activation)
        kind = Device("cuda", _sm()) if device == "cuda" else Device("cpu", None)
        why = self.backend.unsupported(self.problem, kind)
        if why:
            raise RuntimeError(why)
        build_kernels(self.backend, [self.problem.at(m) for m in MS], kind, 4)
        self.states = [self.backend.prepare(w, self.problem) for w in self.weights]
        self.calls: dict[int, list[tuple[Any, torch.Tensor]]] = {}
        self.sources: dict[int, list[torch.Tensor]] = {}
        """What a producer makes the activations of, on a GPU."""
        self.graphs: dict[int, Any] = {}
        self.eager = device != "cuda"
        if device == "cuda":
            from _producer_triton import produce

            self.produce = produce

    def watch(self, share: str) -> tuple[Witness, list[Any], list[Any]]:
        judged: list[Any] = []
        witness = Witness(WitnessOptions(share), lambda *found: judged.append(found))
        watched = []
        for index, w in enumerate(self.weights):
            copy = HostCopy((w.to("cpu"),))
            subject = WatchSubject(f"layers.{index}", self.name, self.problem)
            watched.append(witness.add(subject, [w], copy))
        return witness, watched, judged

    def buffers(self, m: int) -> list[tuple[Any, torch.Tensor]]:
        if m not in self.calls:
            made = []
            for _ in range(LAYERS):
                a: Any = torch.zeros(m, self.k, dtype=torch.bfloat16, device=self.device)
                if self.fp4:
                    a = quantise(torch.ones(m, self.k), NVFP4).to(self.device)
                out = torch.zeros(m, self.n, dtype=torch.bfloat16, device=self.device)
                made.append((a, out))
            self.calls[m] = made
            if self.device == "cuda" and not self.fp4:
                self.sources[m] = [torch.zeros_like(a) for a, _ in made]
        return self.calls[m]

    def fill(self, m: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for index, (a, _) in enumerate(self.buffers(m)):
            x = real_looking(m, self.k, self.device, g)
            if isinstance(a, Fp4Tensor):
                q = quantise(x, NVFP4)
                a.codes.copy_(q.codes)
                a.scales.copy_(q.scales)
                a.global_scale.copy_(q.global_scale)
            else:
                self.sources.get(m, [a] * LAYERS)[index].copy_(x.bfloat16())

    def once(self, m: int, see: Callable[[int, Any, torch.Tensor], None]) -> None:
        prepare = getattr(self.backend, "prepare_activation", None)
        for index, (a, out) in enumerate(self.buffers(m)):
            if m in self.sources:
                self.produce(self.sources[m][index], a)
            given = prepare(a) if prepare and self.fp4 else a
            self.backend.run(self.states[index], given, out, "default")
            see(index, a, out)

    def serve(self, m: int, see: Callable[[int, Any, torch.Tensor], None]) -> None:
        if self.eager:
            self.once(m, see)
            return
        if m not in self.graphs:
            try:
                self.once(m, lambda *_: None)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with capturing(graph, torch.cuda.Stream()):
                    self.once(m, see)
                self.graphs[m] = graph
            except Exception:
                torch.cuda.synchronize()
                self.eager = True
                self.once(m, see)
                return
        self.graphs[m].replay()

    def wrong(self, m: int) -> int:
        """Launches of the last round that gave something wrong."""
        count = 0
        for index, (a, out) in enumerate(self.buffers(m)):
            if isinstance(a, Fp4Tensor):
                left = dequantise(a, torch.float64, with_global=False)
                alpha = float(a.global_scale) * float(self.weights[index].global_scale)
            else:
                left, alpha = a.double(), float(self.weights[index].global_scale)
            values = self.values[index]
            centre, sizes = left @ values.T, left.abs() @ values.abs().T
            slack = tolerance(centre, sizes, alpha, self.k, torch.bfloat16, 2)
            count += int(not bool(((out.double() - centre * alpha).abs() <= slack).all()))
        return count


def _sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def tried(served: Served, share: str, rounds: int, until: float) -> dict[str, Any]:
    """Serve until the witness confirms a fault, at most `rounds`."""
    witness, watched, judged = served.watch(share)
    served.graphs.clear()
    launches = wrong = 0
    first_wrong = first_seen = first_confirmed = None
    rng = random.Random(3)

    def see(index: int, a: Any, out: torch.Tensor) -> None:
        call = WatchedCall(a, out)
        if isinstance(a, Fp4Tensor):
            one = torch.ones_like(a.global_scale)
            call = WatchedCall(Fp4Tensor(NVFP4, a.codes, a.scales, one), out, a.global_scale)
        witness.see(watched[index], call)

    for turn in range(rounds):
        if time.monotonic() > until:
            break
        m = rng.choice(MS)
        served.fill(m, turn)
        served.serve(m, see)
        launches += LAYERS
        bad = served.wrong(m)
        wrong += bad
        first_wrong = first_wrong or (launches if bad else None)
        witness.look()
        first_seen = first_seen or (launches if judged else None)
        if turn >= max(IDLE, rounds // 4) and not wrong:
            break
        if any(found.status == FAULT for *_, found in judged):
            first_confirmed = launches
            break
    return {
        "launches": launches,
        "wrong launches": wrong,
        "first wrong": first_wrong,
        "first suspicion": first_seen,
        "first confirmed": first_confirmed,
        "captured": not served.eager,
    }


GATE = 40_000_000
"""Clock cycles, about 20 ms: as long as 64 requests are enqueued."""


def race(rounds: int, until: float) -> dict[str, Any]:
    """The 2026 stress on the racy kernel, every call watched."""
    from _producer_triton import produce

    n = k = 4096
    backend = zoo.named("zoo-wait-missing")
    w = quantise(torch.randn(n, k) * 0.02, NVFP4).to("cuda")
    state = backend.prepare(w, Problem("nvfp4", 512, n, k))
    judged: list[Any] = []
    witness = Witness(WitnessOptions("every"), lambda *found: judged.append(found))
    subject = WatchSubject("layer", "zoo-wait-missing", Problem("nvfp4", 1, n, k))
    watched = witness.add(subject, [w], HostCopy((w.to("cpu"),)))
    streams = [torch.cuda.Stream() for _ in range(64)]
    source = torch.randn(512, k, device="cuda").bfloat16()
    a = [torch.empty(512, k, dtype=torch.bfloat16, device="cuda") for _ in streams]
    out = [torch.empty(512, n, dtype=torch.bfloat16, device="cuda") for _ in streams]
    rng = random.Random(5)
    wrong = 0
    first_wrong = first_seen = None
    done = 0
    for turn in range(rounds):
        if time.monotonic() > until:
            break
        ms = [rng.randint(1, 500) for _ in streams]
        for buffer in (*a, *out):
            buffer.view(torch.int16).fill_(POISON)
        torch.cuda.synchronize()
        if turn % 2:
            torch.cuda._sleep(GATE)
        opened = torch.cuda.current_stream().record_event()
        for stream, left, right, m in zip(streams, a, out, ms, strict=True):
            stream.wait_event(opened)
            with torch.cuda.stream(stream):
                produce(source[:m], left[:m])
                backend.run(state, left[:m], right[:m], "default")
                witness.see(watched, WatchedCall(left[:m], right[:m]))
        torch.cuda.synchronize()
        done += len(streams)
        bad = sum(bool(right[:m].isnan().any()) for right, m in zip(out, ms, strict=True))
        wrong += bad
        first_wrong = first_wrong or (done if bad else None)
        witness.look()
        first_seen = first_seen or (done if judged else None)
        if first_wrong and first_seen and turn > 5:
            break
    return {
        "requests": done,
        "wrong": wrong,
        "first wrong, within": first_wrong,
        "first suspicion, within": first_seen,
        "statuses": sorted({found.status for *_, found in judged}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", help="race, or a mutant; repeatable")
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    start = time.monotonic()
    until = start + options.seconds
    report: dict[str, Any] = {"machine": machine(), "device": options.device, "mutants": {}}

    def save() -> None:
        report["seconds"] = round(time.monotonic() - start, 1)
        write(options.out / "witness_detect.json", json.dumps(report, indent=1) + "\n")

    if options.device == "cuda" and "race" in (options.only or ["race"]):
        try:
            report["race"] = race(options.rounds or 1000, start + options.seconds / 4)
        except Exception as error:
            report["race"] = f"{type(error).__name__}: {error}"[:300]
        print("race", json.dumps(report["race"]))
        save()
    n, k = (2112, 1088) if options.device == "cuda" else (448, 320)
    rounds = options.rounds or (400 if options.device == "cuda" else 40)
    for mutant in zoo.mutants(options.device):
        asked = mutant.name in (options.only or [mutant.name])
        if mutant.passes or mutant.ends or mutant.name in NOT_VALUES or not asked:
            continue
        if time.monotonic() > until:
            break
        found: dict[str, Any] = {"mechanism": mutant.mechanism}
        often = 1 if mutant.level == "quick" else SELDOM
        for share in ("every", "few"):
            if share == "few" and not found["every"].get("wrong launches", 1):
                found[share] = "nothing was wrong"
                continue
            try:
                served = Served(mutant.name, n, k, options.device)
                found[share] = tried(served, share, rounds * often, until)
            except (Exception, Unreadable) as error:
                found[share] = {"error": f"{type(error).__name__}: {error}"[:200]}
        report["mutants"][mutant.name] = found
        save()
        print(mutant.name, json.dumps({s: found[s] for s in ("every", "few")}))
    save()


if __name__ == "__main__":
    main()
