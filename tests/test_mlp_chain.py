"""Two GEMMs with SiLU between, m varying, in each other's memory: what that shows on a CPU."""

from __future__ import annotations

import pytest
import rogues
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.backends.torch.dequant import torch_dequant, torch_dequant_w4a4
from fp4tune.probes.check.sweep import SlotReport, slot
from fp4tune.probes.check.tilemap import unpack_tiles
from fp4tune.probes.data import draw, exact
from fp4tune.probes.formats import quantise
from fp4tune.probes.launch.case import Launch, case
from fp4tune.probes.launch.item import Item
from fp4tune.probes.launch.outcome import Budget, NotApplicable, Outcome
from fp4tune.probes.launch.summary import summarise
from fp4tune.probes.problem import NVFP4, Device, Problem
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.regimes.mlp.judge import ByTiles, TileJudge
from fp4tune.probes.regimes.mlp.layers import Arena, second_tactics, silu_on_cpu
from fp4tune.probes.worker.session import OpenLayer

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = Problem("nvfp4", 11, 320, 256)
K2 = PROBLEM.n // 2
MS = (1, 8, 2, 5, 0, 3, 8)
TWICE = Budget(2, 2, 0.0)


def run(backend, ms=MS, problem=PROBLEM, width=24, budget=TWICE):
    cases = [case(backend, problem, exact(problem, width, seed, "cpu")) for seed in (1, 2)]
    launches = [Launch(i % 2, i % (problem.m - m + 1), m, "default", i) for i, m in enumerate(ms)]
    return REGIMES["mlp-chain"](backend, cases, launches, budget)


def stages(outcome) -> set[str]:
    """Which GEMMs were wrong."""
    return {report.stage.split()[0] for _, report in outcome.reports if not report.clean}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("activation", ["bf16", "fp4"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_right_backend_is_right_in_both_gemms(format, activation, dtype):
    backend = torch_dequant() if activation == "bf16" else torch_dequant_w4a4()
    outcome = run(backend, problem=Problem(format, 11, 320, 256, activation, dtype))
    assert not stages(outcome) and not outcome.changed_inputs and not outcome.errors
    assert outcome.not_exercised is None and outcome.repeats == 2
    assert len(outcome.reports) == 2 * len(MS)
    assert outcome.proof["second"] == [256, K2] and outcome.proof["judged_by_tiles"] == 0


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, PROBLEM.m), min_size=1, max_size=6))
def test_any_sequence_of_m_is_checked_stage_by_stage(ms):
    outcome = run(rogues.Good(), ms)
    assert not stages(outcome)
    assert [launch.m for launch, _ in outcome.reports] == [m for m in ms for _ in range(2)]


@pytest.mark.parametrize(
    "rogue",
    [
        rogues.SkipsTheTail,
        rogues.OneWrongElement,
        rogues.DropsABlock,
        rogues.IgnoresAlpha,
        rogues.OddUnwritten,
        rogues.CachedByPointer,
    ],
)
def test_a_wrong_gemm_is_caught(rogue):
    assert stages(run(rogue()))


def test_inputs_that_are_changed_are_counted():
    assert run(rogues.ModifiesInput()).changed_inputs


class RowsOfTheCallBefore(rogues.Good):
    """Writes as many rows as the call before asked for: right as long as m never changes."""

    rows: int | None = None

    def run(self, state, a, out, tactic):
        rows, self.rows = a.shape[0] if self.rows is None else self.rows, a.shape[0]
        super().run(state, a[:rows], out[:rows], tactic)


def test_state_kept_between_calls_of_different_m_is_caught():
    assert not stages(run(RowsOfTheCallBefore(), (5, 5, 5)))
    assert stages(run(RowsOfTheCallBefore(), (3, 5, 8)))


class WrongSecond(rogues.Good):
    """Leaves out 16 along k, in the shape of the second GEMM only."""

    def run(self, state, a, out, tactic):
        if a.shape[1] == K2:
            a = a.clone()
            a[:, :16] = 0
        super().run(state, a, out, tactic)


class WrongSecondInShortSums(rogues.ShortSums):
    def run(self, state, a, out, tactic):
        if a.shape[1] == K2:
            a = torch.cat((torch.zeros_like(a[:, :16]), a[:, 16:]), dim=1)
        super().run(state, a, out, tactic)


