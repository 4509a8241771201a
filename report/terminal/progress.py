"""What a person sees while probes run: a bar each on a terminal, a line a layer elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from ...autotune.forecast import Forecast, Pace, in_words
from ...autotune.plan import Plan
from ...autotune.runner import Progress
from ...errors import printable
from .console import InertConsole

_LAYER = re.compile(r"layer (\d+)/(\d+) ")
_MOST_LAYERS = 6
_GUESS = Forecast(20.0, 30.0, 1)
"""Where nobody made one."""


class WatchedProbes:
    """Probes being watched: where each device reports its progress, and how far it is."""

    def __init__(self, paces: Mapping[str, Pace]) -> None:
        self.progress: dict[str, Progress] = {}
        self.paces = paces

    def known(self) -> tuple[int, int] | None:
        """Layers that are done, of how many; None before the first."""
        begun = [pace for pace in self.paces.values() if pace.at]
        if not begun:
            return None
        return sum(pace.at - 1 for pace in begun), sum(pace.of for pace in begun)


@contextmanager
def watching(plan: Plan) -> Iterator[Progress]:
    """Show the progress of one probe on stderr until it ends; yields where to report it."""
    with watching_all([plan]) as watched:
        yield watched.progress[plan.target.label]


@contextmanager
def watching_all(
    plans: Sequence[Plan], forecasts: Mapping[str, Forecast] | None = None
) -> Iterator[WatchedProbes]:
    """Show progress on stderr until the probes end. `forecasts` are by device label.

    Which layer, and what its step is, come under names that start with ``layer``; everything else
    is a backend telling what it does.
    """
    out = InertConsole(stderr=True, soft_wrap=True)
    start = time.monotonic()
    for plan in plans:
        label = plan.target.label
        for line in before(plan, (forecasts or {}).get(label)):
            out.print(line)
    labels = [plan.target.label for plan in plans]
    paces = {label: Pace((forecasts or {}).get(label, _GUESS)) for label in labels}
    watched = WatchedProbes(paces)
    if out.is_terminal:
        with _live(out, start, watched):
            yield watched
    else:
        for label in labels:
            prefix = "" if len(labels) == 1 else f"{label} "
            watched.progress[label] = _progress_lines(start, prefix, paces[label])
        yield watched


def before(plan: Plan, known: Forecast | None = None) -> list[str]:
    """What is going to be probed, and how long that is likely to take."""
    lines = [
        f"probing {plan.target.name} ({plan.target.device.arch}), level {plan.level.name}, "
        f"profile {plan.profile.name}, seed {plan.seed}"
    ]
    shapes = list(dict.fromkeys(f"{p.n}x{p.k}" for p in plan.problems))
    if shapes:
        more = f" and {len(shapes) - _MOST_LAYERS} more" if len(shapes) > _MOST_LAYERS else ""
        most = max(p.m for p in plan.problems)
        noun = "layer" if len(shapes) == 1 else "layers"
        text = (
            f"{len(shapes)} {noun} (n x k): {', '.join(shapes[:_MOST_LAYERS])}{more}; m to {most}"
        )
        if known is not None:
            by = "as earlier probes here" if known.known else "a guess, corrected as it goes"
            text += f"; about {in_words(known.seconds)} ({by})"
        lines.append(text)
    return lines


@contextmanager
def _live(out: InertConsole, start: float, watched: WatchedProbes) -> Iterator[None]:
    lock = Lock()
    what = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        TextColumn("{task.fields[done]}", markup=False),
        BarColumn(20),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.description}", markup=False, table_column=what),
    )
    with Bars(*columns, console=out, transient=True, expand=True, refresh_per_second=4) as bars:
        where = {label: label for label in watched.paces}
        tasks = {
            label: bars.add_task(f"{label}  loading", total=1.0, done="  0 %", left="")
            for label in watched.paces
        }

        def progress(label: str, who: str, text: str) -> None:
            with lock:
                pace, now = watched.paces[label], time.monotonic() - start
                step = f"{who}: {text}"
                if found := _LAYER.match(who):
                    pace.layer(int(found[1]), int(found[2]), now)
                    where[label] = f"{label}  {who}"
                    step = text
                if who == "survey":
                    bars.console.print(printable(text))
                share = pace.share(now)
                bars.update(
                    tasks[label],
                    completed=share,
                    done=f"{100 * share:3.0f} %",
                    left=f"{in_words(pace.left(now))} left",
                    description=printable(f"{where[label]}  {step}"),
                )

        for label in tasks:
            watched.progress[label] = partial(progress, label)
        yield


_A_LINE = 60.0
"""Seconds after which something is said again, where nothing else is."""


def _progress_lines(start: float, prefix: str, pace: Pace | None = None) -> Progress:
    """A line a layer, and one a minute within it, who takes part, and what is still compiled; steps
    and workers' own chatter are left out."""
    pace = pace or Pace(_GUESS)
    layer, told = "", 0.0

    def progress(who: str, text: str) -> None:
        nonlocal layer, told
        now = time.monotonic() - start
        found = _LAYER.match(who)
        new = found and pace.layer(int(found[1]), int(found[2]), now)
        if new:
            layer = who
        elif found or not who.startswith(("layer", "survey", "build")):
            if not layer or now - told < _A_LINE:
                return
            who = layer
        told = now
        if layer and who == layer:
            text = f"{100 * pace.share(now):.0f} %, about {in_words(pace.left(now))} left"
        line = printable(f"[{now:6.1f} s] {prefix}{who}: {text}")
        print(line, file=sys.stderr, flush=True)

    return progress
