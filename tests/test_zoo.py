"""Every mutant of the floor is caught for what it does, and no right one is flagged."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
from levels import brief
from typer.testing import CliRunner

from fp4tune import cli, errors
from fp4tune.autotune import request as planning
from fp4tune.autotune import selftest
from fp4tune.autotune.plan import Report
from fp4tune.autotune.selftest import FALSE_ALARM, MISSED, OK, UNDECIDED, judge
from fp4tune.autotune.verdict.rules import Doubt, Doubts
from fp4tune.cache.rows import BucketKey, Candidate, Finding
from fp4tune.machine import devices
from fp4tune.probes import registry, zoo
from fp4tune.probes.data import FAMILIES, families
from fp4tune.probes.launch.item import Item, LaunchAim
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.regimes import REGIMES, Budget, NotApplicable
from fp4tune.probes.worker.session import OpenLayer
from fp4tune.probes.zoo.floor import Right
from fp4tune.probes.zoo.host_table import HOST
from fp4tune.words import CENSUS

CPU = zoo.mutants("cpu")
EVERY = tuple(dict.fromkeys([*CPU, *zoo.mutants("cuda")]))
KINDS = {
    "zoo-last-tile-skipped": "unwritten",
    "zoo-tile-dropped-rarely": "unwritten",
    "zoo-zero-block-nan": "not finite",
    "zoo-fp16-overflow": "not finite",
    "zoo-shared-lock": "hang",
    "zoo-row-out-of-bounds": "out of bounds",
    "zoo-input-modified": "input modified",
    "zoo-output-cached": "unwritten",
    "zoo-segmentation-fault": "crash",
    "zoo-endless-loop": "hang",
    "zoo-error-at-one-m": "error",
    "zoo-rows-unwritten": "unwritten",
    "zoo-padding-leak": "not finite",
    "zoo-rows-behind-leak": "not finite",
    "zoo-host-leak": "host leak",
    "zoo-plan-per-m": "host leak",
    "zoo-activation-address-rounded": "not finite",
    "zoo-output-address-rounded": "unwritten",
    "zoo-output-head-unwritten": "unwritten",
    "zoo-pairs-share-a-scale": "not finite",
    "zoo-plan-half-made": "unwritten",
    "zoo-counter-wraps-early": "wrong",
    "zoo-copies-held": "memory held",
    "zoo-products-held": "memory held",
    **{
        mutant.name: "side effect"
        for mutant in CPU
        if mutant.failure == "side effect on the process"
    },
}
"""The kind of finding, where it is not `wrong`."""

SHOWN = (
    "zoo-rows-swapped",
    "zoo-subnormal-scales-dropped",
    "zoo-segmentation-fault",
    "zoo-shared-lock",
    "zoo-own-buffer",
)
"""Run through the command: of each kind of expectation one, and those that end their process."""
ALIVE = [mutant for mutant in CPU if not mutant.ends]


def command(*arguments: str):
    return CliRunner().invoke(cli.app, ["selftest", "--gpu", "none", *arguments])


# -- every mutant that leaves its process alive, in this one


class Tried:
    """What the harness says of one mutant: the kinds of findings, by regime or data family."""

    def __init__(self, mutant: zoo.Mutant) -> None:
        self.kinds: dict[str, set[str]] = {}
        self.launches = 0
        self.long = mutant.level != "quick"
        m = selftest.MANY_M if mutant.many else selftest.MAX_M
        problem = Problem("nvfp4", m + 4, selftest.N, selftest.K, mutant.activation)
        backend = registry.load_one(mutant.name)
        self.layer = OpenLayer(backend, Device("cpu"), problem, 20, 1 << 28, lambda text: None)
        self.items = [Item((1, m), "default")]
        (graded,) = self.layer.grade(self.items)
        self.keep("serial", "exact", graded)
        self.items = [replace(self.items[0], width=graded["width"] or 24)]

    def keep(self, regime: str, data: str, result: dict) -> None:
        kinds = {bad["kind"] for bad in result["bad"]}
        if "error" in result:
            kinds.add(result["error"]["kind"])
        if result.get("changed_inputs"):
            kinds.add("input modified")
        self.launches += result["launches"]
        for name in (regime, data) if kinds else ():
            self.kinds.setdefault(name, set()).update(kinds)

    def family(self, name: str) -> None:
        (result,) = self.layer.family(name, self.items)
        self.keep("serial", name, result)

    def regime(self, name: str) -> None:
        try:
            budget = Budget(3, 30, 0.1, long=self.long)
            result = self.layer.regime(name, self.items, budget)
        except NotApplicable:
            return
        self.keep(name, "exact", result["items"][0])

    def until_caught(self, wanted: tuple[str, ...]) -> set[str]:
        """Try what must catch it; the kinds of the first of them that does."""
        for name in ("exact", *wanted):
            if name in FAMILIES and name != "exact":
                self.family(name)
            elif name in REGIMES:
                self.regime(name)
            if name in wanted and name in self.kinds:
                return self.kinds[name]
        return set()


def by_turns(mutants: list[zoo.Mutant]) -> list:
    """Of the host's mutants one for each class of failure in the quick suite, the others after."""
    seen: set[str] = set()
    found = []
    for mutant in mutants:
        later = mutant in HOST and (mutant.passes or mutant.failure in seen)
        seen.add(mutant.failure)
        marks = [pytest.mark.slow] if later else []
        found.append(pytest.param(mutant, id=mutant.name, marks=marks))
    return found


