"""The facts of a node in the forms that its conventions ask for. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import time

from ..errors import printable
from ..machine import files
from ..words import STATUS_WORDS, UNREADABLE
from .errors import StateError, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

FORMATS = ("text", "ansible", "nfd", "textfile")
EXPIRES = 3600.0
"""Seconds after which Node Feature Discovery drops the labels, unless they are written again."""
NAMESPACE = "feature.node.kubernetes.io"
_LABEL = 200
"""Characters of a metric's label: a scrape with longer ones may be dropped as a whole."""
METRICS = (
    ("fp4tune_reader_info", "The fp4tune that wrote this", ("version",)),
    ("fp4tune_reader_readable", "1 where a reader could load what is published", ()),
    ("fp4tune_reader_generation", "The generation a reader loads, 0 without one", ()),
    ("fp4tune_reader_published_timestamp_seconds", "When that was published, 0 without one", ()),
    ("fp4tune_reader_quarantines", "Quarantines a reader applies", ()),
    (
        "fp4tune_reader_status",
        "1 for what this node is: SAFE, STALE, UNPROVEN, QUARANTINED or DAMAGED",
        ("status",),
    ),
    (
        "fp4tune_reader_answers",
        "Buckets by what a reader answers",
        ("arch", "gpu", "profile", "status"),
    ),
)
"""Name, help and labels of every metric in the textfile. All are gauges."""


def render(facts: dict[str, Any], form: str, expires: float = EXPIRES) -> str:
    """`facts` of `facts.gather` as one of `FORMATS`, or ``json`` or ``line``; ends in a newline.

    Raises ValueError for another `form`, or an `expires` that is not positive.
    """
    if not 0 < expires < 1e9:
        raise ValueError(f"--expires {expires:g}: it is more than 0 and less than 1e9 seconds")
    if form == "json":
        return _json_line(facts, 2)
    if form == "ansible":
        return _json_line(facts, None)
    if form == "line":
        return line(facts) + "\n"
    if form == "text":
        return "".join(f"{text}\n" for text in text_lines(facts))
    if form == "nfd":
        return "".join(f"{text}\n" for text in _nfd(facts, time.time() + expires))
    if form == "textfile":
        return "".join(f"{text}\n" for text in _textfile(facts))
    raise ValueError(f"there is no format {form!r}; there are {', '.join(FORMATS)}")


def text_lines(facts: dict[str, Any]) -> list[str]:
    """What people read: the status, and a line for each scope."""
    return [*headline(facts), *(printable(_scope_line(scope)) for scope in facts["scopes"])]


def headline(facts: dict[str, Any]) -> list[str]:
    """What every command begins with: the status, since when and why; a store of another host and
    a ledger that cannot be read; and what to do now."""
    number = f"generation {facts['generation']} in " if facts["generation"] else ""
    place = f" ({number}{facts['state']})" if facts["generation"] else ""
    lines = [f"{said(facts)}{place}"]
    if facts.get("elsewhere"):
        lines.append(facts["elsewhere"])
    if facts.get("ledger"):
        lines.append(f"{STATUS_WORDS[UNREADABLE]} ledger: {facts['ledger']}")
    if facts.get("do"):
        lines.append(f"now: {facts['do']}")
    return [printable(text) for text in lines]


def said(status: dict[str, Any]) -> str:
    """The status of a node, a scope or a layer with its reason, in a line."""
    since = f" since {when(status['since'])}" if status.get("since") else ""
    return printable(f"{STATUS_WORDS[status['status']]}{since}: {status['reason']}")


def when(at: float) -> str:
    """Seconds since 1970 as UTC to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))
    except (TypeError, ValueError, OverflowError, OSError):
        return printable(at)


def line(facts: dict[str, Any]) -> str:
    """One line that starts with the status, for programs: Slurm's scripts read it."""
    number = f"generation {facts['generation']}: " if facts["generation"] else ""
    return printable(f"{facts['status']}: {number}{facts['reason']}")


def _json_line(facts: dict[str, Any], indent: int | None) -> str:
    return json.dumps(facts, indent=indent).replace("\x7f", "\\u007f") + "\n"


def _scope_line(scope: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in scope["answers"].items() if count)
    names = ", ".join(f"{name} {count}" for name, count in scope["backends"].items())
    where = f"{scope['gpu']} ({scope['arch']}), {scope['profile']}"
    return f"{where}: {scope['layers']} layers; {counts}" + (f"; {names}" if names else "")


def label(text: str) -> str:
    """`text` as the value of a Kubernetes label: at most 63 of ``[A-Za-z0-9-_.]``, with a letter
    or digit at both ends."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in text)
    return plain[:63].strip("-_.")


def _nfd(facts: dict[str, Any], until: float) -> Iterator[str]:
    """A features file. Labels of a profile hold the worst over the GPU models of the node."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(until))
    yield f"# +expiry-time={stamp}"
    values = {
        "status": facts["status"],
        "ready": "true" if facts["status"] == "safe" else "false",
        "generation": str(facts["generation"]),
        "version": facts["fp4tune"],
    }
    bad = ("quarantined", "unproven", "stale", "safe")
    for scope in facts["scopes"]:
        name = f"profile-{label(scope['profile'])}"
        values[name] = min(values.get(name, "safe"), scope["status"], key=bad.index)
    for name, value in values.items():
        yield f"{NAMESPACE}/fp4tune.{name}={label(value)}"


def _textfile(facts: dict[str, Any]) -> Iterator[str]:
    values: dict[str, list[tuple[tuple[str, ...], float]]] = {
        "fp4tune_reader_info": [((facts["fp4tune"],), 1)],
        "fp4tune_reader_readable": [((), float(facts["generation"] > 0))],
        "fp4tune_reader_generation": [((), facts["generation"])],
        "fp4tune_reader_published_timestamp_seconds": [((), facts["published"] or 0)],
        "fp4tune_reader_quarantines": [((), facts["quarantines"])],
        "fp4tune_reader_status": [
            ((word,), float(word == STATUS_WORDS[facts["status"]]))
            for word in dict.fromkeys(STATUS_WORDS.values())
        ],
        "fp4tune_reader_answers": [
            ((scope["arch"], scope["gpu"], scope["profile"], status), count)
            for scope in facts["scopes"]
            for status, count in scope["answers"].items()
        ],
    }
    for name, help_, labels in METRICS:
        yield f"# HELP {name} {help_}."
        yield f"# TYPE {name} gauge"
        for given, value in values[name]:
            pairs = ",".join(f'{k}="{_quoted(v)}"' for k, v in zip(labels, given, strict=True))
            yield f"{name}{{{pairs}}} {value!r}" if pairs else f"{name} {value!r}"


def _quoted(value: str) -> str:
    value = printable(value, _LABEL)
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def put(text: str, out: str | os.PathLike[str] | None = None) -> None:
    """Print `text`, or put it into the file `out` by a rename: whoever reads the file sees all of
    the old or all of the new. Raises StateError."""
    if out is None:
        sys.stdout.write(text)
        return
    place = os.path.abspath(out)
    if files.is_special(place):
        raise StateError(place, "this cannot be written: it is no regular file")
    # A leading dot, and another ending: neither NFD nor node_exporter takes it for theirs.
    # Its name cannot be foreseen, and nothing that is there already is written to: others may be
    # able to make files in that folder.
    beside = os.path.join(
        os.path.dirname(place), f".{os.path.basename(place)}.{os.urandom(6).hex()}.writing"
    )
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(fd, 0o644)
                os.fsync(fd)
            os.rename(beside, place)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise translate(error, place) from None
