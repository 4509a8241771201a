"""Show one wrong result of an FP4 GEMM. Needs torch and the library under test, nothing else.

    python reproduce.py                    # as it was found
    python reproduce.py --mode serial      # or graph, streams, side-stream
    python reproduce.py --times 200

`data.pt` holds operands and the values allowed, `call.py` prepares and calls the library. Every
element of every launch is compared. Exit code: 1 a result was wrong, 0 none was, 2 could not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import threading
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
POISON = -91  # the bits 0xFFA5: a NaN that no arithmetic produces
GUARD = 0x5A5A
TILE = 128
LANES = 4
MODES = ("serial", "graph", "streams", "side-stream")


class RecordedLaunch:
    """One call: its operands on the device, the place for its output, and what must be there."""

    def __init__(self, call, states, record, device):
        self.call = call
        self.state = states[record["weight"]]
        self.tactic = record["tactic"]
        self.target = record["target"]
        self.source = moved(record["a"], device)
        self.a = self.source
        prepare = getattr(call, "prepare_activation", None)
        self.ready = prepare(self.a) if prepare else self.a
        self.lo = record["lo"].to(device)
        self.hi = self.lo if record["hi"] is None else record["hi"].to(device)
        self.ref = None if record["ref"] is None else record["ref"].to(device)
        m, n = self.lo.shape
        self.guard = -(-min(TILE * n, 1 << 19) // 512) * 512
        self.buffer = torch.full((2 * self.guard + m * n,), GUARD, dtype=torch.int16, device=device)
        inside = self.buffer[self.guard : self.guard + m * n]
        self.out = inside.view(self.lo.dtype).view(m, n)
        self.poison()

    def poison(self):
        self.out.view(torch.int16).fill_(POISON)

    def run(self):
        self.call.run(self.state, self.ready, self.out, self.tactic)

    def wrong(self, limit):
        """A bool (m, n) of wrong elements, and how many of the guard zones changed."""
        size = self.out.numel()
        outside = (self.buffer[: self.guard] != GUARD).sum()
        outside = outside + (self.buffer[self.guard + size :] != GUARD).sum()
        if limit is None:
            return ~((self.out >= self.lo) & (self.out <= self.hi)), int(outside)
        return far_tiles(self.out, self.ref, limit), int(outside)


def far_tiles(out, ref, limit):
    """Elements of the 128x128 tiles whose relative Frobenius error is above `limit`."""
    bad = torch.zeros_like(out, dtype=torch.bool)
    for row in range(0, out.shape[0], TILE):
        for col in range(0, out.shape[1], TILE):
            part = (slice(row, row + TILE), slice(col, col + TILE))
            right = ref[part].double()
            error = (out[part].double() - right).norm() / right.norm().clamp(min=1e-300)
            bad[part] = not float(error) <= limit
    return bad


def moved(value, device):
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def lanes(launches, device):
    """Each lane makes all the launches, beginning elsewhere: on streams, or in threads on a CPU."""
    found = []
    for lane in range(LANES):
        shift = lane * len(launches) // LANES
        found.append([twin(launch, device) for launch in launches[shift:] + launches[:shift]])
    return found


def twin(launch, device):
    """The same launch into an output of its own."""
    other = object.__new__(RecordedLaunch)
    other.__dict__.update(launch.__dict__)
    other.buffer = torch.full_like(launch.buffer, GUARD)
    size = launch.out.numel()
    inside = other.buffer[launch.guard : launch.guard + size]
    other.out = inside.view(launch.out.dtype).view(launch.out.shape)
    other.poison()
    return other


def fork_join(groups, side):
    main = torch.cuda.current_stream()
    fork = main.record_event()
    for lane, stream in zip(groups, side, strict=True):
        stream.wait_event(fork)
        with torch.cuda.stream(stream):
            for launch in lane:
                launch.run()
        main.wait_event(stream.record_event())


def in_threads(groups):
    barrier = threading.Barrier(len(groups))
    errors = []

    def work(lane):
        barrier.wait()
        try:
            for launch in lane:
                launch.run()
        except BaseException as error:
            errors.append(error)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # small calls would else run to their end one by one
    try:
        threads = [threading.Thread(target=work, args=(lane,)) for lane in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    if errors:
        raise errors[0]


def rounds(mode, launches, device):
    """(the launches that are checked, a function that makes them all once)."""
    if "streams" in mode:
        groups = lanes(launches, device)
        every = [launch for lane in groups for launch in lane]
        if device.type != "cuda":
            return every, lambda: in_threads(groups)
        side = [torch.cuda.Stream() for _ in groups]
        if mode == "streams":
            return every, lambda: (torch.cuda._sleep(20_000_000), fork_join(groups, side))
        return every, captured(lambda: fork_join(groups, side), every)
    if mode == "graph":
        return launches, captured(lambda: [launch.run() for launch in launches], launches)
    if mode == "side-stream":
        return launches, late_input(launches)
    return launches, lambda: [launch.run() for launch in launches]


def captured(chain, every):
    """`chain` as a CUDA graph, after one warm-up call of each launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in every:
            launch.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        chain()
    return graph.replay