@pytest.mark.parametrize(
    "mutant", by_turns([m for m in ALIVE if not m.passes and m.level == "quick"])
)
def test_what_a_mutant_does_is_seen(mutant):
    kind = KINDS.get(mutant.name, "wrong")
    assert kind in Tried(mutant).until_caught(mutant.caught_by)


@pytest.mark.parametrize("mutant", by_turns([m for m in ALIVE if m.passes]))
def test_what_is_right_is_never_flagged(mutant):
    tried = Tried(mutant)
    for family in families(tried.layer.problem):
        tried.family(family.name)
    for name in REGIMES:
        tried.regime(name)
    assert tried.kinds == {} and tried.launches > 50


@pytest.mark.parametrize(
    "mutant",
    [m for m in ALIVE if m.level == "standard" and (m.passes or "graph" in m.caught_by)],
    ids=lambda mutant: mutant.name,
)
def test_what_is_wrong_once_in_thousands_is_seen_at_length_only(mutant, one_thread):
    tried = Tried(mutant)
    items = [replace(item, ms=(2,)) for item in tried.items]
    tried.regime("serial")
    assert not tried.kinds
    aim = LaunchAim(launches=3000, problems=30, seconds=30.0)
    (result,) = tried.layer.regime("serial", items, Budget(1, 1, 0.0), aim)["items"]
    assert result["problems"] >= 8
    assert bool(result["bad"]) != mutant.passes
    if result["bad"]:
        assert result["bad_launches"] < result["launches"] / 500


def test_each_is_looked_for_at_its_level():
    length = {name: level.launches for name, level in selftest.BY_LEVEL.items()}
    assert length["quick"] == 0 < length["standard"]
    for mutant in zoo.mutants("cuda"):
        assert {mutant.level, mutant.level_on("cuda")} <= selftest.BY_LEVEL.keys()


