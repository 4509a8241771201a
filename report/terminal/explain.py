"""Why this backend, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...autotune import checkpoint_check
from ...autotune.verdict.buckets import MRange, representatives
from ...cache.experts import layer_words
from ..wording import range_text, weights_text
from .choice import layer_lines

_MOST_FINDINGS = 3
"""Of one candidate; the document has all."""


def explained_lines(document: Mapping[str, Any]) -> list[str]:
    """The document in words, one paragraph a topic."""
    d, p, b = document, document["problem"], document["bucket"]
    at = [str(m) for m in representatives(MRange(b["m_lo"], b["m_hi"]))]
    timed = " and ".join(filter(None, (", ".join(at[:-1]), at[-1])))
    out = [
        f"m={p['m']} {layer_words(p)} {p['format']} {weights_text(p['activation'])} "
        f"{p['out_dtype']} on {d['gpu']} ({d['arch']}), profile {d['profile']}, "
        f"generation {d['generation']}",
        f"Its bucket is m={range_text(b['m_lo'], b['m_hi'], ' to ')}, timed at m={timed}.",
        "",
        d["why"],
        d["default"]["text"],
        *([d["price"]["text"]] if d["price"]["text"] else []),
        "",
        "Candidates:",
    ]
    for number, each in enumerate(d["candidates"], 1):
        out.append(f"{number}. {each['text']}")
        out += [f"   if {c['text']}{_discharged(c)}" for c in each["conditions"]]
        out += [f"   because {reason}" for reason in each["reasons"]]
        shown = each["findings"][:_MOST_FINDINGS]
        out += [f"   finding #{f['id']}: {f['kind']}, {f['regime']}: {f['text']}" for f in shown]
        if len(each["findings"]) > len(shown):
            more = len(each["findings"]) - len(shown)
            out.append(f"   and {more} more findings; see fp4tune show --findings")
    out += ["", *layer_lines(d["layer"])]
    if d["checkpoint"] is not None:
        out += ["", *checkpoint_check.lines(d["checkpoint"])]
    return out


def _discharged(condition: Mapping[str, Any]) -> str:
    status = condition.get("status")
    return (
        "" if status in (None, checkpoint_check.NOT_WEIGHTS) else f" ({status} in this checkpoint)"
    )
