"""Routed experts: one backend for a model, and times by bucket of tokens and by routing law."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...cache.experts import SingleBackend, layer_words
from ...cache.measured import Measured
from ...cache.rows import BucketKey, Candidate, Choice, Timing, Where
from ..documents import ExpertsOfModel, experts_of
from ..numbers import micro
from ..wording import law_times, range_text, scope_text, weights_text
from .heatmap import DASH, BackendNames, HeatCell


@dataclass(frozen=True, slots=True)
class LawTimes:
    """One layer's choices: for each bucket of tokens the backend and its time, and a column for
    each routing law."""

    title: str
    laws: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]


@dataclass(frozen=True, slots=True)
class ModelView:
    """The experts of one model: what one backend for all of them costs, in words and as rows of
    backend, microseconds and loss in percent; what the engine takes by itself; and its layers."""

    title: str
    sentence: str
    singles: tuple[SingleBackend, ...]
    default: str
    layers: tuple[LawTimes, ...]


def section(
    choices: Sequence[Choice],
    candidates: Sequence[Candidate],
    timings: Iterable[Timing],
    meta: Mapping[str, Any],
    known: BackendNames,
) -> list[ModelView]:
    """The models with routed experts of one scope; empty where it has none."""
    by_where = {timing.where: timing for timing in timings}
    return [_experts_model(each, choices, by_where, known) for each in experts_of(candidates, meta)]


def _experts_model(
    model: ExpertsOfModel,
    choices: Sequence[Choice],
    timings: Mapping[Where, Timing],
    known: BackendNames,
) -> ModelView:
    traffic = model.layers[0].traffic
    if model.singles:
        best = model.singles[0]
        sentence = (
            f"An engine takes one backend for all of them: {best.backend}, {best.loss_percent:.1f} "
            f"% slower than the fastest safe one of each bucket, weighed by the traffic {traffic}."
        )
    else:
        sentence = "No backend is safe wherever tokens were probed, so none is for all of them."
    layers = []
    for each in model.layers:
        mine = [c for c in choices if c.bucket.layer == each.layer and c.bucket.m_hi]
        layers.append(_experts_layer(layer_words(asdict(each.layer)), mine, timings, known))
    key = weights_text(model.layers[0].layer.activation)
    title = f"{model.format} {key}, {scope_text(*model.scope)}"
    return ModelView(title, sentence, model.singles, _default(model), tuple(layers))


def _default(model: ExpertsOfModel) -> str:
    """What the engine of the profile would take by itself, and whether that is safe."""
    if model.default is None:
        return ""
    by_itself = f"{model.scope[2]} by itself would take {model.default}"
    single = next((s for s in model.singles if s.backend == model.default), None)
    if single is None:
        return f"{by_itself}, which may not be chosen in every bucket here."
    return f"{by_itself}: safe, and {single.loss_percent:.1f} % slower than the fastest of each."


def _experts_layer(
    title: str,
    choices: Sequence[Choice],
    timings: Mapping[Where, Timing],
    known: BackendNames,
) -> LawTimes:
    times: dict[BucketKey, dict[str, Measured]] = {}
    for choice in choices:
        timing = timings.get(Where(choice.backend, choice.tactic, choice.bucket))
        times[choice.bucket] = {} if timing is None else law_times(timing)
    laws = tuple(dict.fromkeys(law for each in times.values() for law in each))
    rows = []
    for choice in sorted(choices, key=lambda c: c.bucket.m_lo):
        by_law = times[choice.bucket]
        cells = [_chosen_cell(choice, known), *(_law_cell(by_law.get(law)) for law in laws)]
        rows.append((range_text(choice.bucket.m_lo, choice.bucket.m_hi, DASH), tuple(cells)))
    return LawTimes(title, laws, tuple(rows))


def _chosen_cell(choice: Choice, known: BackendNames) -> HeatCell:
    if choice.status == "none":
        return HeatCell("none", "\u2717", text="none")
    text = "" if choice.median_us is None else micro(choice.median_us)
    css = f"rel {known.swatch(choice.backend)}"
    return HeatCell(css, known.letter(choice.backend), choice.backend, text, choice.backend)


def _law_cell(time: Measured | None) -> HeatCell:
    if time is None:
        return HeatCell(text="\u00b7")
    more = f"{micro(time.lo)} to {micro(time.hi)} microseconds"
    return HeatCell(text=micro(time.us), more=more)