# -- the command


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    """The document of one self-test, and what it left in the user's state; of fewer regimes than a
    user's, which the tests above have for each mutant."""
    place = tmp_path_factory.mktemp("selftest")
    fewer = brief().without
    strict = selftest.PROFILES["strict"]
    asked = tuple(name for name in strict.required if name not in fewer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("FP4TUNE_STATE", str(place / "state"))
        patch.setenv("TMPDIR", str(place))
        patch.setitem(selftest.BY_LEVEL, "quick", replace(selftest.LEVEL, without=fewer))
        patch.setitem(selftest.PROFILES, "strict", replace(strict, required=asked))
        done = command("--json", *(word for name in SHOWN for word in ("--mutant", name)))
    assert done.exit_code in (errors.SAFE, errors.UNSAFE, errors.NOT_ASSESSED), done.exception
    (document,) = json.loads(done.stdout)
    return {**document, "exit_code": done.exit_code, "left": os.listdir(place)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_command_shows_what_each_regime_caught(shown, name):
    (row,) = [row for row in shown["mutants"] if row["mutant"] == name]
    (mutant,) = [mutant for mutant in CPU if mutant.name == name]
    assert row["result"] == OK, row
    if mutant.passes:
        assert (row["verdict"], row["finding"], row["caught"]) == ("safe", None, [])
        return
    assert row["finding"]["kind"] == KINDS.get(name, "wrong")
    assert {row["finding"]["regime"], row["finding"]["data"]} & set(mutant.caught_by)
    assert row["verdict"] == (mutant.expected if mutant.condition else "unsafe")
    assert row["finding"]["regime"] in {caught["regime"] for caught in row["caught"]}


@pytest.mark.slow
def test_all_as_expected_is_success(shown):
    assert [row["mutant"] for row in shown["mutants"]] == list(SHOWN)
    assert shown["exit_code"] == errors.SAFE


@pytest.mark.slow
def test_nothing_is_left_behind_nor_published(shown):
    assert "state" not in shown["left"]
    assert not [name for name in shown["left"] if name.startswith("fp4tune")]


# -- the judge: a self-test that cannot fail shows nothing

BAD = zoo.Mutant("zoo-bad", "", "", Right, caught_by=("streams",))
GOOD = zoo.Mutant("zoo-good", "", "", Right, passes=True)
LIMITED = replace(BAD, condition="block-scale-min")
LIMIT = {"block-scale-min"}


@pytest.mark.parametrize(
    "mutant, verdicts, conditions, found, expected, result",
    [
        (BAD, {"safe", "unsafe"}, set(), True, True, OK),
        (BAD, {"unsafe"}, set(), True, False, MISSED),
        (BAD, {"safe"}, set(), False, False, MISSED),
        (BAD, {"inconclusive"}, set(), False, False, MISSED),
        (GOOD, {"safe"}, set(), False, False, OK),
        (GOOD, {"safe", "unsafe"}, set(), True, False, FALSE_ALARM),
        (GOOD, {"safe"}, LIMIT, False, False, FALSE_ALARM),
        (GOOD, {"inconclusive"}, set(), True, False, FALSE_ALARM),
        (GOOD, {"safe", "inconclusive"}, set(), False, False, UNDECIDED),
        (LIMITED, {"safe"}, LIMIT, True, True, OK),
        (LIMITED, {"safe"}, set(), False, False, MISSED),
        (LIMITED, {"unsafe"}, LIMIT, True, True, FALSE_ALARM),
        (LIMITED, {"safe"}, LIMIT | {"one-stream-per-layer"}, True, True, FALSE_ALARM),
        (BAD, set(), set(), False, False, UNDECIDED),
        (GOOD, set(), set(), False, False, UNDECIDED),
    ],
)
def test_judging(mutant, verdicts, conditions, found, expected, result):
    assert judge(mutant, verdicts, conditions, found, expected) == result


@pytest.mark.parametrize("unsafe, result", [(True, OK), (False, MISSED)])
def test_one_bad_tactic_is_caught_though_another_is_right_and_the_candidate(unsafe, result):
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 1, 320, 272)
    right = Candidate("sm90", "", "strict", bucket, BAD.name, "one", "plain", "safe")
    blamed = Finding("r", "", BAD.name, "two", bucket, {}, "wrong", "streams", "exact", 1)
    report = Report("r", 1, devices.cpu(), candidates=[right], findings=[blamed])
    assert selftest._selftest_row(BAD, report, [], unsafe).result == result


@pytest.mark.parametrize(
    "results, code",
    [
        ([OK, OK], errors.SAFE),
        ([OK, MISSED, UNDECIDED], errors.UNSAFE),
        ([FALSE_ALARM], errors.UNSAFE),
        ([OK, UNDECIDED], errors.NOT_ASSESSED),
        ([], errors.NOT_ASSESSED),
    ],
)
def test_exit_codes(results, code):
    rows = [selftest.Row("", "", "", "", "", None, 0, result) for result in results]
    assert selftest.exit_code(rows) == code


def test_an_interrupted_one_shows_what_is_known(monkeypatch):
    found = selftest.Row("zoo-rows-swapped", "", "", "", "unsafe", None, 7, OK)

    def interrupted(target, mutants, watching):
        yield found
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "selftest", interrupted)
    names = ("zoo-last-tile-skipped", found.mutant, "zoo-shared-lock")
    asked = [word for name in names for word in ("--mutant", name)]
    said = command(*asked)
    assert said.exit_code == errors.NOT_ASSESSED
    assert "1 of 1 as expected" in said.stdout and "2 were not reached" in said.stdout
    assert not command("--json", *asked).stdout


