"""Mutants whose mechanism a CPU does not have: dependent launches, streams, graphs, kernels."""

from __future__ import annotations

from functools import partial

from . import dying, hosts
from .mutant import ANY_LAUNCH, GPU, RACES, Mutant
from .pdl import PdlGemm

_RACE = "race under overlap"
BY_THE_CLOCK = 10_000
"""The rare mutant drops a tile once in so many launches."""


def _race(name: str, mechanism: str, when: str, *caught_by: str, **switches: object) -> Mutant:
    activation = str(switches.get("activation", "bf16"))
    make = partial(PdlGemm, when=when, **switches)  # type: ignore[arg-type]
    return Mutant(
        name, _RACE, mechanism, make, caught_by or RACES, devices=GPU, activation=activation
    )


ON_GPU = (
    _race("zoo-wait-missing", "launched with PDL, and never waits", "never"),
    _race(
        "zoo-wait-missing-zeroed",
        "never waits, and a kernel before it has zeroed the output",
        "never",
        zeroing=True,
    ),
    _race(
        "zoo-wait-missing-own-output",
        "never waits, and computes into a buffer of zeros that it copies",
        "never",
        "pdl-raw",
        "mlp-chain",
        own_output=True,
    ),
    _race("zoo-wait-missing-w4a4", "never waits, in W4A4", "never", activation="fp4"),
    _race(
        "zoo-wait-after-scales",
        "loads block scales of the activation before it waits",
        "scales",
        "pdl-raw",
        "mlp-chain",
        activation="fp4",
    ),
    _race("zoo-wait-in-some-blocks", "every second block never waits", "some"),
    _race("zoo-stored-before-wait", "waits after it has stored the output", "last"),
    _race(
        "zoo-zeros-before-wait",
        "stores zeros into the output before it waits",
        "zeroed",
        "pdl-war",
        "pdl-waw",
        "mlp-chain",
    ),
    Mutant(
        "zoo-tile-dropped-by-clock",
        "rare missing output",
        f"a tile stays unwritten in one of {BY_THE_CLOCK} launches, chosen by the clock",
        partial(PdlGemm, when="never", drop="clock", rarely=BY_THE_CLOCK, pdl=False),
        ANY_LAUNCH,
        devices=GPU,
        level="standard",
    ),
    Mutant(
        "zoo-wrong-stream",
        "wrong stream",
        "launches on the default stream, whatever the current one is",
        hosts.WrongStream,
        ("side-stream", "graph", "streams", "graph-streams", "threads"),
        devices=GPU,
    ),
    Mutant(
        "zoo-workspace-resized",
        "workspace resized after capture",
        "a buffer of the layer is replaced when a larger m comes",
        hosts.Resizes,
        ("regrow", "streams", "graph-streams", "threads"),
        devices=GPU,
    ),
    Mutant(
        "zoo-device-leak",
        "memory leak",
        "a workspace of every call stays on the device",
        hosts.LeaksOnTheDevice,
        ("off-bucket",),
        devices=GPU,
        many=True,
    ),
    Mutant(
        "zoo-scratch-overrun",
        "memory of others overwritten",
        "16 bytes behind a workspace of its own are written, inside the allocator's pool",
        partial(hosts.FillsItsScratch, behind=16),
        ("scratch",),
        devices=GPU,
    ),
    Mutant(
        "zoo-scratch-underrun",
        "memory of others overwritten",
        "16 bytes before a workspace of its own are written",
        partial(hosts.FillsItsScratch, first=-16),
        ("scratch",),
        devices=GPU,
    ),
    Mutant(
        "zoo-scratch-filled",
        "none: a workspace, to its last byte",
        "a workspace of its own is written from end to end",
        hosts.FillsItsScratch,
        passes=True,
        devices=GPU,
    ),
    Mutant(
        "zoo-host-sync",
        "the host waits for the GPU",
        "every call synchronises with its stream",
        hosts.WaitsForTheGpu,
        ("graph", "graph-streams", "off-bucket"),
        devices=GPU,
    ),
    Mutant(
        "zoo-illegal-address",
        "crash, context lost",
        f"a kernel writes at address 64 at m={dying.BAD_M}",
        dying.IllegalAddress,
        ("serial",),
        devices=GPU,
        ends=True,
    ),
    Mutant(
        "zoo-endless-kernel",
        "hang",
        f"a kernel waits for a flag that nobody sets, at m={dying.BAD_M}",
        dying.EndlessKernel,
        ("serial",),
        devices=GPU,
        ends=True,
    ),
    Mutant(
        "zoo-tactic-falls-back",
        "silent fallback",
        "of two tactics it offers, both run the same kernel",
        hosts.FallsBack,
        ("census",),
        devices=GPU,
    ),
    Mutant(
        "zoo-weights-before-wait",
        "none: an early load of the weight",
        "launched with PDL, loads weights before it waits",
        partial(PdlGemm, when="weights"),
        passes=True,
        devices=GPU,
    ),
    Mutant(
        "zoo-waits-w4a4",
        "none: PDL as it should be",
        "W4A4, launched with PDL, waits before anything else",
        partial(PdlGemm, when="first", activation="fp4"),
        passes=True,
        devices=GPU,
        activation="fp4",
    ),
)
