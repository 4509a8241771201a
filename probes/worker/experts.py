"""What a worker does with a backend of routed experts on one layer of them.

Every launch is a window of tokens that are routed already, and its answer is known: so everything
that launches dense problems launches these, with `Routed` tokens where an activation would be. A
*case* is a set of experts with tokens routed by one law.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

import torch

from ...words import NO_FORM
from ..backends import Backend
from ..check.sweep import Unchanged
from ..check.tiles import TILE_LIMIT, tile_error
from ..data import Operands
from ..grouped.backend import AsDense, stages_of
from ..grouped.exact import Stages, draw_tokens, draw_weights, exact_problem, stages
from ..grouped.families import ODD_ROUTING, TOP_K
from ..grouped.problem import ExpertsProblem
from ..grouped.realistic import NAMES, draw_realistic, error_limit
from ..grouped.routing import ODD, REGULAR, around_blocks, run_lengths
from ..grouped.tensors import ExpertWeights
from ..grouped.units import WIDTH
from ..launch.case import Case, Launch, bind, blame, tensors
from ..launch.item import Item, LaunchAim
from ..launch.outcome import Budget, NotApplicable, Outcome, wait
from ..launch.redraw import Redraw
from ..launch.routed_answers import RoutedAnswers
from ..launch.routed_cases import prepared_case, seen_as_dense
from ..launch.summary import MOST_BAD, Result, launched
from ..launch.timing import COLD, GraphMemory, Sampler, graph_memory
from ..problem import Device
from ..seeds import derive
from .experts_stages import cut_at, routed_tokens, weights_of
from .experts_timing import TIMED_LAWS, LawBatch, TimedLaws
from .session import (
    MANY_WEIGHTS,
    MEASURED,
    SMALL_M,
    SPARE_ROWS,
    OpenLayer,
    Progress,
    _Field,
    _raise_if_poisoned,
)

WITHOUT = {
    "mlp-chain": "every call of routed experts is a chain of two GEMMs by itself, and its stages "
    "are attacked one by one in pdl-raw",
    "own-quantiser": "routed experts are given 16-bit tokens",
    "huge": NO_FORM,
}
"""Regimes of dense problems that routed experts are not run in, and why."""
LARGE_POOL = 1024 + SPARE_ROWS
"""Tokens of most pools on a GPU."""
SETS = 2
"""Sets of experts that a chain alternates between: of one all may be chosen, of the other half."""
_COPIES = 2
"""Pools of each set where few sets have room."""
RUN_TO_RUN = "run to run"
"""The kind of a grade: the same launch gives other bits."""
_REPEATS = 6
_CUT_TOKENS = 24
"""Tokens that stages are graded on."""
_MOST_ROUTES = 8
"""Batches that a sample rotates through, so that experts are cold."""
_LOOKS = 6
"""Calls that are timed to tell whether one is slow."""
_SLOW = 0.005
"""Seconds of a call on a GPU, from which on one batch of a range's largest m is timed: what takes
so long has no experts in the cache, and the floor would else be timed for minutes."""


class OpenExperts(OpenLayer):
    """One layer of routed experts under test. `problem.m` is the tokens of its pools."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        problem: ExpertsProblem,
        seed: int,
        memory: int,
        progress: Progress,
    ) -> None:
        # Regimes see a dense problem of the layer's output: hidden from hidden.
        super().__init__(backend, device, seen_as_dense(problem), seed, memory, progress)
        self.asked = problem
        self.experts = exact_problem(problem)
        assert isinstance(backend, AsDense)
        backend.problem = self.experts
        self._sets: dict[int, tuple[ExpertWeights, tuple[int, ...], Any, Unchanged]] = {}
        self._odd: dict[str, list[Case]] = {}
        self._right: dict[int, Stages] = {}
        """By set of experts, what each stage has to give of the tokens it is graded on."""
        self._times: list[TimedLaws] = []
        self._long: bool = False
        """Whether a call of many tokens takes long for a GPU, as far as that is known."""

    # Data

    def _weights(self, index: int) -> tuple[ExpertWeights, tuple[int, ...], Any, Unchanged]:
        """A set of experts, those that may be chosen, and what the backend prepared of it.

        Of every other one all may be chosen; of the rest half, and the others are NaN.
        """
        if index not in self._sets:
            p, every = self.experts, range(self.experts.groups)
            live = tuple(every)
            if index % SETS:
                count = max(p.top_k, p.groups // 2)
                first = derive(self.seed, "live", index) % 2
                live = tuple(sorted((*every[first::2], *every[1 - first :: 2])[:count]))
            seed = derive(self.seed, "experts", index)
            self.progress(f"drawing experts, set {index}")
            made = draw_weights(p, seed, self.device.torch, live, sparse_gates=bool(index % SETS))
            with blame(self.backend):
                state = self.backend.prepare(made, p)  # type: ignore[arg-type]
            self._sets[index] = made, live, state, Unchanged(_weight_tensors(made))
        return self._sets[index]

    def _case(self, laws: Sequence[str], index: int, family: str, seed: int, rows: int) -> Case:
        """Tokens of a set of experts; drawn anew, their laws take turns."""
        made, live, state, weights = self._weights(index)
        self.progress(f"routing: {laws[0]}, set {index}")
        drawn, right = draw_tokens(self.experts.at(rows), made, live, laws, seed, family)
        operands: Any = drawn
        unchanged = Unchanged(tensors(drawn.a), [weights])
        return Case(self.problem.at(rows), operands, right, state, unchanged)

    def _strict_case(self, law: str, index: int, family: str, rows: int) -> Case:
        seed = derive(self.seed, "tokens", law, index)
        return self._case((law,), index, family, seed, rows)

    def cases(self, width: int) -> list[Case]:
        """Every regular law on each set of experts; of one width, whatever is asked for. Neighbours
        are of different sets."""
        if WIDTH not in self._exact:
            self._exact[WIDTH] = [
                self._strict_case(law, index, "exact", self._pool(law, index))
                for law in REGULAR
                for index in range(SETS)
            ]
        return self._exact[WIDTH]

    def _pool(self, law: str, index: int) -> int:
        """Tokens of a case: on a GPU `LARGE_POOL` at most, but for the laws that are timed. What
        is beyond costs most of the time of all."""
        whole = self.device.kind == "cpu" or law in TIMED_LAWS
        return self.problem.m if whole else min(self.problem.m, LARGE_POOL)

    def _odd_cases(self, name: str) -> list[Case]:
        """The cases of a family; of those with experts of their own, one is kept at a time."""
        for other in [other for other in self._odd if other not in (name, *ODD)]:
            del self._odd[other]
        if name not in self._odd:
            self._odd[name] = (
                [self._strict_case(name, index, name, self.problem.m) for index in range(SETS)]
                if name in ODD
                else self._own_experts(name)
            )
        return self._odd[name]

    def _own_experts(self, name: str) -> list[Case]:
        """Realistic values, or tokens with another number of experts: one set, two laws. Raises
        NotApplicable for what the backend does not take."""
        assert isinstance(self.backend, AsDense)
        top_k = TOP_K.get(name, self.experts.top_k)
        asked = self.asked if name in NAMES else replace(self.experts, top_k=top_k)
        asked = asked.at(self.problem.m)
        why = self.backend.unsupported(asked, self.device)
        if why is not None:
            raise NotApplicable(f"top-k {top_k}: {why}")
        self.progress(f"drawing {name} experts")
        found: list[Case] = []
        for law in TIMED_LAWS:
            seed, device = derive(self.seed, name, law), self.device.torch
            if name in NAMES:
                drawn, right = draw_realistic(asked, name, seed, device, law)
            else:
                every = range(asked.groups)
                made = draw_weights(asked, seed, device, every, sparse_gates=law == TIMED_LAWS[0])
                drawn, right = draw_tokens(asked, made, every, (law,), seed, name)
            found.append(prepared_case(self.backend, asked, drawn, right))
        return found

    def _field(self, width: int, small: bool, few: bool) -> _Field:
        """As many sets of experts as have room, with tokens that are drawn anew, and the laws by
        turns. Earlier fields are kept as far as all fit in half of the memory: what is small and
        what is large is asked for by turns, and both are of the same sets."""
        if (width, small, few) not in self._fields:
            rows = min(self.problem.m, SMALL_M + SPARE_ROWS) if small else self.problem.m
            tokens = rows * 8 * self.problem.k
            each = 2 * self.experts.parameters + tokens
            most = MANY_WEIGHTS if small and not few else MANY_WEIGHTS // 4
            most = SETS if self.device.kind == "cpu" else most
            count = max(SETS, min(most, int(self.memory / 2 / each)))
            sparse = self.device.kind == "cuda" and count < MANY_WEIGHTS // 4
            copies = _COPIES if sparse else 1
            more = max(0, count - SETS) * 2 * self.experts.parameters
            size = copies * count * tokens + more
            self._keep_fields(self.memory // 2 - size)
            if not self._fields:
                for index in [index for index in self._sets if index >= SETS]:
                    del self._sets[index]
            drawn = [
                self._fresh_case(index, copy, rows)
                for copy in range(copies)
                for index in range(count)
            ]
            again = Redraw(drawn, RoutedAnswers(self.experts.at(rows), drawn))
            self._fields[width, small, few] = _Field(drawn, again, size)
        return self._fields[width, small, few]

    def _fresh_case(self, index: int, copy: int, rows: int) -> Case:
        first = (index + copy) % len(REGULAR)
        laws = (*REGULAR, *REGULAR)[first : first + len(REGULAR)]
        return self._case(laws, index, "exact", self._field_seed(index, copy), rows)

    def _field_seed(self, index: int, copy: int) -> int:
        return derive(self.seed, "field", index, copy)

    def case_of(
        self,
        data: str,
        width: int | None,
        seed: int,
        draw: int | None = None,
        afresh: bool = False,
    ) -> Case:
        """The case of this data and seed. Raises ValueError where there is none."""
        if afresh:
            self._exact.clear()
            self._odd.clear()
            self._right.clear()
            self._fields.clear()
            self._sets.clear()
        if draw is not None:
            return self._drawn_again(seed, draw)
        there = self.cases(WIDTH) if data == "exact" else self._odd_cases(data)
        for each in there:
            if each.operands.seed == seed:
                return each
        raise ValueError(f"no routed tokens have the seed {seed}")

    def _drawn_again(self, seed: int, draw: int) -> Case:
        """The tokens of a draw of the field, and what must come of them."""
        for index, copy in product(range(MANY_WEIGHTS), range(_COPIES)):
            if self._field_seed(index, copy) == seed:
                self.progress(f"drawing draw {draw} again")
                found = self._fresh_case(index, copy, self.problem.m)
                Redraw([found], RoutedAnswers(self.experts.at(self.problem.m), [found])).to(draw)
                return found
        raise ValueError(f"no routed tokens that are drawn anew have the seed {seed}")

    def _judged_by_neighbours(self, item: Item) -> bool:
        return False

    def _summaries(
        self, regime: str, count: int, outcomes: Sequence[Outcome], cases: Sequence[Case]
    ) -> list[Result]:
        results = super()._summaries(regime, count, outcomes, cases)
        drawn = {case.operands.seed: case.operands for case in cases}
        for result in results:
            failed = [*result["bad"], *([result["error"]] if "error" in result else [])]
            for bad in failed:
                if bad.get("seed") in drawn:
                    law = _law(drawn[bad["seed"]], bad.get("draw", 0))
                    bad.update(law=law, layer_seed=self.seed)
        return results

    # Grading

    def grade(self, items: Sequence[Item]) -> list[Result]:
        """Every m of each item under every regular law, bit for bit; and each stage by itself,
        where the backend can be cut there. What takes long for a GPU is launched once for each m,
        under any law."""
        cases = self.cases(WIDTH)
        most = max((len(item.ms) for item in items), default=0)
        self._long = self._takes_long(items, cases)
        each, times = (1, 1) if self._long else (len(cases), 2)
        launches = self.launches(items, cases, ("grade", WIDTH), per_item=most * each)
        launches += self._around_blocks(items, cases)
        outcomes = self.run("serial", cases, launches, Budget(times, times, 0.0))
        results = self._summaries("serial", len(items), outcomes, cases)
        changed = sum(o.changed_inputs for o in outcomes)
        cut: dict[str, Result] = {}
        for item, result in zip(items, results, strict=True):
            if item.tactic not in cut:
                cut[item.tactic] = self._stages(item.tactic)
            result["stages"] = cut[item.tactic]["grades"]
            result["bad"] += [{**bad, "m": bad["m"]} for bad in cut[item.tactic]["bad"]]
            if changed:
                result["changed_inputs"] = changed
            right = not result["bad"] and "error" not in result
            result["width"] = WIDTH if right else None
        return results

    def _around_blocks(self, items: Sequence[Item], cases: Sequence[Case]) -> list[Launch]:
        """Launches in which experts have one token less than a block of any size, as many, and one
        more: all the same experts, or others run by run; and one in which each has one token."""
        p, found = self.experts, []
        of = {law: [i for i, c in enumerate(cases) if _law(c.operands) == law] for law in REGULAR}
        wanted = [(m, "idle", turn) for turn, m in enumerate(around_blocks())]
        for turn, place in enumerate(of["runs"]):
            runs = run_lengths(cases[place].operands.seed)[: p.groups // p.top_k]
            wanted += [(m, "runs", turn) for m in accumulate(runs)]
        wanted.append((p.groups // p.top_k, "balanced", 0))
        for index, item in enumerate(items):
            for m, law, turn in wanted:
                case = of[law][turn % len(of[law])]
                if min(item.ms) <= m <= min(max(item.ms), cases[case].problem.m):
                    found.append(Launch(case, 0, m, item.tactic, index))
        return found

    def _stages(self, tactic: str) -> Result:
        """Each stage that it can be cut into: ``grades`` by its name, and what is wrong."""
        found: Result = {"grades": {}, "bad": []}
        assert isinstance(self.backend, AsDense)
        names = stages_of(self.backend)
        tokens = min(_CUT_TOKENS, self.problem.m)
        for index, case in enumerate(self.cases(WIDTH)[:SETS]) if names else ():
            self.progress(f"stages, {tactic}")
            if index not in self._right:
                given = routed_tokens(case, tokens)
                self._right[index] = stages(self.experts, weights_of(case), given)
            right = self._right[index]
            for name in names:
                wrong, message = cut_at(self.backend, name, case, right, tactic)
                if not wrong:
                    found["grades"].setdefault(name, "exact")
                    continue
                found["grades"][name] = "wrong"
                described = {
                    "kind": "wrong",
                    "wrong": wrong,
                    "cut": name,
                    "layer_seed": self.seed,
                    "message": f"the stage {name} alone: {message}",
                    "m": tokens,
                    "offset": 0,
                    "seed": case.operands.seed,
                    "data": "exact",
                    "width": WIDTH,
                    "rows": self.problem.m,
                    "tactic": tactic,
                }
                found["bad"].append(described)
        return found

    def cut_again(self, tactic: str) -> Result:
        """What came of grading the stages of a tactic once more, as `replay` has it."""
        bad = self._stages(tactic)["bad"]
        return {"launches": 1, "failures": int(bool(bad))}

    def family(self, name: str, items: Sequence[Item]) -> list[Result]:
        """One family, serially: odd routing bit for bit, realistic values by tile."""
        if name not in ODD_ROUTING and name not in NAMES:
            raise NotApplicable(f"routed experts have no {name} data")
        cases = self._odd_cases(name)
        if name in TOP_K:
            # Another number of experts a token is compiled anew, block by block.
            items = [replace(item, ms=(max(item.ms),)) for item in items]
        most = max((len(item.ms) for item in items), default=0)
        each = 1 if self._long else len(cases)
        launches = self.launches(items, cases, name, per_item=most * each)
        outcomes = self.run("serial", cases, launches, Budget(1, 1, 0.0))
        results = self._summaries("serial", len(items), outcomes, cases)
        for index, result in enumerate(results) if name in NAMES else ():
            if not result["bad"] and "error" not in result:
                mine = [x for x in launches if x.item == index]
                self._judge_tiles(result, mine, cases)
                if name == MEASURED:
                    self._grade_repeats(result, mine, cases)
        changed = sum(o.changed_inputs for o in outcomes)
        for result in results if changed else ():
            result["changed_inputs"] = changed
        return results

    def _judge_tiles(
        self, result: Result, launches: Sequence[Launch], cases: Sequence[Case]
    ) -> None:
        """Add to a result which launches have a tile that is further off than rounding explains."""
        for launch in launches:
            error = self._tile_error(cases, launch)
            if not error <= error_limit(self.experts):
                described = {**launched(launch, cases), "tile_error": error, "kind": "wrong"}
                law = _law(cases[launch.case].operands)
                result["bad"].append({**described, "law": law, "layer_seed": self.seed})
        result["bad_launches"] = len(result["bad"])
        result["bad"] = result["bad"][:MOST_BAD]

    def _grade_repeats(
        self, result: Result, launches: Sequence[Launch], cases: Sequence[Case]
    ) -> None:
        """Grade whether the launch of most tokens gives the same bits again and again. Sums in an
        order that changes are no fault, as long as they are as near to each other as rounding.
        """
        launch = max(launches, key=lambda x: x.m, default=None)
        if launch is None or not launch.m:
            return
        call = bind(self.backend, cases, launch)
        outs = []
        for _ in range(_REPEATS):
            call.enqueue()
            outs.append(call.slot.out.clone())
        others = sum(not torch.equal(out, outs[0]) for out in outs)
        if not others:
            return
        apart = max(float(tile_error(out, outs[0].float()).max()) for out in outs)
        message = (
            f"{others} of {_REPEATS - 1} launches of {launch.m} tokens gave other bits than the "
            f"first, a tile of them {apart:.1e} away (up to {TILE_LIMIT:.1e} is rounding)"
        )
        graded = {**launched(launch, cases), "kind": RUN_TO_RUN, "message": message}
        result.setdefault("graded", []).append({**graded, "layer_seed": self.seed})
        if not apart <= TILE_LIMIT:
            result["bad"].append({**graded, "kind": "wrong", "tile_error": apart})
            result["bad_launches"] = result.get("bad_launches", 0) + 1

    def _tile_error(self, cases: Sequence[Case], launch: Launch) -> float:
        if not launch.m:
            return 0.0
        call = bind(self.backend, cases, launch)
        call.enqueue()
        ref = cases[launch.case].expectation.window(launch.offset, launch.offset + launch.m).ref
        assert ref is not None
        error = tile_error(call.slot.out, ref)
        return float("inf") if bool(error.isnan().any()) else float(error.max())

    def run(
        self, name: str, cases: Sequence[Case], launches: Sequence[Any], budget: Budget
    ) -> list[Outcome]:
        if name in WITHOUT:
            raise NotApplicable(WITHOUT[name])
        return super().run(name, cases, launches, budget)

    def misses_tiles(self, cases: Sequence[Case], launch: Launch) -> bool:
        """Whether a launch of realistic values has a tile that rounding does not explain."""
        return not self._tile_error(cases, launch) <= error_limit(self.experts)

    def regime(
        self, name: str, items: Sequence[Item], budget: Budget, aim: LaunchAim | None = None
    ) -> Result:
        """As of a dense layer; what the families had of their own is let go of first, gigabytes in
        each worker."""
        self._odd.clear()
        return super().regime(name, items, budget, aim)

    # Timing

    def open_timing(self, items: Sequence[Item], cache_bytes: int) -> list[float | None]:
        """Prepare each item's m under both laws; the host microseconds of a call of each.

        A sample rotates through batches with other experts, and through copies of all of them where
        they would fit in the cache.
        """
        self._odd.clear()
        made, _, state, _ = self._weights(0)
        size = sum(t.nbytes for t in _weight_tensors(made))
        copies = max(1, min(4, -(-COLD * cache_bytes // max(1, size))))
        with blame(self.backend):
            more = [self.backend.prepare(made.clone(), self.experts) for _ in range(copies - 1)]  # type: ignore[arg-type]
        cases = {_law(c.operands): c for c in self.cases(WIDTH)[::SETS]}
        self._times, self._timed = [], []
        memory = graph_memory(self.device.torch)
        try:
            for item in items:
                self.progress(f"timing {item.ms[-1]} tokens")
                slow = self._is_slow(cases[TIMED_LAWS[0]], state, item)
                self._times.append(
                    TimedLaws(
                        [
                            LawBatch(
                                m,
                                law,
                                item.tactic,
                                self._sampler(
                                    cases[law],
                                    [state, *more],
                                    Item((m,), item.tactic),
                                    1 if slow else _MOST_ROUTES,
                                    memory,
                                ),
                            )
                            for m in (item.ms[-1:] if slow else item.ms)
                            for law in TIMED_LAWS
                        ]
                    )
                )
        except BaseException:
            self._times = []  # what was captured so far holds memory
            raise
        return [each.host_us() for each in self._times]

    def _takes_long(self, items: Sequence[Item], cases: Sequence[Case]) -> bool:
        """Whether the item of most tokens is slow; not where it raises, which others will tell."""
        item = max(items, key=lambda each: max(each.ms), default=None)
        try:
            return item is not None and self._is_slow(cases[0], cases[0].state, item)
        except Exception as error:
            _raise_if_poisoned(self.device, error)
            return False

    def _is_slow(self, case: Case, state: Any, item: Item) -> bool:
        """Whether a call of the item's largest m takes long for a GPU, by the host's clock: the
        shortest of a few, since others may have the device by turns."""
        if self.device.kind == "cpu":
            return False
        m = item.ms[-1]
        tokens = case.rows(0, m)
        out = torch.empty(m, self.problem.n, dtype=self.problem.dtype, device=self.device.torch)
        for _ in range(_LOOKS):
            start = time.perf_counter()
            self.backend.run(state, tokens, out, item.tactic)  # type: ignore[arg-type]
            wait(self.device.torch)
            if time.perf_counter() - start <= _SLOW:
                return False
        return True

    def _sampler(
        self,
        case: Case,
        states: Sequence[Any],
        item: Item,
        most: int,
        memory: GraphMemory | None,
    ) -> Sampler:
        """A sampler of the item's m: `most` batches by turns, or as many as there are `states`."""
        (m,), tactic, rows = item.ms, item.tactic, self.problem.m
        count = max(len(states), min(most, rows // max(1, m)))
        batches = [case.rows(i * m % (rows - m + 1), m) for i in range(count)]
        outs = [
            torch.empty(m, self.problem.n, dtype=self.problem.dtype, device=self.device.torch)
            for _ in range(2)
        ]

        def each() -> None:
            for index, batch in enumerate(batches):
                state = states[index % len(states)]
                self.backend.run(state, batch, outs[index % 2], tactic)  # type: ignore[arg-type]

        return Sampler(each, count, self.device.kind == "cuda", memory)

    def sample(self, indices: Sequence[int]) -> list[float]:
        """Microseconds of a call, the mean over both laws and the m, of each item."""
        return [self._times[index].sample() for index in indices]

    @property
    def timed(self) -> Any:
        """What is being timed, in the order of `open_timing`'s items."""
        return self._times

    def times_by_law(self) -> list[dict[str, list[float]]]:
        """The samples so far under each law, each the mean over the m, of each item."""
        return [each.by_law() for each in self._times]

    def close_timing(self) -> list[list[tuple[int, float]]]:
        """Let go of what was timed; of each item (m, median microseconds)."""
        found = [each.by_m() for each in self._times]
        self._times = []
        super().close_timing()
        return found


def _law(operands: Operands, draw: int = 0) -> str:
    """How tokens of a draw are routed."""
    rows: Any = operands.rows
    return str(getattr(operands, "law", "")) if rows is None else str(rows.law(draw))


def _weight_tensors(weights: ExpertWeights) -> list[torch.Tensor]:
    return tensors(weights)
