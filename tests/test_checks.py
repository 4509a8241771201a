"""The fused check: every element, told apart by what went wrong, the same on CPU and GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.check.sweep import (
    GUARD,
    POISON,
    TILE,
    Checker,
    Slot,
    Unchanged,
    _tile_table,
    changed_tensors,
    slot,
    uploaded,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]


def place(m: int, n: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Slot:
    right = torch.arange(m * n, device=device).remainder(100).to(dtype).view(m, n)
    return slot(right, right)


def seen(*slots: Slot):
    checker = Checker(slots)
    checker.sweep()
    return checker.reports()


def test_the_poison_is_a_nan_in_both_dtypes():
    bits = torch.tensor([POISON], dtype=torch.int16)
    assert all(bool(bits.view(dtype).isnan()) for dtype in DTYPES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", [(1, 1), (1, 128), (17, 200), (129, 257), (300, 64)])
def test_a_right_output_is_clean_and_poisoned_again(device, dtype, m, n):
    s = place(m, n, device, dtype)
    s.out.copy_(s.lo)
    (report,) = seen(s)
    assert report.clean and report.tiles == () and report.witness is None
    assert bool((s.out.view(torch.int16) == POISON).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untouched_output_is_unwritten_everywhere(device, dtype):
    (report,) = seen(place(130, 130, device, dtype))
    assert report.unwritten == report.wrong == 130 * 130
    assert report.not_finite == 0
    assert report.tiles == ((0, 0, 128 * 128), (0, 1, 256), (1, 0, 256), (1, 1, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_computed_nan_or_infinity_is_not_finite_rather_than_unwritten(device, dtype, value):
    s = place(40, 40, device, dtype)
    s.out.copy_(s.lo)
    s.out[3, 7] = value
    (report,) = seen(s)
    assert (report.wrong, report.unwritten, report.not_finite) == (1, 0, 1)
    assert report.witness is not None and report.witness[:2] == (3, 7)


@pytest.mark.parametrize("device", DEVICES)
def test_one_wrong_element_is_found_with_its_place_and_value(device):
    s = place(200, 300, device)
    s.out.copy_(s.lo)
    s.out[150, 299] += 1
    (report,) = seen(s)
    expected = float(s.lo[150, 299])
    assert report.wrong == 1 and report.tiles == ((1, 2, 1),)
    assert report.witness == (150, 299, float(s.lo[150, 299] + 1), expected, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_an_interval_contains_both_its_ends(device):
    lo = torch.full((4, 8), -1.0, dtype=torch.bfloat16, device=device)
    s = slot(lo, -lo)
    s.out.fill_(1.0)
    s.out[0].fill_(-1.0)
    assert seen(s)[0].clean
    s.out.fill_(1.0)
    s.out[2, 5] = 1.0078125
    assert seen(s)[0].wrong == 1


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_of_either_sign_are_equal(device):
    zero = torch.zeros((4, 8), dtype=torch.bfloat16, device=device)
    s = slot(zero, zero)
    s.out.fill_(-0.0)
    assert seen(s)[0].clean


@pytest.mark.parametrize("device", DEVICES)
def test_counts_add_up_over_sweeps_and_slots(device):
    slots = [place(10, 20, device), place(140, 20, device), place(0, 20, device)]
    checker = Checker(slots)
    for sweep in range(5):
        for s in slots:
            s.out.copy_(s.lo)
        if sweep in (1, 4):
            slots[1].out[:, 0] = 77.0
        checker.sweep()
    first, second, empty = checker.reports()
    assert checker.sweeps == 5
    assert first.clean and empty.clean
    right = int((slots[1].lo[:, 0] == 77.0).sum())
    assert second.wrong == 2 * (140 - right)
    assert second.bad_launches == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", [-1, 0])
def test_writing_around_the_output_is_found(device, where):
    s = place(8, 64, device)
    s.out.copy_(s.lo)
    guard = (s.guarded.numel() - s.out.numel()) // 2
    s.guarded[guard - 1 if where else guard + s.out.numel()] = 1
    (report,) = seen(s)
    assert report.guard == 1 and report.wrong == 0 and not report.clean


def test_the_guard_pattern_differs_from_the_poison():
    assert GUARD != POISON


@pytest.mark.parametrize("device", DEVICES)
def test_a_modified_input_is_noticed_even_where_the_value_compares_equal(device):
    tensors = [torch.zeros(5, device=device), torch.ones(3, dtype=torch.uint8, device=device)]
    watch = Unchanged(tensors)
    assert watch.changed() == 0
    tensors[0][2] = -0.0
    assert watch.changed() == 1


REMEMBERED = (torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64)


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@settings(deadline=None)
def test_each_changed_tensor_is_counted_at_any_size_and_address(device, data):
    """Bytes are compared eight at a time where they can be, and no place is left out."""

    def disturbed(tensors: list[torch.Tensor]) -> int:
        """Flip a bit in some of the tensors; of how many."""
        chosen = [each for each in tensors if each.numel() and data.draw(st.booleans())]
        for each in chosen:
            bits = each.view(torch.uint8)
            bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        return len(chosen)

    watched, changed = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        tensors = []
        for _ in range(data.draw(st.integers(0, 4))):
            size, before = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 9))
            dtype = data.draw(st.sampled_from(REMEMBERED))
            whole = torch.zeros(before + size, dtype=dtype, device=device)
            tensors.append(whole[before:])
        watch = Unchanged(tensors)
        assert watch.changed() == 0
        changed += disturbed(tensors)
        watch.look(tensors)
        watch.renew(tensors)
        changed += disturbed(tensors)
        watched.append(watch)
    now = sum(watch.changed() for watch in watched[1:])
    assert now + changed_tensors(watched[:1]) == changed
    # What is as it was once more is noted no longer.
    for watch in watched:
        watch.renew([t for t, _ in watch._pairs])
    assert changed_tensors(watched) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_nan_that_stays_is_no_change_and_another_payload_is_one(device):
    tensors = [torch.full((size,), float("nan"), device=device) for size in (3, 4)]
    watch = Unchanged(tensors)
    assert changed_tensors([watch, watch]) == 0
    tensors[0].view(torch.int32)[2] += 1
    tensors[1].view(torch.int32)[1] += 1
    assert bool(tensors[0].isnan().all() and tensors[1].isnan().all())
    assert changed_tensors([watch]) == 2


@given(data=st.data())
@settings(deadline=None)
def test_reports_are_what_a_count_by_hand_comes_to(data):
    sizes = st.tuples(st.integers(0, 140), st.integers(1, 140))
    shapes = data.draw(st.lists(sizes, min_size=1, max_size=4))
    slots = [place(m, n, "cpu") for m, n in shapes]
    checker = Checker(slots)
    seen = [dict.fromkeys(("wrong", "unwritten", "launches", "first", "draw"), 0) for _ in slots]
    tiles: list[dict[tuple[int, int], int]] = [{} for _ in slots]
    draws = 0
    for turn in range(1, data.draw(st.integers(1, 4)) + 1):
        if data.draw(st.booleans()):
            checker.mark()
            draws += 1
        for s, count, where in zip(slots, seen, tiles, strict=True):
            s.out.copy_(s.lo)
            places = [(r, c) for r in range(s.out.shape[0]) for c in range(s.out.shape[1])]
            few = (
                st.lists(st.sampled_from(places), max_size=3, unique=True)
                if places
                else st.just([])
            )
            bad = {at: data.draw(st.booleans()) for at in data.draw(few)}
            for at, written in bad.items():
                if written:
                    s.out[at] = -1.0
                else:
                    s.out.view(torch.int16)[at] = POISON
                tile = at[0] // TILE, at[1] // TILE
                where[tile] = where.get(tile, 0) + 1
            count["wrong"] += len(bad)
            count["unwritten"] += len(bad) - sum(bad.values())
            count["launches"] += bool(bad)
            if bad and not count["first"]:
                count["first"], count["draw"] = turn, draws
        checker.sweep()
    hit = [data.draw(st.booleans()) for _ in slots]
    for s, yes in zip(slots, hit, strict=True):
        s.guarded[-1] += yes
    for report, count, where, yes in zip(checker.reports(), seen, tiles, hit, strict=True):
        found = report.wrong, report.unwritten, report.bad_launches, report.first, report.draw
        assert found == tuple(count.values()) and report.not_finite == 0
        assert report.tiles == tuple((*tile, many) for tile, many in sorted(where.items()))
        assert report.guard == yes and (report.witness is None) == (not count["wrong"])


@pytest.mark.gpu
def test_a_copy_that_is_not_waited_for_holds_what_was_given():
    for size in (0, 1, 1000):
        host = torch.arange(size)
        assert torch.equal(uploaded(host, torch.device("cuda", 0)).cpu(), host)


@pytest.mark.gpu
def test_a_sweep_can_be_captured_and_replayed():
    s = place(33, 65, "cuda")
    checker = Checker([s])
    checker.sweep()
    torch.cuda.synchronize()
    before = checker.sweeps
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s.out.copy_(s.lo)
        checker.sweep()
    for _ in range(7):
        graph.replay()
    (report,) = checker.reports()
    assert checker.sweeps == before + 7
    assert report.bad_launches == 1  # the first sweep, of an untouched slot


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(1, 700)), min_size=1, max_size=6))
def test_the_tile_table_lists_every_tile_of_every_slot_in_order(shapes):
    rows = [-(-m // TILE) for m, _ in shapes]
    columns = [-(-n // TILE) for _, n in shapes]
    tiles = [r * c for r, c in zip(rows, columns, strict=True)]
    first = [0, *accumulate(tiles)][:-1]
    expected = [
        [slot, row, column]
        for slot, (r, c) in enumerate(zip(rows, columns, strict=True))
        for row in range(r)
        for column in range(c)
    ]
    assert _tile_table(tiles, first, columns, torch.device("cpu")).tolist() == expected


INTERPRETED = """
import random
import torch
from fp4tune.probes.check import sweep as checks
from fp4tune.probes.check._sweep_triton import sweep

