"""``fp4tune reproduce``: a finding's launch again, by an ordinary worker; and as a bundle.

What is replayed comes from the ledger as plain data: names in it are looked up among what is
installed, and nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cache.errors import StateError
from ..cache.ledger import Ledger
from ..cache.rows import Finding
from ..errors import NOT_ASSESSED, SAFE, UNSAFE, Refused, printable
from ..machine.devices import Target
from ..probes import bundle, registry
from ..probes.check import tilemap
from ..probes.grouped.problem import is_grouped, of_fields
from ..probes.launch.case import Launch
from ..probes.problem import Problem
from ..probes.worker.supervisor import WorkerFailed
from ..words import COLLECTIVE
from .asking import survey
from .environment import environment_of
from .evidence.wording import describe
from .retest import summary
from .runner import SILENCE, Patience, Progress, Runner

REPRODUCED, GONE, OTHERWISE, UNABLE = (
    "reproduced",
    "not reproduced",
    "failed otherwise",
    "not assessed",
)
TIMES = 20
"""How often the launch is made again."""
_COMMANDS = ("grade", "family", "regime")
_ENDED = ("crash", "hang", "poisoned", "error")


@dataclass(slots=True)
class Result:
    """What became of a replay. `launches` and `failures` are of the finding's own launch."""

    finding: Finding
    outcome: str
    note: str = ""
    launches: int = 0
    failures: int = 0
    rate: tuple[float, float] | None = None
    alone: dict[str, Any] = field(default_factory=dict)
    same_environment: bool | None = None
    bundle: Path | None = None

    @property
    def exit_code(self) -> int:
        codes = {GONE: SAFE, UNABLE: NOT_ASSESSED}
        return codes.get(self.outcome, UNSAFE)

    def json(self) -> dict[str, Any]:
        return {
            "finding": asdict(self.finding),
            "outcome": self.outcome,
            "note": self.note,
            "launches": self.launches,
            "failures": self.failures,
            "rate": self.rate,
            "alone": self.alone,
            "same_environment": self.same_environment,
            "bundle": str(self.bundle) if self.bundle else None,
        }


def find(place: Path, number: int) -> Finding:
    """The finding of this id in the ledger of `place`. Raises Refused, or a StateError."""
    with Ledger.open(place, readonly=True) as ledger:
        for finding in ledger.findings():
            if finding.id == number:
                return finding
        lost = "".join(f"; {sentence}" for sentence in ledger.damage().sentences)
    raise Refused(f"there is no finding {number} in {place}; see fp4tune show --findings{lost}")


def spec_of(finding: Finding, given: str | None) -> str:
    """The backend to load: the one given, else that of the finding's name.

    Raises Refused where the name says too little: the ledger does not keep paths, since nothing
    from it may decide what is run.
    """
    if given is not None:
        if registry.is_file(given):
            registry.known(given)
        return given
    name = finding.backend
    if name in registry.names() or name.startswith("zoo-"):
        return name
    raise Refused(f"no backend here is called {name!r}; name its file with --backend FILE.py:NAME")


@dataclass(frozen=True, slots=True)
class ReplayBackend:
    """What a finding is launched again with: the backend as it is loaded, the interpreter it runs
    in (None for ours), and the seconds of silence that count as a hang (None for the usual)."""

    target: Target
    spec: str
    python: str | None = None
    hang_seconds: float | None = None


def reproduce(
    finding: Finding,
    backend: ReplayBackend,
    progress: Progress,
    times: int = TIMES,
    path: Path | None = None,
) -> Result:
    """Replay `finding` as often as `times` says; write its bundle where `path` says.

    Raises Refused where it cannot be run here.
    """
    target, spec, python = backend.target, backend.spec, backend.python
    hang_seconds = backend.hang_seconds
    problem = _finding_problem(finding)
    answer = survey(target, (spec,), (problem,), python, hang_seconds)[spec]
    why = answer.get("error") or answer["reasons"][0]
    if why:
        raise Refused(f"{finding.backend} cannot run this here: {why}")
    patience = Patience(hang_seconds or SILENCE[target.device.kind])
    runner = Runner(spec, target, patience, python, progress, hello=answer)
    result = Result(finding, UNABLE)
    try:
        runner.build([problem.at(finding.bucket.m_hi), problem], 2)
        fingerprint = environment_of(runner).fingerprint
        result.same_environment = fingerprint == finding.fingerprint
        call = runner.ask("call", spec=spec) if path else None
        _replay(result, runner, problem, times)
    except WorkerFailed as failure:
        raise Refused(f"{finding.backend} could not be started: {failure}") from None
    finally:
        runner.close()
    if path is not None and call is not None:
        source = bundle.CallSource(**call)
        result.bundle = _bundle(finding, problem, target, source, path, python)
    return result


