"""How often a layer is called with which m: what a choice made once for all m is weighted by.

A distribution is an assumption about an engine's work, not a measurement. The built-in ones are
plain on purpose; a deployment that knows its own gives a file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...machine import files
from ..verdict.buckets import MAX_M

_DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PREFILL = (512, 1024, 2048, 4096)
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Traffic:
    """`weights` are (m, share of the calls): m ascending, shares above 0 that add up to 1."""

    name: str
    weights: tuple[tuple[int, float], ...]

    def json(self) -> dict[str, Any]:
        """As `traffic_of` takes it."""
        return {"name": self.name, "weights": {str(m): share for m, share in self.weights}}


def traffic_of(name: object, weights: Mapping[Any, Any]) -> Traffic:
    """A distribution from m -> weight; weights are relative, so counts of calls will do.

    Raises ValueError, one sentence, for what is none: no m, an m that is not a whole number from
    1 to 65536, a weight that is negative or not finite, or nothing above 0.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise ValueError("the name of a traffic is 1 to 64 printable characters")
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"traffic {name!r}: weights are a table of m to weight, with one m or more"
        )
    found: dict[int, float] = {}
    for key, weight in weights.items():
        m = int(key) if str(key).isascii() and str(key).isdecimal() and len(str(key)) < 8 else 0
        if not 1 <= m <= MAX_M:
            raise ValueError(f"traffic {name!r}: m={str(key)[:20]!r} is not one from 1 to {MAX_M}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"traffic {name!r}: the weight of m={m} is not a number")
        if m in found:
            raise ValueError(f"traffic {name!r}: m={m} is there twice")
        try:
            found[m] = float(weight)
        except OverflowError:
            found[m] = math.inf
        if not (math.isfinite(found[m]) and found[m] >= 0):
            raise ValueError(f"traffic {name!r}: the weight of m={m} is negative or not finite")
    largest = max(found.values())
    if not largest > 0:
        raise ValueError(f"traffic {name!r}: no weight is above 0")
    # By the largest first: the sum of finite numbers may not be one.
    scaled = {m: weight / largest for m, weight in sorted(found.items())}
    total = math.fsum(scaled.values())
    shares = ((m, weight / total) for m, weight in scaled.items())
    return Traffic(name, tuple((m, share) for m, share in shares if share > 0))


def _mixed() -> dict[int, float]:
    """19 decode calls to one of prefill."""
    decode = {m: 0.95 / len(_DECODE) for m in _DECODE}
    return {**decode, **{m: 0.05 / len(_PREFILL) for m in _PREFILL}}


BUILTIN = {
    traffic.name: traffic
    for traffic in (
        traffic_of("decode", dict.fromkeys(_DECODE, 1)),
        traffic_of("prefill", dict.fromkeys(_PREFILL, 1)),
        traffic_of("mixed", _mixed()),
    )
}


def find(given: str) -> Traffic:
    """A built-in distribution by its name, else the file of that path.

    Raises ValueError, one sentence.
    """
    if given in BUILTIN:
        return BUILTIN[given]
    path = Path(given)
    if not path.is_file():
        names = ", ".join(BUILTIN)
        raise ValueError(f"there is no traffic {given!r}: it is {names} or a JSON or TOML file")
    return load(path)


def load(path: Path) -> Traffic:
    """A distribution from a JSON file, or TOML where the name ends so: ``name`` (the file's own
    without one) and ``weights``, a table of m to weight. Raises ValueError, one sentence."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} has more than {_MOST_BYTES >> 20} MiB: that is no traffic")
        text = files.text(path, _MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    document = _toml(text, path) if path.suffix == ".toml" else _json_object(text, path)
    unknown = set(document) - {"name", "weights"}
    if unknown:
        raise ValueError(
            f"{path}: {min(unknown)!r} is not a key of a traffic: name and weights are"
        )
    try:
        return traffic_of(document.get("name", path.stem), document.get("weights", {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json_object(text: str, path: Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise ValueError("a key is there twice")
        return dict(items)

    try:
        document = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object")
    return document


def _toml(text: str, path: Path) -> dict[str, Any]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        raise ValueError(f"{path}: TOML needs Python 3.11 or tomli; JSON does not") from None
    try:
        return dict(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
