"""What engines are answered on this node, summed up for inventories and health checks.

Through the reader only: the standard library, some milliseconds, and no right to write. Also
``python -m fp4tune.cache.facts``, which is ``fp4tune facts`` without the imports of the command
line, for whoever calls it often.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import sys
from collections import Counter

from .. import __version__
from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused, printable
from ..machine import driver as asking
from ..machine import files
from ..machine.hardware import cpu_name
from ..words import MISSING, UNREADABLE
from . import reader, sqlitefile, state
from .errors import Corrupt, Foreign, Missing, NewerSchema, StateError
from .experts import layer_words, option_text
from .schema import APPLICATION_ID
from .schema import VERSION as LEDGER_VERSION
from .view import changed_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from .decision import Decision
    from .reader import Reader

ANSWERS = ("safe", "stale", "unproven", "quarantined")
"""What a reader may answer, from good to bad."""
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
GPUS = "/proc/driver/nvidia/gpus"
"""Where the driver says which GPUs there are, without being asked through NVML."""
ELSEWHERE = "look at it on its own host; a probe of this one keeps to a state of its own"
"""What to do with the store of another host: a probe with that ``--state`` would take its place."""
_MOST_SHAPES = 8
"""Of a command that is given to be copied."""


def gather(
    state_dir: str | os.PathLike[str] | None = None,
    gpu: str | None = None,
    profile: str | None = None,
    driver: str = DRIVER,
    gpus: str = GPUS,
) -> dict[str, Any]:
    """The facts of this node, as JSON holds them. Never raises for what the state is like. What to
    do is said with ``--state`` where a place was named.

    status       the worst answer to any bucket that was published (`ANSWERS`), ``missing`` where
                 there is none, ``unreadable`` where the file cannot be trusted
    since        when it became so, seconds since 1970; None where that is not known
    reason       one sentence
    do           what to do now, in a sentence or a command; empty where there is nothing to do
    state        the directory that was read, None without one
    generation   0 without one; published: seconds since 1970, or None
    driver       the NVIDIA driver that is loaded, None without one
    quarantines  how many entries there are
    elsewhere    why this is not the host that it was published on, None where it may be
    ledger       what is wrong with the ledger, None where nothing shows or there is none
    scopes       for each arch, gpu and profile: status, `layers` (different n and k), `answers`
                 (status to number of buckets), `backends` (name to number of buckets it is
                 the answer to) and `by_layer`: status, since, reason and do of each

    `gpu` (the model's name) and `profile` leave out the others. An answer is ``stale`` here also
    where its evidence was made under another driver than the one in the file `driver`: the reader
    itself compares files only.
    """
    facts = _gathered(state_dir, gpu, profile, driver, gpus)
    if state_dir is not None:
        layers = [layer for scope in facts["scopes"] for layer in scope["by_layer"]]
        for said in (facts, *facts["scopes"], *layers):
            said["do"] = at_place(said["do"], state_dir)
    return facts


def at_place(do: str, state_dir: str | os.PathLike[str] | None) -> str:
    """What to do, with ``--state`` where that is a command of ours and a place was named."""
    if state_dir is None or not do.startswith("fp4tune "):
        return do
    return f"{do} --state {shlex.quote(os.fspath(state_dir))}"


def _gathered(
    state_dir: str | os.PathLike[str] | None,
    gpu: str | None,
    profile: str | None,
    driver: str,
    gpus: str,
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "status": MISSING,
        "since": None,
        "reason": "",
        "do": "fp4tune probe",
        "fp4tune": __version__,
        "state": None if state_dir is None else os.path.abspath(state_dir),
        "generation": 0,
        "published": None,
        "driver": _first_line_of_file(driver),
        "quarantines": 0,
        "elsewhere": None,
        "ledger": None if state_dir is None else _damage_in_header(os.path.abspath(state_dir)),
        "scopes": [],
    }
    try:
        loaded = reader.open(state_dir)
        facts["state"] = os.path.dirname(os.path.abspath(loaded.path or ""))
        facts["ledger"] = _damage_in_header(facts["state"])
        facts["generation"] = loaded.generation
        facts["published"] = loaded.meta.get("published")
        facts["quarantines"] = len(loaded.quarantines)
        rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in loaded.rows("choice"):
            if gpu in (None, row["gpu"]) and profile in (None, row["profile"]):
                rows.setdefault((row["arch"], row["gpu"], row["profile"]), []).append(row)
        facts["elsewhere"] = _elsewhere(rows, loaded.meta.get("devices"), facts["driver"], gpus)
        looked = _Look(loaded, facts["driver"], driver)
        facts["scopes"] = [_scope(looked, key, rows[key]) for key in sorted(rows)]
    except Missing as error:
        facts["reason"] = str(error)
        return facts
    except StateError as error:
        return {**facts, "status": UNREADABLE, "reason": str(error), **_damaged(error)}
    if not facts["scopes"]:
        asked = [f"{name} {value}" for name, value in (("gpu", gpu), ("profile", profile)) if value]
        facts["reason"] = f"no choices are published for {' and '.join(asked) or 'anything'}"
        return facts
    total: Counter[str] = Counter()
    for scope in facts["scopes"]:
        total.update(scope["answers"])
    facts["status"] = _worst_answer(total)
    facts["reason"] = _safe_of_all(total)
    same = [s for s in facts["scopes"] if s["status"] == facts["status"]]
    facts["since"] = min((s["since"] for s in same if s["since"] is not None), default=None)
    first = next((x for s in same for x in s["by_layer"] if x["status"] == facts["status"]), None)
    if first is not None and first["why"]:
        facts["reason"] += f"; {layer_words(first)}: {first['why']}"
    facts["do"] = next((s["do"] for s in same if s["do"]), "")
    if facts["elsewhere"] and facts["status"] == "stale":
        _as_of_elsewhere(facts, [row for group in rows.values() for row in group])
    if facts["ledger"] and not facts["do"]:
        facts["do"] = (
            f"move {os.path.join(facts['state'], state.LEDGER)} away: the next probe measures anew"
        )
    return facts


def _as_of_elsewhere(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Say of everything that is stale here only since this is another host what it was there; a
    probe of this host is none for the place of that one."""
    layers = [layer for scope in facts["scopes"] for layer in scope["by_layer"]]
    names = ("format", "activation", "out_dtype", "groups", "n", "k")
    for said in (facts, *layers):
        mine = [r for r in rows if said is facts or all(r[n] == said[n] for n in names)]
        then = [row["status"] for row in mine]
        had = _safe_of_all({"safe": sum(s != "none" for s in then), "": then.count("none")})
        if said["status"] == "stale":
            said["reason"] = f"{had.replace('have', 'had')} when it was published; not so here"
            if said is not facts:
                said["why"] = "this is another host"
    for said in (facts, *facts["scopes"], *layers):
        said["do"] = ELSEWHERE if said["status"] == "stale" else said["do"]


def of_layer(
    facts: dict[str, Any], shape: tuple[str, str, str, int, int, int], profile: str | None = None
) -> dict[str, Any] | None:
    """What `gather` says of one layer (format, activation, out_dtype, groups, n, k); None where
    several GPU models or profiles have it, or none has."""
    names = ("format", "activation", "out_dtype", "groups", "n", "k")
    found = [
        layer
        for scope in facts["scopes"]
        if profile in (None, scope["profile"])
        for layer in scope["by_layer"]
        if tuple(layer[name] for name in names) == shape
    ]
    return found[0] if len(found) == 1 else None


def ask_driver() -> None:
    """See that the NVIDIA driver answers, where there is one: what is published for a GPU says
    nothing of a node whose driver hangs. Raises DriverSilent."""
    with contextlib.suppress(asking.NvmlError):
        asking.ask_once("gpus")


class _Look:
    """What one look at a publication needs: its reader, what it rests on, and what has changed."""

    def __init__(self, loaded: Reader, driver: str | None, driver_file: str) -> None:
        self.path = str(loaded.path)
        self.generation = loaded.generation
        self.published = loaded.meta.get("published")
        self.quarantines = loaded.quarantines
        self.driver = driver
        self.older = _of_another_driver(loaded.rows("environment"), driver)
        stamps = loaded.rows("stamp")
        self.changed = changed_files(
            (r["fingerprint"], r["path"], r["inode"], r["size"], r["mtime_ns"]) for r in stamps
        )
        self._driver_file = driver_file

    def since(self, row: dict[str, Any], decision: Decision, status: str) -> float | None:
        """When a bucket's answer became what it is; seconds since 1970, None if that is unknown."""
        if status == "stale":
            return _changed_at(self.changed.get(str(decision.fingerprint)) or self._driver_file)
        if status == "quarantined":
            return max((q.at for q in self.quarantines if q.covers(row)), default=None)
        return self.published


def _scope(
    look: _Look, key: tuple[str, str, str], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    arch, gpu, profile = key
    mine = reader.open(look.path, generation=look.generation, arch=arch, gpu=gpu, profile=profile)
    answers = dict.fromkeys(ANSWERS, 0)
    backends: Counter[str] = Counter()
    layers: dict[tuple[Any, ...], list[tuple[dict[str, Any], str, float | None, str]]] = {}
    for row in rows:
        shape = (row["format"], row["activation"], row["out_dtype"], row["groups"])
        decision = mine.choose(row["m_lo"], row["n"], row["k"], *shape)
        status, reason = decision.status, decision.reason
        if status == "safe" and decision.fingerprint in look.older:
            status, reason = "stale", f"the driver is {look.driver} now, and was another"
        answers[status] += 1
        if status == "safe":
            backends[decision.backend] += 1
        layers.setdefault((*shape, row["n"], row["k"]), []).append(
            (row, status, look.since(row, decision, status), reason)
        )
    by_layer = [_layer_status(key, shape, found) for shape, found in layers.items()]
    status = _worst_answer(answers)
    same = [layer for layer in by_layer if layer["status"] == status]
    return {
        "arch": arch,
        "gpu": gpu,
        "profile": profile,
        "status": status,
        "since": min((each["since"] for each in same if each["since"] is not None), default=None),
        "do": same[0]["do"] if status == "unproven" and same else _do(status, key, same),
        "layers": len({(row["groups"], row["n"], row["k"]) for row in rows}),
        "answers": answers,
        "backends": dict(sorted(backends.items())),
        "by_layer": by_layer,
    }


def _layer_status(
    scope: tuple[str, str, str],
    shape: tuple[Any, ...],
    found: Sequence[tuple[dict[str, Any], str, float | None, str]],
) -> dict[str, Any]:
    """One layer's status, from its buckets: row, status, since when, why."""
    counted = Counter(status for _, status, _, _ in found)
    status = _worst_answer(counted)
    mine = [each for each in found if each[1] == status]
    names = ("format", "activation", "out_dtype", "groups", "n", "k")
    layer: dict[str, Any] = dict(zip(names, shape, strict=True))
    why = "" if status == "safe" else next((reason for *_, reason in mine if reason), "")
    layer |= {
        "status": status,
        "since": min((since for _, _, since, _ in mine if since is not None), default=None),
        "reason": _safe_of_all(counted) + (f"; {why}" if why else ""),
        "why": why,
    }
    layer["do"] = _do(status, scope, [layer], max(row["m_hi"] for row, *_ in mine))
    return layer


def _safe_of_all(answers: dict[str, int]) -> str:
    total = sum(answers.values())
    return f"{answers.get('safe', 0)} of {total} bucket{'s' * (total != 1)} have a safe choice"


def _do(
    status: str, scope: tuple[str, str, str], layers: Sequence[dict[str, Any]], m: int = 1
) -> str:
    """What mends that status of these layers, as a command to copy; empty where all is well."""
    if status == "safe" or not layers:
        return ""
    if status == "quarantined":
        return "fp4tune quarantine list"
    if status == "unproven":
        one = layers[0]
        kind = "" if one["format"] == "nvfp4" else f" --format {one['format']}"
        if experts := option_text(one):
            return f"fp4tune explain {m} --experts {experts}{kind}"
        kind += "" if one["activation"] == "bf16" else f" --activation {one['activation']}"
        return f"fp4tune explain {m} {one['n']} {one['k']}{kind}"
    return probe_command(scope, layers)


def probe_command(scope: tuple[str, str, str], layers: Iterable[dict[str, Any]]) -> str:
    """The probe that measures these layers anew, as far as a line has room for them."""
    arch, _, profile = scope
    shapes = list(dict.fromkeys(_shape_option(layer) for layer in layers))
    words = ["fp4tune probe", *(["--gpu none"] if arch == "cpu" else ()), f"--profile {profile}"]
    return " ".join([*words, *shapes[:_MOST_SHAPES]])


def _shape_option(layer: dict[str, Any]) -> str:
    """How a probe is asked for a layer."""
    experts = option_text(layer)
    if experts is None:
        return f"--shape {layer['n']},{layer['k']}"
    kind = "" if layer["format"] == "nvfp4" else f" --format {layer['format']}"
    return f"--experts {experts}{kind}"


def _damaged(error: StateError) -> dict[str, Any]:
    """Since when a choices.db cannot be read, and what to do about it."""
    if isinstance(error, NewerSchema):
        do = "run the fp4tune that wrote it, or name another state with --state"
    elif isinstance(error, Corrupt):
        do = "fp4tune probe"
    else:
        do = f"move {error.path} away, or name another state with --state"
    return {"since": _changed_at(error.path), "do": do}


def _damage_in_header(place: str) -> str | None:
    """What is wrong with the ledger of `place` by its header, in a sentence. None where nothing
    shows, or where there is none: engines need none."""
    try:
        sqlitefile.inspect(
            os.path.join(place, state.LEDGER), APPLICATION_ID, LEDGER_VERSION, "ledger"
        )
    except (Corrupt, Foreign, NewerSchema) as error:
        return str(error)
    except StateError:
        return None  # not there, or its owner's alone to read
    return None


def _elsewhere(
    scopes: Iterable[tuple[str, str, str]], devices: object, driver: str | None, gpus: str
) -> str | None:
    """Why this cannot be the host that these choices were published on; None where it may be.

    By what tells hosts apart from a container as well as from outside: the kernel's driver, the
    models and UUIDs of the GPUs, the model of the CPU.
    """
    named = [(arch, gpu) for arch, gpu, _ in scopes]
    models = sorted({gpu for arch, gpu in named if arch != "cpu"})
    if not models:
        cpus = {gpu for arch, gpu in named if arch == "cpu"}
        here = cpu_name()
        if not cpus or here in cpus:
            return None
        return f"this is another host: it was published for {min(cpus)}, and this CPU is {here}"
    said = f"this is another host: it was published for {', '.join(models)}, and"
    if driver is None:
        # A host of that kind may have CPU choices, too; then its CPU is this one.
        return None if ("cpu", cpu_name()) in named else f"{said} no NVIDIA driver is loaded here"
    there = _gpus(gpus)
    plain = {_letters_of_model(model) for model, _ in there}
    if plain and not plain & {_letters_of_model(model) for model in models}:
        return f"{said} the GPUs here are {', '.join(sorted({m for m, _ in there}))}"
    uuids = {uuid for _, uuid in there if uuid and "?" not in uuid}
    known = {u for u in devices if isinstance(u, str)} if isinstance(devices, list) else set()
    if uuids and known and not uuids & known:
        return f"{said} the GPUs here are others of that model"
    return None


def _gpus(folder: str) -> list[tuple[str, str]]:
    """(model, UUID) of every GPU that the driver lists in /proc; empty where it lists none."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "information"))):
        said: dict[str, str] = {}
        with contextlib.suppress(OSError), files.opened(path) as file:
            for line in file.read(8192).decode("utf-8", "replace").splitlines():
                name, _, value = line.partition(":")
                said[name.strip()] = value.strip()
        if said.get("Model"):
            found.append((said["Model"], said.get("GPU UUID", "")))
    return found


def _letters_of_model(model: str) -> str:
    return "".join(model.lower().split()).removeprefix("nvidia")


def _changed_at(path: object) -> float | None:
    """When a file was changed, or its folder where it is gone; seconds since 1970."""
    for place in (str(path), os.path.dirname(str(path))):
        with contextlib.suppress(OSError):
            return os.stat(place).st_mtime
    return None


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
    parser.add_argument("--format", choices=facts_text.FORMATS)
    parser.add_argument("--out")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--profile")
    parser.add_argument("--expires", type=float)
    parser.add_argument("--state")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    try:
        if asked.format and (asked.check or asked.json):
            other = "--check" if asked.check else "--json"
            raise Refused(f"--format is one form and {other} another: name one of them")
        if asked.expires is not None and asked.format != "nfd":
            raise Refused("--expires is how long labels of --format nfd hold")
        if asked.check:
            ask_driver()
        facts = gather(asked.state, asked.gpu, asked.profile)
        form = "json" if asked.json else "line" if asked.check else asked.format or "text"
        expires = facts_text.EXPIRES if asked.expires is None else asked.expires
        facts_text.put(facts_text.render(facts, form, expires=expires), asked.out)
    except (StateError, Refused, ValueError) as error:
        print(printable(f"fp4tune: {error}"), file=sys.stderr)
        return NOT_ASSESSED
    return EXIT[facts["status"]] if asked.check else SAFE


if __name__ == "__main__":
    sys.exit(main())
