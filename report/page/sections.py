"""The parts of a node's page, each from the rows it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...autotune.publication.published import Standing
from ...cache.quarantine import Quarantine
from ...cache.rows import BucketKey, Candidate, Choice, Environment, Run
from . import changes, chart, heatmap
from .heatmap import Names
from .markup import Child, captioned, clean, details, el, mark, scrolling, short, table, text
from .numbers import count, micro, when

SIGNS = {
    "safe": "✓",
    "unsafe": "✗",
    "inconclusive": "?",
    "unsupported": "–",
    "reference": "=",
}
_MOST_LAYERS = 120
"""Layers whose times are shown in full; the heat maps have all of them."""
_MOST_CHANGES = 150
_MOST_NOTES = 12
_MOST_ENVIRONMENTS = 200


def verdict(candidate: Candidate) -> str:
    """A candidate's verdict; a reference line is measured and never judged."""
    reference = any("reference line" in str(reason) for reason in candidate.reasons)
    return "reference" if reference else candidate.verdict


def scope_title(arch: str, gpu: str, profile: str) -> str:
    return f"{gpu} ({arch}), profile {profile}"


def choices(rows: Sequence[Choice], candidates: Sequence[Candidate], known: Names) -> Markup:
    """Heat maps of one scope: what is chosen, what it gains, and the conditions it rests on."""
    parts: list[Markup] = []
    for kind, some in heatmap.by_kind(rows).items():
        mine = [c for c in candidates if heatmap.kind(c.bucket) == kind]
        parts.append(el("h4", heatmap.kind_text(kind)))
        parts.append(heatmap.legend(some, known))
        maps = heatmap.chosen(some, known), heatmap.gain(some, mine)
        parts.append(el("div", maps, class_="side"))
    return Markup("").join([*parts, _conditions(rows)])


def _conditions(rows: Sequence[Choice]) -> Markup:
    found = Counter(
        (choice.backend, _condition(c)) for choice in rows for c in choice.conditions
    ).most_common()
    if not found:
        return Markup("")
    items = [
        el("li", f"{backend}: {said} ", el("span", f"({count(times, 'bucket')})", class_="soft"))
        for (backend, said), times in found
    ]
    return el("h4", "Conditions") + el("ul", items)


def _condition(condition: Any) -> str:
    if isinstance(condition, Mapping):
        return str(condition.get("text", condition.get("id", condition)))
    return str(condition)


def times(
    rows: Sequence[Choice], candidates: Sequence[Candidate], known: Names, spread: str = ""
) -> Markup:
    """A chart and a table for each layer, folded: medians with intervals, and verdicts.

    With `spread` the rows are of many GPUs and carry no verdict; it says what their interval is.
    """
    taken = {c.bucket: c for c in rows}
    layers: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in candidates:
        kind = heatmap.kind(candidate.bucket)
        layers.setdefault((kind, candidate.bucket.n, candidate.bucket.k), []).append(candidate)
    parts = []
    for at, ((kind, n, k), some) in enumerate(sorted(layers.items())):
        if at == _MOST_LAYERS:
            parts.append(el("p", f"{len(layers) - at} more layers: fp4tune show --json"))
            break
        title = f"n {n}, k {k}"
        label = f"Times of {title}, {heatmap.kind_text(kind)}"
        summary = title, el("span", f" {heatmap.kind_text(kind)}", class_="soft")
        body = chart.lines(some, known, label), _times_table(some, taken, known, label, spread)
        parts.append(details(summary, body, open_=at == 0))
    return Markup("").join(parts)


def _times_table(
    candidates: Sequence[Candidate],
    taken: Mapping[BucketKey, Choice],
    known: Names,
    label: str,
    spread: str,
) -> Markup:
    here = {c.backend for c in candidates}
    backends = [name for name in known.order if name in here]
    by_bucket: dict[BucketKey, dict[str, list[Candidate]]] = {}
    for c in candidates:
        by_bucket.setdefault(c.bucket, {}).setdefault(c.backend, []).append(c)
    head = [el("th", "m", scope="col")]
    head += [el("th", f"{known.letter(name)} {name}", scope="col") for name in backends]
    body = []
    for bucket in sorted(by_bucket, key=lambda b: (b.m_lo, b.m_hi)):
        row = by_bucket[bucket]
        choice = taken.get(bucket)
        cells = [
            el("td", [_time(c, choice, bool(spread)) for c in row[name]], class_="rel")
            if name in row
            else el("td", "")
            for name in backends
        ]
        m = heatmap.range_text(bucket.m_lo, bucket.m_hi)
        body.append(el("tr", el("th", m, scope="row", class_="num"), cells))
    signs = [[mark(word, sign, word, seen=True), " "] for word, sign in SIGNS.items()]
    said = spread or "median, below it an interval of it"
    caption = captioned(
        f"Microseconds per call: {said}; framed: chosen. ", None if spread else signs
    )
    content = caption, el("thead", el("tr", head)), el("tbody", body)
    return scrolling(label, el("table", content))


def _time(c: Candidate, choice: Choice | None, pooled: bool) -> Markup:
    word = verdict(c)
    is_chosen = (
        choice is not None
        and choice.status != "none"
        and choice.backend == c.backend
        and (pooled or choice.tactic == c.tactic)
    )
    between = None
    if c.lo_us is not None and c.hi_us is not None:
        between = el("span", f"{micro(c.lo_us)}\u2013{micro(c.hi_us)}", class_="span")
    tell = None if pooled else mark(word, SIGNS[word], word)
    said = el("span", " chosen", class_="vh") if is_chosen else None
    head = micro(c.median_us), " ", tell, said
    return el("div", head, between, class_="cell chosen" if is_chosen else "cell num")


