"""A finished probe in ten lines: what it came to, in the order in which one wants to know it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..autotune.choice.rank import FLOORS, time_of
from ..autotune.evidence.wording import assurance, known_sentence
from ..cache import facts_text
from ..cache.decision import Decision
from ..cache.rows import BucketKey, Candidate, Choice, Finding
from ..engines import names
from .numbers import ratio
from .wording import range_text, size_text, weights_text

if TYPE_CHECKING:
    from ..autotune.plan import Report

LINES = 10
_DOES = {
    "crash": "takes its process down",
    "hang": "never comes back",
    "poisoned": "breaks the GPU's context",
    "out of bounds": "writes outside its output",
    "input modified": "changes what it was given",
    "unwritten": "leaves outputs unwritten",
    "written early": "writes while the kernel before it still reads",
    "wrong": "gives wrong results",
    "not finite": "gives NaN or infinity",
    "pdl without wait": "starts before the kernel in front of it is done",
    "flagged": "has machine code that never waits",
    "silent fallback": "runs other code than it says",
    "side effect": "changes what other code computes with",
    "memory held": "keeps memory for each weight",
    "device leak": "keeps ever more of the GPU's memory",
    "host leak": "keeps ever more of the host's memory",
    "error": "raises an error",
}
"""Kinds of findings in words, from what harms most to what harms least; others come after."""
_WORST = tuple(_DOES)
_MOST_UNSAFE = 3
_SAME = 0.005
"""A ratio this near to 1 is no difference."""


def lines(report: Report, status: Mapping[str, Any], then: str) -> list[str]:
    """At most `LINES` of them, but for what could not be loaded. `status` is what `facts` decides
    of the state, and `then` what to do next."""
    head = [_status_line(status)]
    middle = [*_unsafe_lines(report), *_broken_lines(report), *_even_lines(report)]
    sure = assurance(report.choices)
    tail = [
        *([sure] if sure else []),
        *_budget_lines(report),
        _kept_line(report, status),
        f"next: {then}",
    ]
    room = max(1, LINES - len(head) - len(middle) - len(tail))
    return [*head, *_layer_summaries(report, room), *middle, *tail]


def _status_line(status: Mapping[str, Any]) -> str:
    return facts_text.said(dict(status))


def _layer_summaries(report: Report, room: int) -> list[str]:
    """The choice of each layer, and how fast it is beside what would have been run without it."""
    grouped: dict[tuple[Any, ...], list[Choice]] = {}
    for choice in report.choices:
        grouped.setdefault((choice.bucket.layer, choice.profile), []).append(choice)
    by_bucket: dict[BucketKey, list[Candidate]] = {}
    for candidate in report.candidates:
        by_bucket.setdefault(candidate.bucket, []).append(candidate)
    found = []
    for (layer, profile), choices in grouped.items():
        weights = weights_text(layer.activation)
        text = f"{size_text(layer)} {layer.format} {weights}: {_chosen_over_m(choices)}"
        beside = speed(choices, by_bucket, profile)
        found.append(f"{text}{', ' if beside else ''}{beside}")
    if len(found) > room:
        rest = len(found) - room + 1
        found = [*found[: room - 1], f"and {rest} more layers: fp4tune show has them all"]
    return found


def _chosen_over_m(choices: Sequence[Choice]) -> str:
    """Who is chosen, and for which m where it is not one for all."""
    named = [(c.bucket, "nothing safe" if c.status == "none" else c.backend) for c in choices]
    runs: list[tuple[str, int, int]] = []
    for bucket, name in sorted(named, key=lambda pair: pair[0].m_lo):
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], bucket.m_hi)
        else:
            runs.append((name, bucket.m_lo, bucket.m_hi))
    conditions = " (under conditions)" if any(c.conditions for c in choices) else ""
    if len(runs) == 1:
        return runs[0][0] + conditions
    if len(runs) <= 3:
        spans = (f"{name} at m={range_text(lo, hi)}" for name, lo, hi in runs)
        return ", ".join(spans) + conditions
    counted = Counter(name for _, name in named).most_common()
    return ", ".join(f"{name} in {n} ranges of m" for name, n in counted) + conditions


def speed(
    choices: Iterable[Choice], by_bucket: Mapping[BucketKey, Sequence[Candidate]], profile: str
) -> str:
    """How fast a layer's choices are beside what the engine takes by itself, else beside the floor:
    the geometric mean over the buckets in which both were timed, those that are not told apart
    counting as equal."""
    mine = [c for c in choices if c.status != "none" and c.median_us and c.bucket.m_hi]
    default = next((c.default_backend for c in mine if c.default_backend), None)
    if mine and default is not None:
        if all(c.backend == default for c in mine):
            return f"which is also {profile}'s default"
        said = _speed_beside(mine, by_bucket, (default,), f"{profile}'s default, {default}")
        if said:
            return said
    if mine and all(c.backend in FLOORS for c in mine):
        return "the floor: nothing faster is safe and told apart"
    return _speed_beside(mine, by_bucket, FLOORS, "dequantising each time, the floor")


def _speed_beside(
    mine: Sequence[Choice],
    by_bucket: Mapping[BucketKey, Sequence[Candidate]],
    others: Sequence[str],
    what: str,
) -> str:
    logs, apart = [], 0
    for choice in mine:
        group = by_bucket.get(choice.bucket, ())
        other = next((c for c in group if c.backend in others), None)
        own = next((c for c in group if c.backend == choice.backend), None)
        if other is None or own is None:
            continue
        a, b = time_of(own), time_of(other)
        if a is not None and b is not None and a.us > 0 and b.us > 0:
            told = a.hi < b.lo or b.hi < a.lo
            logs.append(math.log(b.us / a.us) if told else 0.0)
            apart += told
    if not logs:
        return ""
    times = math.exp(math.fsum(logs) / len(logs))
    if not apart:
        return f"as fast as {what}, as far as that can be told here"
    if abs(times - 1) < _SAME:
        return f"as fast as {what}"
    return f"{ratio(times)} times as fast as {what}"


def _unsafe_lines(report: Report) -> list[str]:
    """What was found unsafe, worst first, in words."""
    bad = {c.backend for c in report.candidates if c.verdict == "unsafe"}
    by_backend: dict[str, list[Finding]] = {name: [] for name in bad}
    for finding in report.findings:
        if finding.backend in bad:
            by_backend[finding.backend].append(finding)
    ordered = worst_first(by_backend)
    said = {c.backend: c.reasons for c in report.candidates if c.verdict == "unsafe"}
    found = [harm(name, findings, said.get(name, ())) for name, findings in ordered]
    if len(found) > _MOST_UNSAFE:
        rest = [name for name, _ in ordered[_MOST_UNSAFE - 1 :]]
        found = [*found[: _MOST_UNSAFE - 1], f"and {len(rest)} more: {', '.join(rest)}"]
    return [f"unsafe: {text}" for text in found]


def worst_first(
    by_backend: Mapping[str, Sequence[Finding]],
) -> list[tuple[str, Sequence[Finding]]]:
    """Backends with their findings, those that do most harm first."""
    return sorted(by_backend.items(), key=lambda pair: (_severity(pair[1]), pair[0]))


def _severity(findings: Sequence[Finding]) -> int:
    ranks = [_WORST.index(f.kind) if f.kind in _WORST else len(_WORST) for f in findings]
    return min(ranks, default=len(_WORST) + 1)


def harm(name: str, findings: Sequence[Finding], reasons: Sequence[str] = ()) -> str:
    """The worst that a backend does, in words, and where; the `reasons` of its verdicts where no
    finding is at hand."""
    if not findings:
        return f"{name} ({'; '.join(reasons) or 'as an earlier probe found'})"
    worst = _severity(findings)
    mine = [f for f in findings if _severity([f]) == worst]
    first = mine[0]
    regimes = list(dict.fromkeys(f.regime for f in mine))
    ms = [m for f in mine for m in (f.bucket.m_lo, f.bucket.m_hi)]
    where = f"{', '.join(regimes[:3])}; m={range_text(min(ms), max(ms))}"
    return f"{name} {_DOES.get(first.kind, first.kind)} ({where})"


def _broken_lines(report: Report) -> list[str]:
    if not report.broken:
        return []
    return [f"did not load or build: {', '.join(report.broken)}; fp4tune backends says why"]


def _even_lines(report: Report) -> list[str]:
    """In how many ranges of m more than one safe candidate is as fast as far as one can tell."""
    timed = [c for c in report.candidates if c.rank is not None and c.bucket.m_hi]
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in timed:
        groups.setdefault((candidate.scope, candidate.bucket), []).append(candidate)
    even = widest = 0.0
    for group in groups.values():
        times = [(time_of(c), c) for c in group]
        known = [t for t, _ in times if t is not None]
        fastest = min(known, key=lambda t: (t.us, t.hi), default=None)
        if fastest is None or sum(t.level_with(fastest) for t in known) < 2:
            continue
        even += 1
        widest = max(widest, max((t.hi - t.lo) / (2 * t.us) for t in known if t.us))
    if not even:
        return []
    return [
        f"not told apart in {even:.0f} of {len(groups)} ranges of m (times known to within "
        f"{100 * widest:.0f} % at worst): a fixed order decided, the same on every node"
    ]


def _budget_lines(report: Report) -> list[str]:
    if not report.left:
        return []
    count = len(report.left)
    layers = "1 layer" if count == 1 else f"{count} layers"
    return [
        f"the time budget ended before all of {layers} was proven; the next probe goes on there"
    ]


def _kept_line(report: Report, status: Mapping[str, Any]) -> str:
    known = known_sentence(report.known)
    more = f"; {known}" if known else ""
    return (
        f"kept in {status['state']} as generation {report.generation}, run {report.run}: "
        f"{report.seconds:.0f} s after {report.build_wall_seconds:.0f} s of loading and building"
        f"{more}"
    )


def named_instead(
    engine: str, others: Sequence[Decision], format_: str, sm: int | None
) -> list[str]:
    """For an engine that was named: what it would be given in the place of a choice that it has no
    name for. `others` are all that may be chosen, best first, the choice among them."""
    if not others or names.named(engine, others[0].backend, format_, sm):
        return []
    able = [d for d in others if d.status == "safe" and names.named(engine, d.backend, format_, sm)]
    said = f"{engine} has no name for {others[0].backend}, so it is shown and not chosen for it: "
    if not able:
        return [f"{said}nothing that {engine} can name is safe here"]
    time = "" if able[0].median_us is None else f", {able[0].median_us:.1f} us"
    return [f"{said}the best that it can name is {able[0].backend}{time}"]


def engines_for(backends: Iterable[str], format_: str, sm: int | None, profile: str) -> list[str]:
    """Which engines could run these choices, for whoever has chosen for none."""
    if profile in names.ENGINES:
        return []
    found = []
    for backend in dict.fromkeys(backends):
        words = {e: names.named(e, backend, format_, sm) for e in names.ENGINES}
        able = [f"{engine} ({word})" for engine, word in words.items() if word]
        if able:
            found.append(f"{backend} can be run by {', '.join(able)}")
        elif backend in FLOORS:
            found.append(f"{backend} is what engines fall back to; none has a name for it")
        else:
            found.append(
                f"no engine has a name for {backend}: probe with --profile "
                f"{' or '.join(names.ENGINES)} for what yours can run"
            )
    return found