def late_input(launches):
    """On a side stream, with activations that hold NaN until a delayed copy there."""
    side = torch.cuda.Stream()
    for launch in launches:
        if not isinstance(launch.ready, torch.Tensor):
            raise SystemExit("side-stream: only for activations that are one tensor")
        launch.ready = torch.empty_like(launch.source)

    def once():
        for launch in launches:
            launch.ready.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for launch in launches:
                torch.cuda._sleep(2_000_000)
                launch.ready.copy_(launch.source)
                launch.run()

    return once


def main():
    data = torch.load(HERE / "data.pt", map_location="cpu", weights_only=True)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=(*MODES, "graph-streams"), default=data["mode"])
    parser.add_argument("--times", type=int, default=50, help="how often to make all launches")
    options = parser.parse_args()
    device = torch.device(data["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        print("this needs a CUDA device")
        return 2
    if device.type != "cuda" and options.mode not in ("serial", "streams"):
        print(f"{options.mode} needs a CUDA device")
        return 2
    call = called()
    problem = {**data["problem"], "dtype": getattr(torch, data["problem"]["dtype"])}
    try:
        states = [call.prepare(moved(weight, device), problem) for weight in data["weights"]]
        launches = [RecordedLaunch(call, states, record, device) for record in data["launches"]]
    except Exception as error:
        traceback.print_exc()
        print(f"could not run: {type(error).__name__}: {error}")
        return 2
    inputs = [t.clone() for launch in launches for t in tensors(launch.source)]
    sync(device)
    every, once = rounds(options.mode, launches, device)
    bad, first = 0, None
    for turn in range(options.times):
        for launch in every:
            launch.poison()
        sync(device)
        try:
            once()
            sync(device)
        except Exception as error:
            traceback.print_exc()
            where = f"{options.mode}, round {turn + 1}"
            print(f"{where}: a launch raised {type(error).__name__}: {error}")
            return 1
        for place, launch in enumerate(every):
            wrong, outside = launch.wrong(data["tile_limit"])
            if bool(wrong.any()) or outside:
                bad += 1
                if first is None:
                    first = turn, place, describe(launch, wrong, outside)
                launch.buffer[: launch.guard].fill_(GUARD)
                launch.buffer[launch.guard + launch.out.numel() :].fill_(GUARD)
    made = options.times * len(every)
    now = [t for launch in launches for t in tensors(launch.source)]
    changed = sum(not torch.equal(a, b) for a, b in zip(inputs, now, strict=True))
    print(f"{options.mode}: {bad} of {made} launches were wrong")
    if first:
        print(f"first in round {first[0] + 1}, launch {first[1] + 1} of the chain:\n{first[2]}")
    if changed:
        print(f"{changed} input tensors were changed by the launches")
    return 1 if bad or changed else 0


def called():
    """The module in call.py, under a name that no module of the library's has."""
    spec = importlib.util.spec_from_file_location("call_of_this_bundle", HERE / "call.py")
    assert spec is not None and spec.loader is not None  # true of every .py path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tensors(value):
    return [v for v in value.values() if v.numel()] if isinstance(value, dict) else [value]


def describe(launch, wrong, outside):
    m, n = wrong.shape
    lines = [f"m={m} n={n}, tactic {launch.tactic}: {int(wrong.sum())} elements wrong"]
    if outside:
        lines.append(f"{outside} elements outside the output were overwritten")
    if bool(wrong.any()):
        row, col = (int(x) for x in wrong.nonzero()[0])
        low, high = float(launch.lo[row, col]), float(launch.hi[row, col])
        unwritten = launch.out.view(torch.int16)[row, col] == POISON
        found = "never written" if bool(unwritten) else repr(float(launch.out[row, col]))
        lines.append(f"[{row}, {col}] is {found}, expected {low} to {high}")
        for top in range(0, min(m, 16 * TILE), TILE):
            part = wrong[top : top + TILE]
            marks = [bool(part[:, c : c + TILE].any()) for c in range(0, min(n, 96 * TILE), TILE)]
            lines.append("  " + "".join("#" if mark else "." for mark in marks))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except Exception as error:
        traceback.print_exc()
        print(f"could not run: {type(error).__name__}: {error}")
        raise SystemExit(2) from None
