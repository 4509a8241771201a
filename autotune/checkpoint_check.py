"""Conditions on weights, discharged for one checkpoint: what `check-weights` found, applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..cache import weights as kept
from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused

NOT_WEIGHTS = "not about weights"
"""Of a condition that the engine must grant: no checkpoint discharges it."""


Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the bytes of scales there are, a context that is told of each part read."""


def check(path: Path, state_dir: Path, watch: Watch | None = None) -> dict[str, Any]:
    """Look at all weights of the checkpoint at `path`, keep what was found, and return it.

    Raises ValueError for what is no whole checkpoint, Refused where it has no FP4 weights that are
    known here, and StateError where the result cannot be kept.
    """
    from ..probes.models import checkpoint, consistency, soundness, weights

    opened = checkpoint.open_checkpoint(path)
    found, odd = weights.weights(opened)
    around = consistency.surroundings(path, opened)
    if not found and not around.unpaired:
        why = "".join(f": {name}: {reason}" for name, reason in list(odd.items())[:1])
        raise Refused(f"{path} has no FP4 weights that are known here{why}")
    with (watch or _unwatched)(sum(weight.scales.nbytes for weight in found)) as advance:
        results = soundness.check(found, odd, around, advance)
    if checkpoint.open_checkpoint(path).identity != opened.identity:
        raise Refused(f"{path} has changed meanwhile")
    formats = Counter(weight.format for weight in found)
    documents = [result.json() for result in results]
    return kept.store(state_dir, opened.identity, opened.path, formats, documents)


@contextmanager
def _unwatched(total: int) -> Iterator[Callable[[int], None]]:
    yield lambda part: None


def find(path: Path, state_dir: Path) -> dict[str, Any]:
    """What was found of the checkpoint at `path`, as it is now. Raises Refused where it was not
    looked at, and ValueError for what is no whole checkpoint."""
    from ..probes.models import checkpoint

    record = kept.load(state_dir, checkpoint.open_checkpoint(path).identity)
    if record is None:
        raise Refused(
            f"{path} was not checked as it is now; run fp4tune check-weights {path} "
            f"with the state directory {state_dir}"
        )
    return record


def exit_code(record: Mapping[str, Any]) -> int:
    """0 all conditions hold, 1 some are broken, 2 some could not be assessed."""
    found = {each["status"] for each in record["conditions"]}
    if "broken" in found:
        return UNSAFE
    return NOT_ASSESSED if "not assessed" in found else SAFE


def assess(
    record: Mapping[str, Any],
    conditions: Iterable[Mapping[str, str]],
    format_: str,
    out_dtype: str,
) -> dict[str, Any]:
    """A verdict's conditions for one checkpoint.

    ``status`` is ``broken`` where it breaks one, or what every verdict takes for granted of
    weights; ``open`` where one that is about weights was not assessed; else ``holds``. The
    conditions come back with a ``status`` each.
    """
    known = {
        each["id"]: each
        for each in record["conditions"]
        if each["out_dtype"] in (None, out_dtype)
    }  # fmt: skip
    about = {each["id"] for each in record["conditions"]}
    told = [{**each, **_condition_status(each["id"], known, about)} for each in conditions]
    mine = {each["id"] for each in told}
    for each in known.values():
        # Of all weights, whatever the backend: nothing was proven of data that breaks these.
        if each.get("always") and each["id"] not in mine and each["status"] != "not applicable":
            told.append(
                {
                    "id": each["id"],
                    "text": each["text"],
                    **_condition_status(each["id"], known, about),
                }
            )
    found = {each["status"] for each in told}
    status = "broken" if "broken" in found else "open" if "not assessed" in found else "holds"
    if not record["formats"].get(format_):
        status = "open"
    return {
        "checkpoint": record["checkpoint"],
        "at": record["at"],
        "weights": record["formats"].get(format_, 0),
        "status": status,
        "conditions": told,
    }


def _condition_status(
    name: str, known: Mapping[str, Mapping[str, Any]], about: Iterable[str]
) -> dict[str, Any]:
    if name not in known:
        return {"status": "not assessed" if name in about else NOT_WEIGHTS, "first": []}
    status = known[name]["status"]
    # A condition that none of these weights can meet or break was not looked at.
    return {
        "status": "not assessed" if status == "not applicable" else status,
        "first": known[name]["first"],
    }


def lines(assessed: Mapping[str, Any]) -> list[str]:
    """`assess` in words."""
    path = assessed["checkpoint"]
    if not assessed["weights"]:
        return [f"{path}: no weights of this format were checked there"]
    found = []
    for each in assessed["conditions"]:
        if each["status"] == NOT_WEIGHTS:
            found.append(f"{each['text']}: for the engine to keep to, no matter which checkpoint")
            continue
        line = f"{each['text']}: {each['status']} in {path}"
        if each["first"]:
            line += f" ({each['first'][0]['tensor']}: {each['first'][0]['found']})"
        found.append(line)
    return found


def report(record: Mapping[str, Any]) -> list[str]:
    """All of what was found of a checkpoint, one condition a line."""
    formats = ", ".join(f"{count} {name}" for name, count in sorted(record["formats"].items()))
    out = [f"{record['checkpoint']}: FP4 weights: {formats}"]
    for each in record["conditions"]:
        dtype = f" ({each['out_dtype']} outputs)" if each["out_dtype"] else ""
        line = f"{each['status']}: {each['text']}{dtype}"
        if each["status"] == "holds":
            line += f", in {each['checked']} tensors"
        elif each["status"] == "broken":
            line += f", in {each['broken']} of {each['checked']} tensors"
        elif each["reason"]:
            line += f": {each['reason']}"
        out.append(line)
        out += [f"    {first['tensor']}: {first['found']}" for first in each["first"]]
        more = each["broken"] - len(each["first"])
        if more > 0:
            out.append(f"    and {more} more")
    return out