def test_the_stage_that_is_wrong_is_named():
    outcome = run(WrongSecond())
    assert stages(outcome) == {"second"}
    assert {r.stage for _, r in outcome.reports} == {
        "first GEMM",
        f"second GEMM, n=256, k={K2}",
    }
    assert all(r.clean == (not x.m) for x, r in outcome.reports if r.stage != "first GEMM")


def test_a_second_result_behind_a_wrong_first_one_is_not_blamed():
    outcome = run(rogues.SkipsTheTail())
    wrong = {x.item for x, r in outcome.reports if r.stage == "first GEMM" and not r.clean}
    assert wrong and not wrong & {x.item for x, r in outcome.reports if r.stage != "first GEMM"}


def test_short_sums_are_judged_by_tiles_and_still_caught():
    right = run(rogues.ShortSums(), width=8)
    assert not stages(right) and right.proof["judged_by_tiles"] > 0
    assert stages(run(WrongSecondInShortSums(), width=8)) == {"second"}


def test_what_a_backend_raises_comes_out():
    with pytest.raises(RuntimeError, match="no plan for m=2"):
        run(rogues.RaisesAtTwo())


# -- memory


def test_memory_is_passed_on_as_an_engine_does():
    places: list[tuple[int, int]] = []

    class Watches(rogues.Good):
        def run(self, state, a, out, tactic):
            places.append((a.data_ptr(), out.data_ptr()))
            super().run(state, a, out, tactic)

    run(Watches(), (3, 5, 8, 2, 1), budget=Budget(1, 1, 0.0))
    chain = places[-10:]
    for first, second in zip(chain[::2], chain[1::2], strict=True):
        assert first[1] == second[1]  # the second result replaces the first
    results = [out for _, out in chain[::2]]
    assert results[0] == results[1] != results[2] == results[3]
    assert len({a for a, _ in chain}) == 4  # two buffers in turn, before each of the two GEMMs


def test_an_arena_is_used_from_its_start_again_and_has_an_end():
    arena = Arena(2048, torch.device("cpu"))
    one, two = (arena.like(torch.empty(3, 5, dtype=torch.bfloat16)) for _ in range(2))
    assert one.data_ptr() < two.data_ptr() and one.is_contiguous() and one.isnan().all()
    arena.restart()
    assert arena.like(torch.empty(1, 4)).data_ptr() == one.data_ptr()
    with pytest.raises(RuntimeError, match="do not fit"):
        arena.like(torch.empty(4096))


# -- quantisers


class Quantises(rogues.Good):
    """W4A4 with a quantiser of its own; with `stale`, one that takes a known buffer as known."""

    activation = "fp4"

    def __init__(self, stale: bool = False) -> None:
        super().__init__()
        self.floor = torch_dequant_w4a4()
        self.stale = stale
        self.known: dict = {}
        self.calls = 0

    def quantise(self, a, global_scale):
        self.calls += 1
        key = (a.data_ptr(), a.shape)
        if not (self.stale and key in self.known):
            self.known[key] = quantise(a, NVFP4, global_scale)
        return self.known[key]

    def run(self, state, a, out, tactic):
        self.floor.run(state, a, out, "fp32")


W4A4 = Problem("nvfp4", 11, 320, 256, "fp4")


def test_a_backends_own_quantiser_is_part_of_the_chain():
    backend = Quantises()
    outcome = run(backend, problem=W4A4)
    assert not stages(outcome) and outcome.proof["quantised_by"] == "the backend"
    assert backend.calls >= 2 * len(MS)
    assert run(torch_dequant_w4a4(), problem=W4A4).proof["quantised_by"] == "the chain"


def test_a_quantiser_that_gives_what_it_gave_before_is_caught():
    assert stages(run(Quantises(stale=True), (8, 8, 8, 8, 8), W4A4)) == {"second"}


# -- where there is none


@pytest.mark.parametrize("n", [321, 264, 24])
def test_a_shape_without_a_second_gemm_is_not_applicable(n):
    with pytest.raises(NotApplicable, match=f"half of n={n} is no k of a second nvfp4 GEMM"):
        run(rogues.Good(), problem=Problem("nvfp4", 11, n, 256))


def test_a_second_shape_the_backend_does_not_support_is_not_applicable():
    class OneShape(rogues.Good):
        def unsupported(self, problem, device):
            return None if problem.k == PROBLEM.k else f"it has no plan for k={problem.k}"

    with pytest.raises(NotApplicable, match=f"n=256, k={K2}: it has no plan for k={K2}"):
        run(OneShape())


