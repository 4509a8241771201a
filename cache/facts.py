"""What engines are answered on this node, summed up for inventories and health checks.

Through the reader only: the standard library, some milliseconds, and no right to write. Also
``python -m fp4tune.cache.facts``, which is ``fp4tune facts`` without the imports of the command
line, for whoever calls it often.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter

from .. import __version__
from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused, printable
from ..machine import driver as asking
from ..machine import files
from . import reader
from .errors import Missing, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

ANSWERS = ("safe", "stale", "unproven", "quarantined")
"""What a reader may answer, from good to bad."""
MISSING, UNREADABLE = "missing", "unreadable"
EXIT = {
    "safe": SAFE,
    "unproven": UNSAFE,
    "quarantined": UNSAFE,
    "stale": NOT_ASSESSED,
    MISSING: NOT_ASSESSED,
    UNREADABLE: NOT_ASSESSED,
}
"""The exit code of each status: measured and nothing safe is 1, nothing that still holds is 2."""
DRIVER = "/sys/module/nvidia/version"
"""Where the kernel says which NVIDIA driver is loaded."""


def gather(
    state_dir: str | os.PathLike[str] | None = None,
    gpu: str | None = None,
    profile: str | None = None,
    driver: str = DRIVER,
) -> dict[str, Any]:
    """The facts of this node, as JSON holds them. Never raises for what the state is like.

    status       the worst answer to any bucket that was published (`ANSWERS`), ``missing`` where
                 there is none, ``unreadable`` where the file cannot be trusted
    reason       one sentence
    state        the directory that was read, None without one
    generation   0 without one; published: seconds since 1970, or None
    driver       the NVIDIA driver that is loaded, None without one
    quarantines  how many entries there are
    scopes       for each arch, gpu and profile: status, `layers` (different n and k), `answers`
                 (status to number of buckets) and `backends` (name to number of buckets it is
                 the answer to)

    `gpu` (the model's name) and `profile` leave out the others. An answer is ``stale`` here also
    where its evidence was made under another driver than the one in the file `driver`: the reader
    itself compares files only.
    """
    facts: dict[str, Any] = {
        "status": MISSING,
        "reason": "",
        "fp4tune": __version__,
        "state": None if state_dir is None else os.path.abspath(state_dir),
        "generation": 0,
        "published": None,
        "driver": _first_line_of_file(driver),
        "quarantines": 0,
        "scopes": [],
    }
    try:
        loaded = reader.open(state_dir)
        facts["state"] = os.path.dirname(os.path.abspath(loaded.path or ""))
        facts["generation"] = loaded.generation
        facts["published"] = loaded.meta.get("published")
        facts["quarantines"] = len(loaded.quarantines)
        rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in loaded.rows("choice"):
            if gpu in (None, row["gpu"]) and profile in (None, row["profile"]):
                rows.setdefault((row["arch"], row["gpu"], row["profile"]), []).append(row)
        older = _of_another_driver(loaded.rows("environment"), facts["driver"])
        facts["scopes"] = [
            _scope(str(loaded.path), loaded.generation, key, rows[key], older)
            for key in sorted(rows)
        ]
    except Missing as error:
        facts["reason"] = str(error)
        return facts
    except StateError as error:
        return {**facts, "status": UNREADABLE, "reason": str(error)}
    if not facts["scopes"]:
        asked = [f"{name} {value}" for name, value in (("gpu", gpu), ("profile", profile)) if value]
        facts["reason"] = f"no choices are published for {' and '.join(asked) or 'anything'}"
        return facts
    total: Counter[str] = Counter()
    for scope in facts["scopes"]:
        total.update(scope["answers"])
    facts["status"] = _worst_answer(total)
    facts["reason"] = f"{total['safe']} of {sum(total.values())} buckets have a safe choice"
    if facts["status"] == "stale" and older:
        facts["reason"] += f"; the driver is {facts['driver']} now, and was another"
    return facts


def ask_driver() -> None:
    """See that the NVIDIA driver answers, where there is one: what is published for a GPU says
    nothing of a node whose driver hangs. Raises DriverSilent."""
    with contextlib.suppress(asking.NvmlError):
        asking.ask_once("gpus")


def _scope(
    path: str,
    generation: int,
    key: tuple[str, str, str],
    rows: Sequence[dict[str, Any]],
    older: set[str],
) -> dict[str, Any]:
    arch, gpu, profile = key
    mine = reader.open(path, generation=generation, arch=arch, gpu=gpu, profile=profile)
    answers = dict.fromkeys(ANSWERS, 0)
    backends: Counter[str] = Counter()
    for row in rows:
        decision = mine.choose(
            row["m_lo"], row["n"], row["k"], row["format"], row["activation"], row["out_dtype"],
            row["groups"],
        )  # fmt: skip
        status = decision.status
        if status == "safe" and decision.fingerprint in older:
            status = "stale"
        answers[status] += 1
        if status == "safe":
            backends[decision.backend] += 1
    return {
        "arch": arch,
        "gpu": gpu,
        "profile": profile,
        "status": _worst_answer(answers),
        "layers": len({(row["n"], row["k"]) for row in rows}),
        "answers": answers,
        "backends": dict(sorted(backends.items())),
    }


def _worst_answer(answers: dict[str, int]) -> str:
    return next(status for status in reversed(ANSWERS) if answers.get(status) or status == "safe")


def _of_another_driver(rows: Sequence[dict[str, Any]], loaded: str | None) -> set[str]:
    """Fingerprints of evidence that was made on a GPU under another driver than `loaded`."""
    if loaded is None:
        return set()
    found = set()
    for row in rows:
        facts = row["facts"] if isinstance(row["facts"], dict) else {}
        device = facts.get("device")
        then = device.get("driver") if isinstance(device, dict) else None
        if then is not None and then != loaded:
            found.add(row["fingerprint"])
    return found


def _first_line_of_file(path: str) -> str | None:
    try:
        with files.opened(path) as file:
            return file.readline(256).decode("ascii", "replace").strip() or None
    except OSError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m fp4tune.cache.facts``; the options of ``fp4tune facts``."""
    import argparse

    from . import facts_text

    parser = argparse.ArgumentParser("fp4tune facts", description=__doc__, allow_abbrev=False)
    parser.add_argument("--format", default="text", choices=facts_text.FORMATS)
    parser.add_argument("--out")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--profile")
    parser.add_argument("--expires", type=float, default=facts_text.EXPIRES)
    parser.add_argument("--state")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    try:
        if asked.check:
            ask_driver()
        facts = gather(asked.state, asked.gpu, asked.profile)
        form = "json" if asked.json else "line" if asked.check else asked.format
        facts_text.put(facts_text.render(facts, form, expires=asked.expires), asked.out)
    except (StateError, Refused, ValueError) as error:
        print(printable(f"fp4tune: {error}"), file=sys.stderr)
        return NOT_ASSESSED
    return EXIT[facts["status"]] if asked.check else SAFE


if __name__ == "__main__":
    sys.exit(main())
