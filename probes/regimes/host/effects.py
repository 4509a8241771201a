"""Side effects: what a backend's import, its `prepare` and its calls change of the process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ...backends import Backend
from ...check.sweep import Checker
from ...launch.case import Case, Launch, bind, prepared_again
from ...launch.outcome import Budget, Outcome, device_of, outcome, wait
from ...launch.process import DECIDES, LASTING, differences, restore, snapshot, stir
from ...registry import effects_of, settings_of

KIND, TOLD = "side effect", "setting changed"
_ROUNDS = 2
_NATURAL = frozenset({"threads", "warnings", "open files", "search path of modules"})
"""What an import and first calls may rightly add to: told where later calls change it, too."""


def effects(
    backend: Backend, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
) -> Outcome:
    """What the process is set to, before and after a backend was loaded, prepares and is called.

    A change of what others compute with (`process.DECIDES`: random states, default dtype and
    device, TF32, the current stream, ...) is a fault of the kind `side effect`, set back where it
    can be; any other is told as a grade, `setting changed`. What the import changed was noted when
    the backend was loaded.
    """
    device = device_of(cases)
    calls = [bind(backend, cases, launch) for launch in launches]
    checker = Checker([call.slot for call in calls])
    loading = {name: f"its import changes it ({how})" for name, how in effects_of(backend).items()}
    seen = {name: how for name, how in loading.items() if name not in _NATURAL}
    steps = 0

    def watch(step: str, run: Callable[[], None], settled: bool) -> None:
        nonlocal steps
        steps += 1
        stir(device)
        before = snapshot(device)
        run()
        wait(device)
        changed = differences(before, snapshot(device))
        restore(device, before, changed.keys())
        for name, how in changed.items():
            if settled or name not in _NATURAL:
                seen.setdefault(name, f"{step} changes it ({how})")

    def prepare() -> None:
        prepared_again(backend, cases)

    def every_call() -> None:
        for call in calls:
            call.enqueue()

    start = time.perf_counter()
    loaded = settings_of(backend)
    for name, how in differences(loaded, snapshot(device)).items():
        if name in LASTING:
            seen.setdefault(name, f"it is not what it was when the backend was loaded ({how})")
            restore(device, loaded, {name})
    watch("`prepare`", prepare, settled=False)
    for call in calls:
        watch(f"a call with m={call.launch.m}", call.enqueue, settled=False)
    checker.sweep()
    watch("`prepare`", prepare, settled=True)
    for _ in range(_ROUNDS):
        watch("a call", every_call, settled=True)
        checker.sweep()
        budget.beat()
    seconds = time.perf_counter() - start
    proof = {"settings": len(snapshot(device)), "steps": steps, "changed": sorted(seen)}
    found = outcome(checker, calls, cases, seconds, None, proof)
    grave, told = ({n: h for n, h in seen.items() if (n in DECIDES) is so} for so in (True, False))
    error = {"kind": KIND, "message": said(grave)}
    return replace(
        found,
        errors={launch.item: error for launch in launches} if grave else {},
        graded=({"kind": TOLD, "message": said(told)},) if told else (),
    )


def said(changed: Mapping[str, str]) -> str:
    """What was changed, and by what, in one line."""
    return "; ".join(f"{name}: {how}" for name, how in sorted(changed.items()))[:300]