def test_data_without_one_right_answer_is_not_applicable():
    backend = rogues.Good()
    drawn = case(backend, PROBLEM, draw(PROBLEM, "realistic", 1, "cpu"))
    with pytest.raises(NotApplicable, match="right answer"):
        REGIMES["mlp-chain"](backend, [drawn], [Launch(0, 0, 2, "default", 0)], TWICE)


# -- tactics and judging


class ManyTactics(rogues.Good):
    """Offers other tactics at every m, and takes those of its own m only."""

    used: set[str]

    def __init__(self) -> None:
        super().__init__()
        self.used = set()

    def tactics(self, problem, device):
        return (f"only-{problem.m}",)

    def run(self, state, a, out, tactic):
        self.used.add(tactic)
        super().run(state, a, out, tactic)


def test_few_tactics_of_the_second_gemm_are_used():
    backend = ManyTactics()
    launches = [Launch(0, 0, m, "default", 0) for m in range(9)]
    found = second_tactics(backend, PROBLEM, Device("cpu"), launches)
    assert len({choices[0] for choices in found}) == 3
    assert all(
        choices[-1] == f"only-{max(x.m, 1)}" for x, choices in zip(launches, found, strict=True)
    )
    assert not stages(run(backend, tuple(range(9))))
    assert len(backend.used - {"default"}) == 3


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6), st.integers(1, 3))
def test_a_tile_that_is_off_is_marked_and_no_other(m, n, where, times):
    ref = torch.ones(m, n)
    right = ref.bfloat16()
    judged = ByTiles(slot(right, right), ref, 1e-2)
    judge = TileJudge([judged])
    row, column = where % m // 128, where % n // 128
    for _ in range(times):
        judged.slot.out.copy_(right)
        judge.sweep()
    assert judge.reports()[0].clean
    judged.slot.out.copy_(right)
    tile = judged.slot.out[128 * row :, 128 * column :][:128, :128]
    tile.mul_(2)
    judge.sweep()
    (report,) = judge.reports()
    assert report.tiles == ((row, column, tile.numel()),)
    assert (report.wrong, report.bad_launches) == (tile.numel(), 1)


def test_a_tile_that_nobody_wrote_is_off():
    right = torch.ones(4, 8).bfloat16()
    judge = TileJudge([ByTiles(slot(right, right), right.float(), 1e-2)])
    judge.sweep()
    assert not judge.reports()[0].clean


def test_silu_and_multiply_is_torchs():
    y = torch.randn(5, 64)
    hidden = torch.empty(5, 32)
    silu_on_cpu(y, 0.5, hidden)
    gate, up = (0.5 * y).chunk(2, dim=1)
    torch.testing.assert_close(hidden, torch.nn.functional.silu(gate) * up)


def test_a_layer_reports_the_stage():
    layer = OpenLayer(WrongSecond(), Device("cpu"), PROBLEM, 3, 1 << 28, lambda text: None)
    (result,) = layer.regime("mlp-chain", [Item((2, 5), "default")], TWICE)["items"]
    assert {bad["stage"] for bad in result["bad"]} == {f"second GEMM, n=256, k={K2}"}


def test_each_stage_that_is_wrong_is_described_whatever_its_shape():
    layer = OpenLayer(WrongSecond(), Device("cpu"), PROBLEM, 3, 1 << 28, lambda text: None)
    cases = layer.cases(8)[:1]
    launches = [Launch(0, 0, 2, "default", 0)] * 6
    own = SlotReport(1, 0, 0, 1, 0, None, ((0, 0, 1),))
    wide = SlotReport(5, 0, 0, 1, 0, None, ((2, 9, 5),), stage="gemm1", shape=(300, 1200))
    reports = tuple(zip(launches, [own] * 5 + [wide], strict=True))
    found = summarise(0, [Outcome(1, reports, 0, 0.1)], cases)
    assert found["bad_launches"] == 6
    assert [bad.get("stage") for bad in found["bad"]] == [None, None, None, "gemm1"]
    seen = unpack_tiles(found["bad"][-1]["map"])
    assert (seen.m, seen.n, seen.bad) == (300, 1200, {(2, 9)})
    assert unpack_tiles(found["bad"][0]["map"]).n == PROBLEM.n
