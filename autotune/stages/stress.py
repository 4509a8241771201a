"""Every regime, briefly: launch conditions that try to break what was graded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor

from ...cache.rows import Where
from ...probes.regimes import ALONE, ASIDE
from .. import budget
from ..budget import OVER, SLOWER
from ..evidence.recorder import Recorder
from ..layer import Entrant, ProbedLayer, not_tried
from ..regime import Wanted, briefly
from ..verdict.buckets import MRange

Part = Mapping[str, Collection[MRange] | None]
"""Who goes through the regimes, by name, and in which m ranges; None for all."""


def stress(
    layer: ProbedLayer,
    entrants: Sequence[Entrant],
    record: Recorder,
    say: Callable[[str], None],
    wanted: Wanted,
    pool: Executor | None = None,
) -> None:
    """Every regime of the level, for the winners of these entrants: on a GPU, and where time is
    limited, the fastest first, until two are right in each bucket.

    With `pool`, entrants go through most regimes at once: on a GPU most of that time is the host's,
    and a hang of one is waited for while others go on, and the others of its own. The regimes in
    `ALONE` have the device to themselves.
    """
    tried = [e for e in entrants if e.winner and not e.reference_line]

    def run(part: Part) -> None:
        mine = [e for e in tried if e.name in part and not e.known]
        for step, alone in (("regimes, one at a time", True), ("regimes, side by side", False)):
            names = [n for n in layer.regimes if (n in ALONE) == alone]
            with layer.clock.spent(step):
                if alone:
                    for name in names:
                        for entrant in mine:
                            _regimes(layer, entrant, [name], part[entrant.name], record, say)
                    continue

                def together(each: tuple[Entrant, Sequence[str]]) -> None:
                    entrant, its = each
                    _regimes(layer, entrant, its, part[entrant.name], record, say)

                whole = [(entrant, its) for entrant in mine for its in _by_worker(entrant, names)]
                list(pool.map(together, whole) if pool else map(together, whole))

    if layer.time is None and pool is None:
        run({entrant.name: None for entrant in tried})
    else:
        _from_the_fastest(layer, tried, run, wanted, record)


def _by_worker(entrant: Entrant, names: Sequence[str]) -> list[list[str]]:
    """The regimes that each worker of the backend runs; what waits longest is begun first."""
    if entrant.aside is None:
        return [list(names)]
    second = [name for name in names if name in ASIDE]
    return [second, [name for name in names if name not in ASIDE]]


def _regimes(
    layer: ProbedLayer,
    entrant: Entrant,
    names: Sequence[str],
    only: Collection[MRange] | None,
    record: Recorder,
    say: Callable[[str], None],
) -> None:
    for name in names:
        say(f"{name}: {entrant.name}")
        with layer.clock.spent(name, entrant.name):
            briefly(layer, entrant, name, record, only)


def _from_the_fastest(
    layer: ProbedLayer,
    tried: Sequence[Entrant],
    run: Callable[[Part], None],
    wanted: Wanted,
    record: Recorder,
) -> None:
    """Run waves until two candidates of every m range are proven; the rest is told `not tried`.

    Ends with the time, too: what was not tried then says so.
    """
    by_name = {entrant.name: entrant for entrant in tried}
    times = {entrant.name: entrant.median_us for entrant in tried}
    orders = {
        m: layer.named_first([n for n in budget.order(times, m) if m in by_name[n].winner])
        for m in layer.ranges
    }
    if layer.agreement:
        scope = (layer.target.name, layer.problem)
        orders = {m: layer.agreement.order(scope, m, own) for m, own in orders.items()}
    done: dict[MRange, list[str]] = {m: [] for m in layer.ranges}

    def where(name: str, m: MRange) -> Where:
        return layer.where(by_name[name], m, by_name[name].winner[m])

    def proven(name: str, m: MRange) -> bool:
        return wanted.right(where(name, m))

    def next_wave() -> dict[str, list[MRange]]:
        return budget.next_wave(orders, done, proven, wanted.also, wanted.enough)

    def over() -> bool:
        return layer.time is not None and layer.time.over

    while not over() and (wave := next_wave()):
        run(wave)
        for name, ranges in wave.items():
            for m in ranges:
                done[m].append(name)
    for m, names in orders.items():
        enough = sum(proven(name, m) for name in done[m]) >= wanted.enough
        for name in names:
            if name not in done[m] and not by_name[name].known:
                not_tried(where(name, m), SLOWER if enough else OVER, record)
