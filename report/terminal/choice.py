"""The stored choice for one problem, and its layer's layouts, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...autotune import checkpoint_check
from ...autotune.choice import layouts
from ...autotune.evidence.wording import shown
from ...autotune.verdict.buckets import bucket_of
from ...cache.experts import layer_words
from ..wording import range_text, weights_text


def decision_lines(answer: Mapping[str, Any]) -> list[str]:
    """One problem's answer, and what it rests on."""
    p = answer["problem"]
    problem = f"m={p['m']} {layer_words(p)} {p['format']}"
    if answer["status"] != "safe":
        return [f"{problem}: {answer['backend']} ({answer['status']}: {answer['reason']})"]
    line = f"{problem}: {answer['backend']}"
    if answer["tactic"] != "default":
        line += f" {answer['tactic']}"
    time = "" if answer["median_us"] is None else f"{answer['median_us']:.1f} us; "
    m = bucket_of(p["m"])
    line += f" (safe; {time}{shown(answer['bounds'], m.lo, m.hi)})"
    return [line, *(f"  if {c['text']}" for c in answer["conditions"])]


def choice_lines(answer: Mapping[str, Any], layer: bool) -> list[str]:
    """What a `decision` says beyond its line: of its layer, and of a checkpoint."""
    out = []
    if answer["layer"]:
        out += layer_lines(answer["layer"])
    elif layer:
        out.append("no weight layout is known for this layer: it was not probed")
    weights = answer["checkpoint"]
    if weights:
        out += checkpoint_check.lines(weights)
        if weights["instead"]:
            out.append(f"for this checkpoint: {weights['instead']['backend']} instead")
        elif weights["status"] == "broken":
            out.append("for this checkpoint nothing is proven here")
    return out


def layer_lines(document: Mapping[str, Any]) -> list[str]:
    """A layer's layouts in words."""
    d = document
    head = f"{layer_words(d)} {d['format']} {weights_text(d['activation'])}: "
    if d["layout"]:
        head += f"weights are laid out as {d['layout']}, weighed by the traffic {d['traffic']}"
    else:
        head += "no weight layout is chosen"
    out = [head + (f"; {d['reason']}" if d["reason"] else "")]
    if d["layout"] and d["covered"] < 0.995:
        out.append(
            f"  {100 * d['covered']:.0f} % of that traffic was probed; the rest counts for nothing"
        )
    for fit in d["fits"]:
        if fit["expected_us"] is not None:
            interval = f"{fit['lo_us']:.1f} to {fit['hi_us']:.1f}"
            names = ", ".join(dict.fromkeys(part["backend"] for part in fit["parts"]))
            out.append(
                f"  {fit['layout']}: {fit['expected_us']:.1f} us a call ({interval}; {names})"
            )
        elif fit["holes"]:
            more = f" and {len(fit['holes']) - 1} more" if len(fit["holes"]) > 1 else ""
            lo, hi = fit["holes"][0]
            first = range_text(lo, hi, " to ")
            out.append(f"  {fit['layout']}: nothing safe at m={first}{more}")
    if d["activation"] == "fp4" and d["layout"] and d["layer_us"] is None:
        out.append(f"  {layouts.NO_QUANTISER}: these are times of the GEMM alone")
    elif d["activation"] == "fp4" and d["layout"]:
        out.append(f"  with its activation quantiser: {d['layer_us']:.1f} us a call")
    if d.get("crossing"):
        out.append(f"  W4A16 against W4A4: {d['crossing']['reason']}")
    return out
