"""Slots sorted by expert, rows moved to and fro: over every routing law, and as Triton has it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes.grouped import routing, slots
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

QUICK = settings(max_examples=60, deadline=None)
LAWS = st.sampled_from(list(routing.LAWS))
SHAPES = st.tuples(
    st.integers(0, 60), st.integers(2, 24), st.integers(1, 8), st.integers(0, 2**40)
).filter(lambda s: s[2] <= s[1])


def routed(law, shape):
    tokens, groups, top_k, seed = shape
    return routing.route(law, tokens, range(groups), top_k, seed).ids, groups


@QUICK
@given(LAWS, SHAPES, st.sampled_from((1, *routing.BLOCKS, 24)))
def test_every_slot_is_in_a_block_of_its_expert_once(law, shape, block):
    ids, groups = routed(law, shape)
    made = slots.sort_slots(ids, groups, block)
    count, flat = ids.numel(), ids.flatten().tolist()
    end = int(made.total)
    assert end % block == 0 and end <= len(made.rows) == slots.most_rows(count, groups, block)
    assert made.counts.tolist() == routing.counts(ids, groups).tolist()
    assert made.offsets.tolist()[-1] == end
    rows = made.rows[:end].tolist()
    here = [s for s in range(count) if 0 <= flat[s] < groups]
    assert sorted(s for s in rows if s < count) == here and max(rows, default=count) <= count
    for row, slot in enumerate(rows):
        expert = int(made.experts[row // block])
        if slot < count:
            assert flat[slot] == expert and int(made.places.flatten()[slot]) == row
            assert made.offsets[expert] <= row < made.offsets[expert] + made.counts[expert]
    for expert in range(groups):
        mine = rows[made.offsets[expert] : made.offsets[expert] + made.counts[expert]]
        assert mine == sorted(mine)
        assert int(made.offsets[expert + 1] - made.offsets[expert]) - len(mine) in range(block)
    elsewhere = [s for s in range(count) if not 0 <= flat[s] < groups]
    assert all(int(made.places.flatten()[s]) == -1 for s in elsewhere)


@QUICK
@given(LAWS, SHAPES)
def test_masked_rows_are_each_experts_tokens_once(law, shape):
    ids, groups = routed(law, shape)
    tokens = ids.shape[0]
    made = slots.mask_rows(ids, groups)
    for expert in range(groups):
        wanted = [t for t in range(tokens) if expert in ids[t].tolist()]
        assert int(made.counts[expert]) == len(wanted)
        for rank, token in enumerate(wanted):
            at = made.places[token][ids[token] == expert].tolist()
            assert set(at) == {expert * tokens + rank}
    elsewhere = (ids < 0) | (ids >= groups)
    assert (made.places[elsewhere] == -1).all() and (made.places[~elsewhere] >= 0).all()


@QUICK
@given(LAWS, SHAPES, st.booleans())
def test_rows_come_back_weighed_to_their_tokens(law, shape, masked):
    ids, groups = routed(law, shape)
    tokens, top_k = ids.shape
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(-8, 9, (tokens, 5), generator=draw).float()
    weights = torch.randint(1, 4, ids.shape, generator=draw).float()
    here = (ids >= 0) & (ids < groups)
    weights[~here] = torch.nan
    if masked:
        places, rows = slots.mask_rows(ids, groups).places, groups * tokens
    else:
        made = slots.sort_slots(ids, groups)
        places, rows = made.places, len(made.rows)
    y = slots.spread_rows(x, places, rows)
    out = torch.full_like(x, torch.nan)
    slots.combine_rows(y, places, weights, out, 2.0)
    right = 2 * x * torch.where(here, weights, 0.0).sum(1, keepdim=True)
    assert torch.equal(out, right)
    slotted = x.repeat_interleave(top_k, dim=0)
    slotted[~here.flatten()] = torch.nan
    slots.combine_rows(slotted, places, weights, out, 2.0, in_order_of="slots")
    assert torch.equal(out, right)


TWINS = """
import torch
from fp4tune.probes.grouped import _slots_triton as kernels
from fp4tune.probes.grouped import routing, slots
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem

for law in ("zipf", "duplicates", "padding-ids"):
    for tokens, groups, top_k, block in ((1, 2, 1, 8), (70, 5, 3, 24)):
        ids = routing.route(law, tokens, range(groups), top_k, 7).ids
        right, made = slots.sort_slots(ids, groups, block), slots._empty(ids, groups, block)
        kernels.sort[(groups,)](
            ids, made.rows, made.places, made.experts, made.offsets, made.counts, made.total,
            ids.numel(), groups, block, BINS=1 << groups.bit_length(), STEP=128,
        )
        end = int(right.total)
        assert torch.equal(made.rows[:end], right.rows[:end]), (law, tokens)
        assert torch.equal(made.experts[: end // block], right.experts[: end // block])
        for name in ("places", "offsets", "counts", "total"):
            assert torch.equal(getattr(made, name), getattr(right, name)), (law, name)
        x = torch.randn(tokens, 1100)
        y = torch.full((len(made.rows), 1100), torch.nan)
        kernels.spread[slots._grid(*x.shape)](x, made.places, y, 1100, TOP_K=top_k, BLOCK=1024)
        used = made.places[made.places >= 0].long()
        assert torch.equal(y[used], slots.spread_rows(x, made.places, len(y))[used])
        weights, out, want = torch.rand(ids.shape), torch.empty_like(x), torch.empty_like(x)
        slots.combine_rows(y, made.places, weights, want, 2.5)
        kernels.combine[slots._grid(*x.shape)](
            y, made.places, weights, out, 1100, 2.5, SORTED=True, TOP_K=top_k, BLOCK=1024
        )
        assert torch.allclose(out, want)
for gate in GATES.values():
    h13 = 8 * torch.randn(9, 2 * 70 if gate.gated else 70)
    h = torch.empty(9, 70)
    kernels.activate[slots._grid(9, 70)](
        h13, h, 70, gate.alpha, gate.offset, gate.limit or 0.0, GATED=gate.gated,
        CLAMPED=gate.limit is not None, BLOCK=1024,
    )
    assert torch.allclose(h, slots.activate_rows(h13, gate, 70)), gate
print("twins")
"""


@pytest.mark.slow
@needs_triton
def test_triton_does_what_torch_does():
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", TWINS], env=env, capture_output=True, text=True, timeout=200
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot run loops with this NumPy (2.4 and newer)")
    assert done.stdout.strip() == "twins", done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("name", ["sort", "spread", "activate", "combine"])
def test_kernels_compile_for_hopper_without_a_gpu(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fp4tune.probes.grouped import _slots_triton as kernels

    kernel = getattr(kernels, name)
    constants = {
        "BINS": 512, "STEP": 2048, "TOP_K": 8, "BLOCK": 1024, "GATED": True, "CLAMPED": True,
        "SORTED": True,
    }  # fmt: skip
    pointers = dict.fromkeys(("x", "y", "h13", "h", "out"), "*bf16") | {"weights": "*fp32"}
    scalars = dict.fromkeys(("slots", "groups", "block", "n", "columns"), "i32")
    scalars |= dict.fromkeys(("alpha", "offset", "limit", "scaling"), "fp32")
    names = kernel.arg_names
    signature = {
        x: "constexpr" if x in constants else pointers.get(x) or scalars.get(x, "*i32")
        for x in names
    }
    given = {(names.index(x),): constants[x] for x in names if x in constants}
    source = ASTSource(kernel, signature, given, {})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "cubin" in made.asm


@pytest.mark.parametrize("gate", GATES)
def test_the_activation_is_the_definition(gate):
    from fp4tune.probes.grouped.reference import activate

    h13 = 8 * torch.randn(3, 2, 32 if GATES[gate].gated else 16)
    found = slots.activate_rows(h13, GATES[gate], 16)
    assert torch.allclose(found, activate(h13.double(), GATES[gate], 16).float(), rtol=1e-5)


@QUICK
@given(st.integers(2, 300), st.integers(1, 12), st.integers(1, 3000), st.data())
def test_batches_are_of_every_kind_that_launches_have(groups, top_k, tokens, data):
    """A kind is how many slots are looked at at once, and whether a window is at 16 bytes."""
    of = ExpertsProblem("mxfp4", 0, 64, 64, groups=groups, top_k=min(top_k, groups))

    def kind(count, k, address):
        return k, min(2048, max(128, 1 << (count * k - 1).bit_length())), address % 16

    found = set()
    for ids, weights in slots.routed_batches(of, tokens, torch.device("cpu")):
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert ids.shape == weights.shape and ids.is_contiguous() and weights.is_contiguous()
        assert len(ids) <= tokens and int(ids.min()) >= 0 and int(ids.max()) < groups
        at = ids.storage_offset() * 4
        found.add(kind(*ids.shape, at and 1 if at % 16 else 0))
    k = data.draw(st.sampled_from((of.top_k, *(k for k in (1, 8) if k <= groups))))
    rows, first = data.draw(st.integers(1, tokens)), data.draw(st.integers(0, 100))
    assert kind(rows, k, 1 if first * k * 4 % 16 else 0) in found


def test_what_a_backend_uses_is_called(monkeypatch):
    of, called = ExpertsProblem("mxfp4", 0, 64, 64, groups=16, top_k=4), []
    for name in ("sort_slots", "spread_rows", "combine_rows"):
        own = getattr(slots, name)

        def recorded(*args, name=name, own=own, **more):
            called.append(
                (name, args[1].shape[-1] if name != "sort_slots" else None, *more.values())
            )
            return own(*args, **more)

        monkeypatch.setattr(slots, name, recorded)
    slots.compile_slots(of, 700, torch.device("cpu"), ("sort",))
    assert set(called) == {("sort_slots", None)}
    called.clear()
    slots.compile_slots(of, 700, torch.device("cpu"), ("spread", "places", "slots"))
    assert {(name, *rest) for name, k, *rest in called if k == 8} == {
        ("spread_rows",), ("combine_rows", "places"), ("combine_rows", "slots"),
    }  # fmt: skip
    assert {k for _, k, *_ in called} == {1, 4, 8}