def _finding_problem(finding: Finding) -> Problem:
    """The finding's problem. Raises Refused for what the ledger cannot have meant."""
    try:
        fields = dict(finding.problem)
        return of_fields(fields) if is_grouped(fields) else Problem(**fields)
    except (TypeError, ValueError) as error:
        raise Refused(f"finding {finding.id} holds no problem: {error}") from None


def _bad(finding: Finding) -> dict[str, Any]:
    """The finding as the worker that made it described it."""
    bad = {**finding.detail, "kind": finding.kind, "seed": finding.seed, "data": finding.data}
    return {**bad, "m": finding.problem.get("m")}


def _replay(result: Result, runner: Runner, problem: Problem, times: int) -> None:
    finding = result.finding
    asked = finding.detail.get("asked")
    if "offset" in finding.detail:
        _launch_again(result, runner, problem, times)
    elif isinstance(asked, Mapping) and asked.get("do") in _COMMANDS:
        _command(result, runner, problem, dict(asked))
    elif finding.regime == COLLECTIVE:
        result.note = "sums over two GPUs are made by fp4tune probe --gpu all --again alone"
    else:
        result.note = "the finding does not say which launch failed"


def _launch_again(result: Result, runner: Runner, problem: Problem, times: int) -> None:
    finding = result.finding
    rows = int(finding.detail.get("rows") or problem.m)
    # Routed experts are drawn from the layer's seed; what is dense, from the finding's own.
    runner.open(problem.at(rows), int(finding.detail.get("layer_seed") or 0), 1 << 30)
    budget = {"least": times, "most": times, "seconds": 0.0}
    try:
        again = runner.ask("replay", name=finding.regime, bad=_bad(finding), budget=budget)
    except WorkerFailed as failure:
        _failed(result, failure)
        return
    result.launches, result.failures = again["launches"], again["failures"]
    result.alone = again.get("alone") or {}
    if result.failures:
        result.outcome = REPRODUCED
    elif again.get("not_exercised"):
        result.note = f"{finding.regime} was not exercised: {again['not_exercised']}"
    elif result.launches:
        result.outcome = GONE
    if result.launches:
        result.rate = tuple(summary(result.launches, result.failures)["rate"])


def _command(result: Result, runner: Runner, problem: Problem, asked: dict[str, Any]) -> None:
    """The command in which a worker was lost, once more."""
    try:
        seed, rows = int(asked.pop("seed")), int(asked.pop("rows"))
        do = str(asked.pop("do"))
        runner.open(problem.at(rows), seed, 1 << 30)
        found = runner.ask(do, **asked)
    except WorkerFailed as failure:
        _failed(result, failure)
        return
    except (KeyError, TypeError, ValueError):
        result.note = "the finding does not say what was run"
        return
    items = found["items"] if isinstance(found, dict) else found
    bad = any(i.get("bad") or i.get("error") or i.get("changed_inputs") for i in items)
    result.launches = sum(i.get("launches", 0) for i in items)
    result.outcome = OTHERWISE if bad else GONE
    if not bad:
        result.rate = tuple(summary(1, 0)["rate"])


def _failed(result: Result, failure: WorkerFailed) -> None:
    """A replay that did not come back: the finding itself, another failure, or no answer."""
    result.note = f"{failure.kind}: {failure}"
    if failure.kind == result.finding.kind:
        result.outcome = REPRODUCED
        result.launches = result.failures = 1
    elif failure.kind in _ENDED:
        result.outcome = OTHERWISE