def backends(candidates: Sequence[Candidate], known: Names) -> Markup:
    """A row for each backend: verdicts over all buckets, widths, conditions and reasons."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.backend, []).append(candidate)
    rows: list[Sequence[Child]] = []
    for name in known.order:
        group = groups.get(name, [])
        if not group:
            continue
        verdicts = Counter(verdict(c) for c in group)
        widths = sorted({c.width for c in group if c.width is not None})
        rows.append(
            (
                f"{known.letter(name)} {name}",
                [
                    el("div", mark(word, SIGNS[word], f"{times} {word}", seen=True))
                    for word, times in verdicts.items()
                ]
                + [el("div", f"width {', '.join(map(str, widths))}", class_="soft")] * bool(widths),
                _notes(group),
            )
        )
    caption = "Verdicts over all buckets, and why"
    return table(caption, ("backend", "verdicts", "conditions and reasons"), rows,
                 class_="words")  # fmt: skip


def _notes(group: Sequence[Candidate]) -> Child:
    notes = Counter(
        note for c in group for note in (*map(_condition, c.conditions), *map(str, c.reasons))
    ).most_common()
    parts = [
        el("div", f"{note} ", el("span", f"({count(times, 'bucket')})", class_="soft"))
        for note, times in notes[:_MOST_NOTES]
    ]
    if len(notes) > _MOST_NOTES:
        parts.append(el("div", f"and {len(notes) - _MOST_NOTES} more"))
    return parts


def changed(old: Standing | None, new: Standing, unread: Sequence[str]) -> Markup:
    """What differs from the generation before."""
    notes = [el("p", line) for line in unread]
    if old is None:
        return Markup("").join([*notes, el("p", "No earlier generation is kept here.")])
    found = changes.between(old, new)
    since = f"Since generation {old.generation} of {when(old.meta.get('published'))}: "
    if not found:
        return Markup("").join([*notes, el("p", since, "nothing that shows here.")])
    counted = Counter(c.what for c in found)
    said = ", ".join(count(number, what) for what, number in counted.items())
    rows = [
        (text(c.where), c.what, c.before or "nothing", c.after or "nothing")
        for c in found[:_MOST_CHANGES]
    ]
    body = table(
        f"Generation {old.generation} to {new.generation}; a time counts where intervals lie apart",
        ("where", "what", "before", "now"),
        rows,
        class_="words",
    )
    more = len(found) - _MOST_CHANGES
    tail = el("p", f"and {more} more") if more > 0 else Markup("")
    return Markup("").join([*notes, el("p", since, said, "."), body, tail])


_DEVICE = ("name", "gpu", "kind", "sm", "sm_count", "driver", "cuda", "cudnn")


def environments(found: Sequence[Environment]) -> Markup:
    """What the evidence holds for: the devices, then each backend's versions and code digest."""
    devices: dict[str, Mapping[str, Any]] = {}
    rows: list[Sequence[Child]] = []
    for e in found[:_MOST_ENVIRONMENTS]:
        facts = e.facts if isinstance(e.facts, Mapping) else {}
        device = facts.get("device")
        if isinstance(device, Mapping):
            devices.setdefault(repr(sorted(map(str, device.items()))), device)
        versions = facts.get("distributions")
        variables = facts.get("variables")
        code = facts.get("code") or facts.get("code_how") or ""
        rows.append(
            (
                e.backend,
                e.arch,
                el("code", short(e.fingerprint, 13), title=e.fingerprint),
                _pairs(versions),
                _pairs(variables),
                el("code", short(code, 24)),
            )
        )
    parts = [_device(device) for device in devices.values()]
    if rows:
        headings = ("backend", "SM", "fingerprint", "versions", "variables", "code digest")
        more = len(found) - len(rows)
        caption = "Environment of each backend" + (
            f" ({more:,} more are not shown)" if more else ""
        )
        parts.append(table(caption, headings, rows, class_="words"))
    return Markup("").join(parts)


def _device(device: Mapping[str, Any]) -> Markup:
    order = [*(n for n in _DEVICE if n in device), *sorted(set(device) - set(_DEVICE), key=str)]
    rows = [(name, clean(device[name], 200)) for name in order]
    name = next((device[n] for n in ("name", "gpu", "cpu", "kind") if device.get(n)), "device")
    return details(("Device: ", clean(name, 100)), table("Facts", ("fact", "value"), rows))


def _pairs(found: object) -> Child:
    if not isinstance(found, Mapping):
        return found or ""
    return [el("div", f"{name} {value}") for name, value in found.items()]


def reasons(title: str, found: object) -> Markup:
    """Backends and why they are left out."""
    if not isinstance(found, Mapping) or not found:
        return Markup("")
    return details(
        (title, el("span", f" ({len(found)})", class_="soft")),
        table(title, ("backend", "reason"), list(found.items()), class_="words"),
    )


def runs(found: Sequence[Run], most: int = 8) -> Markup:
    """The last runs."""
    rows = [
        (run.id, run.status, when(run.started), _seconds(run), run.level, run.profile, run.seed)
        for run in list(found)[-most:][::-1]
    ]
    if not rows:
        return Markup("")
    headings = ("run", "status", "started", "seconds", "level", "profile", "seed")
    return table("The last runs", headings, rows, numbers=(3,))


def _seconds(run: Run) -> str:
    return "" if run.finished is None else f"{run.finished - run.started:.0f}"


def quarantined(found: Iterable[Quarantine]) -> Markup:
    """What must not be chosen, whatever the maps above say."""
    rows = [(q.where(), q.reason, q.by, when(q.at)) for q in found]
    if not rows:
        return Markup("")
    headings = ("what", "reason", "by", "since")
    return table("Not chosen, whatever the maps say", headings, rows, class_="words")
