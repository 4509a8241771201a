"""What a worker does with its backend on one layer: grade it, run families and regimes, time it.

A *layer* is one (format, activation, dtype, n, k) with its items: an item is a tactic in an m
range, with the m's to launch. Results are plain dictionaries, ready to be sent.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...machine.memory import is_out_of_memory
from ..backends import Backend
from ..check.accumulation import accumulation
from ..check.reference import alpha_of, expect, faithful, spread, tile_error, tile_limit
from ..data import WIDTHS, draw, exact, steady
from ..launch.case import BackendRaised, Case, Launch, batches, bind, blame, case, with_room
from ..launch.item import Item, LaunchAim
from ..launch.redraw import ProductAnswers, Redraw
from ..launch.summary import MOST_BAD, Result, launched, summarise
from ..launch.timing import Timed, TimedRange, buffers, weight_copies
from ..launch.windows import Windows, window_offsets
from ..problem import Device, Problem
from ..regimes import CALLS, COPIES, COSTLY, EVERY_M, WHOLE, Budget, NotApplicable, Outcome
from ..seeds import derive

WEIGHTS = 2
"""Different weights of a layer that a chain alternates between."""
MANY_WEIGHTS = 16
"""The same where much is to be shown, as far as memory has room."""
SMALL_M = 256
"""Up to here a chain has pools of few rows, so that new data for all of them cost little."""
SPARE_ROWS = 64
MEASURED = "realistic"
"""The family on which accumulation is measured."""
CHAIN = {"cuda": (24, 6), "cpu": (8, 2)}
"""Launches of each item in a chain where much is to be shown: of small m, and of large."""

Progress = Callable[[str], None]


class OpenLayer:
    """One weight shape under test. `problem.m` is the number of rows in the activation pools."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        problem: Problem,
        seed: int,
        memory: int,
        progress: Progress,
    ) -> None:
        self.backend = backend
        self.device = device
        self.problem = problem
        self.seed = seed
        self.memory = memory
        self.progress = progress
        self._exact: dict[int, list[Case]] = {}
        self._fields: dict[tuple[int, bool, bool], _Field] = {}
        self._windows = Windows()
        self._timed: list[TimedRange] = []
        self._otherwise: dict[str, bool] = {}
        """By tactic: whether its outputs are rounded otherwise than to nearest."""

    def cases(self, width: int) -> list[Case]:
        """The exact cases of this width, drawn and prepared on first use."""
        if width not in self._exact:
            drawn = []
            for index in range(WEIGHTS):
                seed = derive(self.seed, self.problem, "exact", width, index)
                self.progress(f"drawing exact data of width {width}")
                drawn.append(self._draw("exact", width, seed))
            self._exact[width] = drawn
        return self._exact[width]

    def _field(self, width: int, small: bool, few: bool) -> _Field:
        """Many weights of this width, or a few, with rows that are drawn anew; the strict cases
        where there are no such rows. Those of earlier regimes are kept as far as all fit in half of
        the memory: what is small and what is large is asked for by turns."""
        if (width, small, few) not in self._fields:
            most = WEIGHTS if self.device.kind == "cpu" else MANY_WEIGHTS
            most = max(WEIGHTS, most // 4) if few else most
            rows = min(self.problem.m, SMALL_M + SPARE_ROWS) if small else self.problem.m
            pools = [rows] * most if small or few else field_rows(rows, most)
            each = sum(_bytes_of_case(self.problem.at(pool)) for pool in pools) / most
            count = max(WEIGHTS, min(most, int(self.memory / 2 / each)))
            kept = min(self.memory // 4, count * 2 * self.problem.n * self.problem.k)
            size = int(count * each) + kept
            self._keep_fields(self.memory // 2 - size)
            drawn = []
            for index, pool in enumerate(pools[:count]):
                seed = derive(self.seed, self.problem, "field", width, small, index)
                self.progress(f"drawing field {index + 1} of {count}")
                problem = self.problem.at(pool)
                try:
                    operands = steady(problem, width, seed, self.device.torch)
                except ValueError:
                    break
                drawn.append(case(self.backend, problem, operands))
            else:
                again = Redraw(drawn, ProductAnswers(drawn, self.memory // 4))
                return self._fields.setdefault((width, small, few), _Field(drawn, again, size))
            self._fields[width, small, few] = _Field(self.cases(width), None)
        return self._fields[width, small, few]

    def _keep_fields(self, room: int) -> None:
        """Let go of all fields, unless they leave `room` bytes as it is."""
        if sum(field.size for field in self._fields.values()) > room:
            self._fields.clear()

    def _draw(self, data: str, width: int | None, seed: int) -> Case:
        device = self.device.torch
        if data == "exact":
            operands = exact(self.problem, width or WIDTHS[0], seed, device)
        else:
            operands = draw(self.problem, data, seed, device)
        return case(self.backend, self.problem, operands)

    def case_of(
        self,
        data: str,
        width: int | None,
        seed: int,
        draw: int | None = None,
        afresh: bool = False,
    ) -> Case:
        """The case of this data and seed: one that is there, else drawn again.

        `draw` is which of the rows that are drawn anew; None for data that never are.
        """
        if draw is not None:
            self.progress(f"drawing draw {draw} again")
            operands = steady(self.problem, width or WIDTHS[0], seed, self.device.torch)
            assert operands.rows is not None
            operands.rows.fill(operands.a, draw)
            return case(self.backend, self.problem, operands)
        there = [] if afresh else [c for cases in self._exact.values() for c in cases]
        for each in there:
            found = each.operands
            if (found.family, found.width, found.seed) == (data, width, seed):
                return each
        self.progress(f"drawing {data} data again")
        return self._draw(data, width, seed)

    def launches(
        self, items: Sequence[Item], cases: Sequence[Case], tag: object, per_item: int = 0
    ) -> list[Launch]:
        """Every m of every item on a window of rows drawn from the seed; on as many windows as make
        `per_item` launches of each item, about.

        Those of one m share no row; fewer where the pools have no room for so many.
        """
        rng = random.Random(derive(self.seed, self.problem, "windows", tag))
        found = []
        for index, item in enumerate(items):
            windows = max(1, -(-per_item // len(item.ms)))
            for m in item.ms:
                able = with_room(cases, m)
                each = -(-windows // len(able))
                for chosen in rng.sample(able, min(windows, len(able))):
                    rows = cases[chosen].problem.m
                    first = rng.randint(0, rows - m)
                    for offset in window_offsets(rows, m, each, first):
                        found.append(Launch(chosen, offset, m, item.tactic, index))
        return found

    def _summaries(
        self, regime: str, count: int, outcomes: Sequence[Outcome], cases: Sequence[Case]
    ) -> list[Result]:
        """`summarise` of items 0 to `count`, with the problems that are new in this regime."""
        results = [summarise(index, outcomes, cases) for index in range(count)]
        for outcome in outcomes:
            for launch, report in outcome.reports:
                key = regime, launch.tactic, launch.m, cases[launch.case].operands.seed
                if self._windows.add(key, launch.offset, launch.m):
                    results[launch.item]["problems"] += 1 + outcome.draws
                    results[launch.item]["bad_problems"] += not report.clean
        return results

    def grade(self, items: Sequence[Item]) -> list[Result]:
        """The width of each item: the largest whose exact problems come out bit for bit.

        An item that misses bits at one width is tried at others only if its answers are close;
        unwritten, non-finite or far-off values are failures at any width, not a lower grade.
        """
        results: list[Result] = [
            {"launches": 0, "problems": 0, "width": None, "bad": []} for _ in items
        ]
        missed: dict[int, set[int]] = {index: set() for index in range(len(items))}
        wanted = {index: WIDTHS[0] for index in missed}
        while wanted:
            width = max(wanted.values())
            pending = [index for index, next_ in wanted.items() if next_ == width]
            cases = self.cases(width)
            launches = self.launches([items[i] for i in pending], cases, ("grade", width))
            # By itself: where an empty batch raises, the others need not be tried one by one.
            parts = [[x for x in launches if bool(x.m) == rows] for rows in (False, True)]
            ran = [self.run("serial", cases, part, Budget(2, 2, 0.0)) for part in parts]
            summaries = self._summaries("serial", len(pending), [*ran[0], *ran[1]], cases)
            changed = [sum(o.changed_inputs for o in outcomes) for outcomes in ran]
            for place, index in enumerate(pending):
                summary, result = summaries[place], results[index]
                result["launches"] += summary["launches"]
                result.setdefault("example", summary.get("example"))
                if found := changed[max(items[index].ms) > 0]:
                    result["changed_inputs"] = found
                if "error" in summary:
                    result.update(width=None, bad=[], error=summary["error"])
                    del wanted[index]
                    continue
                if summary["bad"]:
                    missed[index].add(width)
                    far = self._far(cases, [x for x in launches if x.item == place])
                    grave = any(b["kind"] != "wrong" for b in summary["bad"])
                    if far or grave or width == WIDTHS[-1]:
                        result.update(width=None, bad=summary["bad"], tile_error=far)
                        del wanted[index]
                        continue
                else:
                    result.update(width=width, problems=summary["problems"])
                next_ = next_width(result["width"], missed[index])
                if next_ is None:
                    del wanted[index]
                else:
                    wanted[index] = next_
        self._grade_rounding(items, results)
        return results

    def _grade_rounding(self, items: Sequence[Item], results: Sequence[Result]) -> None:
        """Tell outputs that are rounded otherwise than to nearest from a short accumulator.

        Only of items that came out no wider than the outputs themselves: what is exact at any width
        above them rounds to nearest.
        """
        tried = []
        for item, result in zip(items, results, strict=True):
            # Other m of the tactic may have shown it: few outputs are too few to tell.
            self._otherwise.setdefault(item.tactic, False)
            wide = (result["width"] or 0) > WIDTHS[-1]
            grave = "error" in result or any(bad["kind"] != "wrong" for bad in result["bad"])
            if not wide and not grave:
                tried.append((item, result))
        if not tried:
            return
        found = self._rounds_otherwise([item for item, _ in tried], self._loose())
        for (item, result), otherwise in zip(tried, found, strict=True):
            if otherwise:
                self._otherwise[item.tactic] = True
                result.update(width=WIDTHS[0], bad=[], rounding="not to nearest")
                result["problems"] = len(item.ms)
                result.pop("tile_error", None)

    def _loose(self) -> list[Case]:
        """The widest cases, in which neighbours of each sum are right, too."""
        return [_with_neighbours(each) for each in self.cases(WIDTHS[0])]

    def _rounds_otherwise(self, items: Sequence[Item], loose: Sequence[Case]) -> list[bool]:
        """Of each item, whether exact problems of the full width come out as a neighbour of each
        sum, and not always as the nearest."""
        cases = self.cases(WIDTHS[0])
        launches = [
            replace(launch, item=place)
            for place, item in enumerate(items)
            # The windows of an item are its own, whichever others there are.
            for launch in self.launches([replace(item, width=WIDTHS[0])], cases, ("rounding",))
        ]
        strict, near = (
            self.run("serial", mine, launches, Budget(1, 1, 0.0)) for mine in (cases, loose)
        )
        if any(o.errors for o in (*strict, *near)):
            if len(items) == 1:
                return [False]
            # What one item raises is no word on the others.
            return [self._rounds_otherwise([item], loose)[0] for item in items]
        clean: list[tuple[list[bool], list[bool]]] = [([], []) for _ in items]
        for side, part in enumerate((strict, near)):
            for launch, report in (each for o in part for each in o.reports):
                clean[launch.item][side].append(report.clean)
        return [bool(loosely) and all(loosely) and not all(strictly) for strictly, loosely in clean]

    def _judged_by_neighbours(self, item: Item) -> bool:
        """Whether the item's outputs are rounded otherwise: known from its grading, or found out
        where another worker graded it."""
        if item.width != WIDTHS[0] or not max(item.ms):
            return False  # nothing is rounded, and an empty output tells nothing of others
        if item.tactic not in self._otherwise:
            edges = replace(item, ms=tuple(dict.fromkeys((item.ms[0], item.ms[-1]))))
            self._otherwise[item.tactic] = self._rounds_otherwise([edges], self._loose())[0]
        return self._otherwise[item.tactic]

    def _far(self, cases: Sequence[Case], launches: Sequence[Launch]) -> float | None:
        """The worst relative tile error where it exceeds the limit, else None."""
        limit, worst = tile_limit(self.problem.k), 0.0
        some = [launch for launch in launches if launch.m]
        for batch in batches(cases, some, max(self.memory // 4, 1)):
            made = []
            for launch in batch:
                call = bind(self.backend, cases, launch)
                call.enqueue()
                made.append((launch, call.slot.out))
            # All of a batch in one piece: each wait costs a turn of whoever shares the device.
            plain = torch.stack([self._largest_error(cases, *each) for each in made]).tolist()
            beyond = [each for each, error in zip(made, plain, strict=True) if not error <= limit]
            if beyond:
                again = [self._largest_error(cases, *each, by_spread=True) for each in beyond]
                worst = max(worst, *torch.stack(again).tolist())
        return worst if not worst <= limit else None

    def _largest_error(
        self, cases: Sequence[Case], launch: Launch, out: torch.Tensor, by_spread: bool = False
    ) -> torch.Tensor:
        """float64 (): the largest tile error of what came of a launch, infinite for NaN; with
        `by_spread`, no larger for sums that cancel out. Enqueues only."""
        chosen = cases[launch.case]
        right = chosen.expectation.window(launch.offset, launch.offset + launch.m)
        ref = right.lo.float() if right.ref is None else right.ref
        sizes = None
        if by_spread:
            operands = replace(chosen.operands, a=chosen.rows(launch.offset, launch.m))
            sizes = spread(operands, self.problem)
        error = tile_error(out, ref, sizes)
        return torch.where(error.isnan(), float("inf"), error).max()

    def _tile_error(self, cases: Sequence[Case], launch: Launch) -> float:
        """The largest tile error of one launch; by spread where it exceeds the limit without."""
        if not launch.m:
            return 0.0
        call = bind(self.backend, cases, launch)
        call.enqueue()
        error = float(self._largest_error(cases, launch, call.slot.out))
        if not error <= tile_limit(self.problem.k):
            error = float(self._largest_error(cases, launch, call.slot.out, by_spread=True))
        return error

    def family(self, name: str, items: Sequence[Item]) -> list[Result]:
        """One data family, serially: every element where the width is 24, every tile else.

        Rounding the global scale to bf16, or the sum before it is scaled, is a grade (`alpha`,
        `roundings`), not a fault: an item that misses the bound is judged again for each.
        """
        seed = derive(self.seed, self.problem, "family", name)
        self.progress(f"drawing {name} data")
        drawn = case(self.backend, self.problem, draw(self.problem, name, seed, self.device.torch))
        launches = self.launches(items, [drawn], name)
        outcomes = self.run("serial", [drawn], launches, Budget(1, 1, 0.0))
        results = self._summaries("serial", len(items), outcomes, [drawn])
        missed = {
            index
            for index, result in enumerate(results)
            if result["bad"] and all(bad["kind"] == "wrong" for bad in result["bad"])
        }
        # What has one product an output is exact for every accumulator: no narrow one excuses it.
        exact = drawn.expectation.exact
        narrow = {index for index in missed if items[index].width < WIDTHS[0] and not exact}
        for index in narrow:
            # A narrower accumulator may rightly miss the bound of each element.
            results[index]["bad"] = self._bad_tiles(drawn, launches, index)
            results[index]["bad_launches"] = len(results[index]["bad"])
        left = missed - narrow
        for grade, rounded in _rounded(drawn) if left else ():
            again = [launch for launch in launches if launch.item in left]
            outcomes = self.run("serial", [rounded], again, Budget(1, 1, 0.0))
            for index in sorted(left):
                judged = summarise(index, outcomes, [rounded])
                if not judged["bad"] and "error" not in judged:
                    results[index] = {**judged, **grade}
                    left.discard(index)
            if not left:
                break
        changed = drawn.unchanged.changed()
        for result in results if changed else ():
            result["changed_inputs"] = changed
        for index, result in enumerate(results) if name == MEASURED else ():
            if not result["bad"] and "error" not in result:
                result["accumulation"] = self._accumulation(drawn, launches, index)
        return results

    def _accumulation(self, chosen: Case, launches: Sequence[Launch], item: int) -> float:
        """How far an item's rows are off by how their sums were added up: what the witness allows
        for in production."""
        worst = 0.0
        for launch in launches:
            if launch.item == item and launch.m:
                call = bind(self.backend, [chosen], launch)
                call.enqueue()
                right = chosen.expectation.window(launch.offset, launch.offset + launch.m)
                if right.ref is not None:
                    worst = max(worst, accumulation(call.slot.out, right.ref))
        return worst

    def _bad_tiles(self, chosen: Case, launches: Sequence[Launch], item: int) -> list[Result]:
        found = []
        for launch in launches:
            if launch.item == item:
                error = self._tile_error([chosen], launch)
                if not error <= tile_limit(self.problem.k):
                    described = {**launched(launch, [chosen]), "tile_error": error}
                    found.append({**described, "kind": "wrong"})
        return found[:MOST_BAD]

    def regime(
        self, name: str, items: Sequence[Item], budget: Budget, aim: LaunchAim | None = None
    ) -> Result:
        """Run one regime on exact data of each item's width; items of one width share a chain.

        With an `aim`, on many weights, with rows that are drawn anew on the way.
        """
        results: list[Result] = [{} for _ in items]
        seconds = 0.0
        proof: list[dict[str, Any]] = []
        missed: list[str] = []
        kinds = [
            (item.width, self._judged_by_neighbours(item), aim is None or max(item.ms) <= SMALL_M)
            for item in items
        ]
        kinds = _with_company(kinds, [max(item.ms) > 0 for item in items])
        for width, loosely, small in sorted(set(kinds), reverse=True):
            chosen = [i for i, kind in enumerate(kinds) if kind == (width, loosely, small)]
            field = _Field(self.cases(width), None)
            if aim and not loosely:
                field = self._field(width, small, name in COSTLY)
            cases = field.cases
            if loosely:
                cases = [_with_neighbours(each) for each in cases]
            mine = [items[i] for i in chosen]
            tag = (name, width, *(("aim", small) if aim else (0,)))
            per_item = CHAIN[self.device.kind][0 if small else 1] if aim else 0
            launches = self.launches(mine, cases, tag, per_item)
            if name == EVERY_M:
                launches.sort(key=lambda launch: launch.m)  # batches of m that are near
            else:
                random.Random(derive(self.seed, *tag)).shuffle(launches)
            own = _towards(aim, name, launches, field.redraw) if aim else budget
            outcomes = self.run(name, cases, launches, own)
            changed = sum(o.changed_inputs for o in outcomes)
            summaries = self._summaries(name, len(chosen), outcomes, cases)
            for place, index in enumerate(chosen):
                results[index] = summaries[place]
                if changed:
                    results[index]["changed_inputs"] = changed
                if graded := [found for o in outcomes for found in o.graded]:
                    results[index]["graded"] = graded
            seconds += sum(o.seconds for o in outcomes)
            proof.extend(o.proof for o in outcomes if o.proof)
            missed.extend(o.not_exercised for o in outcomes if o.not_exercised)
            if field.redraw and field.redraw.missed:
                missed.append("answers drawn on the device are not those of float64")
                for index in chosen:
                    results[index]["bad"] = []
        return {
            "items": results,
            "seconds": seconds,
            "proof": proof,
            "not_exercised": missed[0] if missed else None,
        }

    def misses_tiles(self, cases: Sequence[Case], launch: Launch) -> bool:
        """Whether one launch misses the tile error that a narrow accumulator is allowed."""
        return not self._tile_error(cases, launch) <= tile_limit(self.problem.k)

    def run(
        self, name: str, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
    ) -> list[Outcome]:
        """Run a regime in batches that fit in memory; where one raises, each item on its own."""
        limit = self.memory // 2 // COPIES.get(name, 1)
        split = batches(cases, launches, max(limit, 1))
        seconds = budget.seconds / max(1, len(split))
        alive = partial(self.progress, f"{name}: alive")
        share = replace(budget, seconds=seconds, beat=alive)
        outcomes: list[Outcome] = []
        for batch in split:
            self.progress(f"{name}: {len(batch)} launches")
            before = budget.redraw.draws if budget.redraw else 0
            try:
                found = WHOLE[name](self.backend, cases, batch, share)
                if budget.redraw:
                    found = _of_draws(found, before, budget.redraw.draws)
                outcomes.append(found)
            except NotApplicable:
                raise
            except (RuntimeError, BackendRaised) as error:
                _raise_if_poisoned(self.device, error)
                alone = self._one_by_one(name, cases, batch, share)
                if failed := {item for o in alone for item in o.errors}:
                    outcomes += [o for o in alone if o.errors]
                    rest = [x for x in batch if x.item not in failed]
                    outcomes += self._the_rest(name, cases, rest, share)
                else:
                    outcomes += [*alone, _together_only(error, batch, cases)]
            finally:
                if budget.redraw:
                    budget.redraw.forget()
        return outcomes

    def _the_rest(
        self, name: str, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
    ) -> list[Outcome]:
        """What is left of a batch without the items that raised, together again: a launch alone
        shows little of most regimes."""
        if not launches:
            return []
        self.progress(f"{name}: {len(launches)} launches")
        before = 0
        if budget.redraw:
            budget.redraw.forget()  # what the attempt before had drawn anew
            before = budget.redraw.draws
        try:
            found = WHOLE[name](self.backend, cases, launches, budget)
        except NotApplicable:
            return []
        except (RuntimeError, BackendRaised) as error:
            _raise_if_poisoned(self.device, error)
            alone = self._one_by_one(name, cases, launches, budget)
            failed = any(o.errors for o in alone)
            return alone if failed else [*alone, _together_only(error, launches, cases)]
        return [_of_draws(found, before, budget.redraw.draws) if budget.redraw else found]

    def _one_by_one(
        self, name: str, cases: Sequence[Case], launches: Sequence[Launch], budget: Budget
    ) -> list[Outcome]:
        outcomes = []
        for launch in launches:
            self.progress(f"{name}: m={launch.m} alone")
            try:
                once = Budget(1, 1, 0.0, budget.beat)
                outcomes.append(WHOLE[name](self.backend, cases, [launch], once))
            except (RuntimeError, BackendRaised) as error:
                _raise_if_poisoned(self.device, error)
                blamed = {"kind": _kind(error), "message": sentence(error)}
                errors = {launch.item: {**launched(launch, cases), **blamed}}
                outcomes.append(Outcome(0, (), 0, 0.0, errors=errors))
        return outcomes

    def open_timing(self, items: Sequence[Item], cache_bytes: int) -> list[float | None]:
        """Prepare each item's m for timing; the host microseconds of a call of each item."""
        operands = self.cases(WIDTHS[0])[0].operands
        copies = weight_copies(self.problem, cache_bytes, self.device.kind)
        self.progress(f"preparing {copies} copies of the weight")
        weights = [operands.weight.clone() for _ in range(copies)]
        with blame(self.backend):
            states = [self.backend.prepare(weight, self.problem) for weight in weights]
        shared = buffers(operands, self.problem)
        self._timed = []
        try:
            for item in items:
                self.progress(f"timing m={item.ms[-1]}")
                parts = [
                    Timed(self.backend, states, shared, self.problem.at(m), item.tactic)
                    for m in item.ms
                ]
                self._timed.append(TimedRange(parts))
        except BaseException:
            self._timed = []  # what was captured so far holds memory
            raise
        return [timed.host_us for timed in self._timed]

    def sample(self, indices: Sequence[int]) -> list[float]:
        """One timing sample of each item, in microseconds per launch."""
        return [self._timed[index].sample() for index in indices]

    @property
    def timed(self) -> Sequence[TimedRange]:
        """What is being timed, in the order of `open_timing`'s items."""
        return self._timed

    def close_timing(self) -> list[list[tuple[int, float]]]:
        """Let go of what was timed; of each item (m, median microseconds)."""
        found = [each.by_m() for each in self._timed]
        self._timed = []
        if self.device.kind == "cuda":
            torch.cuda.empty_cache()
        return found


@dataclass(frozen=True, slots=True)
class _Field:
    """Cases that launches are spread over, what draws their rows anew, if anything can, and about
    how many bytes of the device they take."""

    cases: list[Case]
    redraw: Redraw | None
    size: int = 0


def field_rows(rows: int, count: int) -> list[int]:
    """Rows of the pools of so many weights that launches of up to `rows` rows are spread over.

    Answers cost as much as the rows they are of, so only one weight in four serves every m; each
    serves the smallest.
    """
    least = min(rows, 2 * SMALL_M + SPARE_ROWS)
    return [max(least, rows >> index % 4) for index in range(count)]


def _bytes_of_case(problem: Problem) -> int:
    """Device memory of a case, about: weight, what was prepared of it, rows and their answers."""
    weight = problem.n * problem.k
    return 2 * weight + problem.m * (4 * problem.k + 2 * problem.n) + (1 << 20)


Kind = tuple[int, bool, bool]


def _with_company(kinds: Sequence[Kind], real: Sequence[bool]) -> list[Kind]:
    """Those of items without rows as that of the first that is `real` and small, if there is one:
    what comes of no rows is right at any width, and a chain of it alone shows less."""
    first = next((k for k, r in zip(kinds, real, strict=True) if r and k[2]), None)
    return [kind if r or first is None else first for kind, r in zip(kinds, real, strict=True)]


def _towards(
    aim: LaunchAim, name: str, launches: Sequence[Launch], redraw: Redraw | None
) -> Budget:
    """How often a chain is launched, and its data drawn anew, so that each item reaches `aim`.

    An empty batch is one problem, however often it is drawn: it goes with the others.
    """
    counts = Counter(x.item for x in launches if x.m) or Counter(x.item for x in launches)
    fewest = min(counts.values())
    times = -(-aim.launches // (fewest * CALLS.get(name, 1)))
    draws = max(1, -(-aim.problems // fewest) - 1)
    return Budget(1, times, aim.seconds * len(counts), redraw=redraw, draws=draws)


def _of_draws(found: Outcome, first: int, last: int) -> Outcome:
    """An outcome that says how often data were drawn anew, and in which draw failures were."""
    reports = tuple((x, replace(r, draw=first + r.draw)) for x, r in found.reports)
    return replace(found, reports=reports, draws=last - first)


def _kind(error: BaseException) -> str:
    """What an exception is: having no memory left is nobody's fault."""
    return "out of memory" if is_out_of_memory(error) else "error"


def _together_only(
    error: RuntimeError | BackendRaised, launches: Sequence[Launch], cases: Sequence[Case]
) -> Outcome:
    """What raised together and never alone: the conditions of the regime are the cause."""
    blamed = {"kind": _kind(error), "message": sentence(error)}
    errors = {x.item: {**launched(x, cases), **blamed} for x in launches}
    return Outcome(0, (), 0, 0.0, errors=errors)


def next_width(best: int | None, missed: set[int]) -> int | None:
    """The width to try next: by halves between the best so far and those missed; None at the end.

    What an accumulator of some bits gets right, one of more bits does, so it takes few tries.
    """
    open_ = [w for w in WIDTHS if (best or 0) < w < min(missed, default=WIDTHS[0] + 1)]
    return open_[len(open_) // 2] if open_ and missed else None


def _with_neighbours(drawn: Case) -> Case:
    """The same case for kernels that do not round to nearest."""
    return replace(drawn, expectation=faithful(drawn.operands, drawn.problem))


def _rounded(drawn: Case) -> Iterator[tuple[Result, Case]]:
    """The same case for kernels that round once more than needed, and what to call that.

    The sum is rounded to 16 bits and then multiplied with alpha, which is itself rounded to bf16
    or not.
    """
    alpha = alpha_of(drawn.operands)
    rounded = float(torch.tensor(alpha, dtype=torch.float64).to(torch.bfloat16))
    if rounded != alpha:
        yield {"alpha": "bf16"}, _expecting(drawn, rounded)
    yield {"roundings": 2}, _expecting(drawn, alpha)


def _expecting(drawn: Case, alpha: float) -> Case:
    return replace(
        drawn, expectation=expect(drawn.operands, drawn.problem, alpha=alpha, roundings=2)
    )


class Poisoned(Exception):
    """The CUDA context is lost; the message is what lost it."""


def _raise_if_poisoned(device: Device, error: Exception) -> None:
    if device.kind != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device.torch).add_(1).item()
    except Exception:
        raise Poisoned(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """The first line of an exception, with its type."""
    if isinstance(error, BackendRaised):
        return str(error)[:300]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