def _bundle(
    finding: Finding,
    problem: Problem,
    target: Target,
    call: bundle.CallSource,
    path: Path,
    python: str | None,
) -> Path:
    """Write what it takes to see the finding without this program."""
    bad = _bad(finding)
    if "offset" not in bad:
        raise Refused("a bundle needs the launch that failed, which this finding does not name")
    own = [bad["seed"], bad["offset"], bad["m"], finding.tactic]
    chain = [list(each) for each in bad.get("chain") or [own]]
    at = int(bad.get("at") or 0)
    chain[at] = own
    seeds = list(dict.fromkeys(int(seed) for seed, *_ in chain))
    pool = problem.at(int(bad.get("rows") or problem.m))
    device = target.device.torch
    draw = None if bad.get("draw") is None else int(bad["draw"])
    cases = [
        bundle.drawn(pool, finding.data, bad.get("width"), seed, device, draw) for seed in seeds
    ]
    launches = [
        Launch(seeds.index(int(seed)), int(offset), int(m), str(tactic), 0)
        for seed, offset, m, tactic in chain
    ]
    texts = {"README.md": readme(finding), "finding.json": json.dumps(asdict(finding), indent=2)}
    tiles = tiles_of(finding)
    if tiles is not None:
        texts["tiles.svg"] = picture(finding, tiles)
    shown = bundle.Shown(
        pool,
        finding.regime,
        finding.kind,
        cases,
        launches,
        at,
        by_tile=bad.get("tile_error") is not None,
        device=target.device.kind,
    )
    return bundle.write(path, shown, call, texts, python)


def tiles_of(finding: Finding) -> tilemap.TileMap | None:
    """The finding's map of wrong tiles; None where it has none, or none that can be read."""
    try:
        return tilemap.unpack_tiles(finding.detail["map"])
    except (KeyError, ValueError):
        return None


def picture(finding: Finding, tiles: tilemap.TileMap) -> str:
    """The tile map of a finding as SVG."""
    title = f"{finding.backend} {finding.tactic}: {finding.kind} in {finding.regime}"
    return tilemap.svg(tiles, printable(title), printable(describe(finding)))


def pictures(findings: Iterable[Finding], folder: Path) -> int:
    """Write the tile map of each finding that has one as ``finding-NUMBER.svg``; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for finding in findings:
        tiles = tiles_of(finding)
        if tiles is not None:
            name = f"finding-{finding.id}.svg"
            (folder / name).write_text(picture(finding, tiles), encoding="utf-8")
            count += 1
    return count


def readme(finding: Finding) -> str:
    """What a bundle says of itself."""
    regime = finding.regime
    mode = bundle.mode_of(regime)
    note = ""
    if mode != regime:
        note = (
            f"\nIt was found in the regime `{regime}`, which plain torch cannot recreate; the "
            f"script runs `{mode}` instead and may show nothing. `fp4tune reproduce` runs the "
            "regime itself.\n"
        )
    p = {name: _as_text(value) for name, value in finding.problem.items()}
    return f"""# {_as_text(finding.backend)}: {_as_text(finding.kind)}

{_as_text(describe(finding))}

{_as_text(finding.detail.get("diagnosis", ""))}

* problem: {p["format"]} weight (n={p["n"]}, k={p["k"]}), {p["activation"]} activation, m={p["m"]},
  {p["out_dtype"]} output; `out = global_scale * A @ B.T`
* tactic: {_code(finding.tactic)}; regime: {_code(regime)}; data: {_as_text(finding.data)}
* environment: {_code(finding.fingerprint)}; found by run {_as_text(finding.run)}
{note}
## Run it

    python reproduce.py

It needs torch and the library under test. Exit code 1: a result was wrong. 0: none was, in these
launches. 2: it could not run.

## What is here

* `reproduce.py`: makes the launches and compares every element. `--mode` says how (serial, graph,
  streams, side-stream), `--times` how often.
* `call.py`: prepares the weight and calls the library.
* `data.pt`: a dictionary that `torch.load(..., weights_only=True)` reads. `weights`: packed e2m1
  codes (two a byte, the low nibble first), raw block scale bytes, global scale. `launches`: the
  failing one (`target`) and those around it, each with its activation `a` and the lowest and
  highest value allowed for every element (`lo`, `hi`; one and the same where `hi` is None).
* `finding.json`: the finding as it is stored. `tiles.svg`: the wrong 128 x 128 tiles, if any.
"""


_MARKUP = str.maketrans({"<": "&lt;", "`": "'", "[": "\\["})


def _as_text(value: object) -> str:
    """Something of a finding, as text of a Markdown page: nothing in it is obeyed or rendered."""
    return printable(str(value)).translate(_MARKUP)


def _code(value: object) -> str:
    return "`" + printable(str(value)).replace("`", "'") + "`"


def load(place: Path, number: int) -> Finding:
    """`find`, with a ledger that is not there as a refusal."""
    try:
        return find(place, number)
    except StateError as error:
        raise Refused(str(error)) from None