VALUES = (float("nan"), float("inf"), 3.0, None)


def disturb(slots, rng):
    for s in slots:
        s.out.copy_(s.lo)
        for _ in range(rng.choice((0, 0, 3))):
            row, col = (rng.randrange(size) for size in s.out.shape)
            value = rng.choice(VALUES)
            if value is None:
                s.out.view(torch.int16)[row : row + 40] = checks.POISON
            else:
                s.out[row, col] = value


class Interpreted(checks.Checker):
    def __init__(self, slots):
        super().__init__(slots)
        sizes = [s.out.shape for s in slots]
        tiles = [-(-m // checks.TILE) * -(-n // checks.TILE) for m, n in sizes]
        places = [(*(t.data_ptr() for t in (s.out, s.lo, s.hi)), *s.out.shape) for s in slots]
        self._table = torch.tensor(places)
        device = torch.device("cpu")
        self._tile_table = checks._tile_table(tiles, self._first_tile, self._columns, device)
        self._aligned = all(map(checks._rows_aligned, slots))
        self._on_cuda = True


rng = random.Random(1)
for trial in range(8):
    dtype = (torch.bfloat16, torch.float16)[trial % 2]
    widths = (8, 136, 320) if trial % 3 else (1, 130, 257)
    sizes = [(rng.choice((1, 16, 33, 128, 129)), rng.choice(widths)) for _ in range(3)]

    def made(sizes=sizes, dtype=dtype, trial=trial):
        torch.manual_seed(trial)
        low = [torch.randn(size).to(dtype) for size in sizes]
        return [checks.slot(lo, lo if i % 2 else (lo + 1).to(dtype)) for i, lo in enumerate(low)]

    first, second = made(), made()
    host, kernel = checks.Checker(first), Interpreted(second)
    assert kernel._aligned == (trial % 3 != 0)
    for turn in range(3):
        disturb(first, random.Random(10 * trial + turn))
        disturb(second, random.Random(10 * trial + turn))
        host.sweep()
        kernel.sweep()
    assert repr(host.reports()) == repr(kernel.reports())
    assert all(bool((s.out.view(torch.int16) == checks.POISON).all()) for s in second)
"""


@pytest.mark.slow
def test_the_kernel_says_what_the_host_says():
    """The GPU's kernel by Triton's interpreter, which has to be asked for before an import."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot work with this NumPy")
    assert done.returncode == 0, done.stderr[-3000:]