def test_the_controls_are_run_once(monkeypatch):
    seen, found = [], Doubts(dense={"graph": Doubt("the controls did not finish")})

    def probe(plan, ledger, place, progress):
        seen.append(plan.doubts)
        return replace(Report("run", plan.seed, plan.target), doubts=found)

    monkeypatch.setattr(selftest, "probe", probe)
    names = ("zoo-rows-swapped", "zoo-segmentation-fault", "zoo-wrong-once-in-a-thousand")
    mutants = selftest.choose(Device("cpu"), names)
    rows = list(selftest.selftest(devices.cpu(), mutants, lambda plan: nullcontext(print)))
    assert [row.mutant for row in rows] == list(names) and seen == [None, found, found]


@pytest.mark.parametrize(
    ("gib", "cores", "count"),
    [(None, 16, 8), (16, 16, 8), (80, 16, 20), (140, 64, 24), (140, 4, 8)],
)
def test_as_many_at_once_as_there_is_room_for(gib, cores, count, monkeypatch):
    memory = None if gib is None else gib << 30
    monkeypatch.setattr(selftest, "hardware", lambda which: {"memory_bytes": memory})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    gpu = devices.Target(Device("cuda", 90), "a GPU", "GPU-1")
    mutants = selftest.choose(gpu.device, ())
    assert (
        selftest.at_once(gpu) == count
        and selftest.at_once(devices.Target(Device("cpu"), "a CPU")) == 8
    )
    groups = list(selftest._groups(mutants, count, "cuda"))
    assert max(map(len, groups)) <= count
    assert sorted(m.name for mine in groups for m in mine) == sorted(m.name for m in mutants)
    # Right ones are no reason to leave others untried.
    assert all(selftest.plan(gpu, mine).enough > len(mine) for mine in groups)


# -- the zoo as backends


def test_mutants_load_by_name_and_are_in_no_ordinary_probe():
    assert len({mutant.name for mutant in EVERY}) == len(EVERY)
    for mutant in EVERY:
        assert mutant.name.startswith(zoo.PREFIX)
        assert registry.load_one(mutant.name).name == mutant.name
        with pytest.raises(registry.UnknownBackend):
            planning.backends([mutant.name])
    assert not [name for name in planning.backends(()) if name.startswith(zoo.PREFIX)]
    with pytest.raises(registry.UnknownBackend):
        registry.load_one("zoo-okapi")


def test_mutants_say_what_is_expected_of_them_in_words_that_exist():
    ids = {family.condition.id for family in FAMILIES.values() if family.condition}
    for mutant in EVERY:
        assert set(mutant.caught_by) <= {*REGIMES, *FAMILIES, "exact", CENSUS}
        assert bool(mutant.caught_by) != mutant.passes
        assert mutant.condition is None or mutant.condition in ids
        assert mutant.failure and mutant.mechanism and set(mutant.devices) <= {"cpu", "cuda"}


@pytest.mark.parametrize("device", [Device("cpu"), Device("cuda", 90)], ids=lambda d: d.kind)
def test_mutants_run_where_they_say(device):
    for mutant in zoo.mutants(device.kind):
        problem = Problem("nvfp4", selftest.MAX_M, selftest.N, selftest.K, mutant.activation)
        assert registry.load_one(mutant.name).unsupported(problem, device) is None


def test_a_gpu_has_all_that_a_gpu_can_have():
    bad = [mutant for mutant in zoo.mutants("cuda") if not mutant.passes]
    assert len(bad) >= 30
    usual = selftest.choose(Device("cuda", 90), ())
    assert not [m for m in zoo.mutants("cuda") if m.level_on("cuda") == "soak"]
    rare = [m for m in zoo.mutants("cpu") if m.level_on("cpu") == "soak"]
    assert rare and not set(rare) & set(selftest.choose(Device("cpu"), ()))
    assert set(rare) < set(usual)
    assert selftest.choose(Device("cpu"), [rare[0].name]) == (rare[0],)
    older = selftest.choose(Device("cuda", 80), ())
    assert set(older) < set(usual) and not [m for m in older if "pdl-raw" in m.caught_by[:1]]


def test_a_mutant_nobody_knows_is_refused_in_one_sentence():
    done = command("--mutant", "zoo-rows-swaped")
    assert done.exit_code == errors.NOT_ASSESSED
    assert "zoo-rows-swapped" in done.stderr and len(done.stderr.splitlines()) == 1
