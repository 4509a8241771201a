"""What ``marlin-experts`` hands to SGLang's kernels, and what those would make of it."""

from __future__ import annotations

import sys

import pytest
import torch
from emulator import marlin as emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends._experts import MARLIN_BLOCKS, localised, marlin_block
from fp4tune.probes.backends.sglang_marlin import _build, _triton_files, experts
from fp4tune.probes.backends.sglang_marlin._experts_layout import (
    padded_sizes,
    permute_bias,
    prepare_stack,
)
from fp4tune.probes.grouped import exact, routing
from fp4tune.probes.grouped.problem import GATES, ExpertsProblem
from fp4tune.probes.grouped.tensors import matrix
from fp4tune.probes.launch.item import Item
from fp4tune.probes.problem import Device, Problem
from fp4tune.probes.worker.experts import OpenExperts

CPU, H200 = Device("cpu"), Device("cuda", 90)
QUICK = settings(max_examples=40, deadline=None)
TACTICS = ("default", "block=8", "block=64", "reduce=fp32", "reduce=atomic", "ep")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(**changes):
    given = {"format": "nvfp4", "m": 24, "n": 64, "k": 128, "groups": 6, "top_k": 2, **changes}
    return ExpertsProblem(
        given.pop("format"), given.pop("m"), given.pop("n"), given.pop("k"), **given
    )


@pytest.fixture
def kernels(monkeypatch):
    made = emulated.Experts()
    monkeypatch.setattr(_build, "load", made.load)
    monkeypatch.setattr(experts, "gpu", lambda device: (90, emulated.SMS))

    def split(h13, alpha, beta, limit, out):
        n = out.shape[1]
        gate, up = h13[:, :n].float().clamp(max=limit), h13[:, n:].float().clamp(-limit, limit)
        out.copy_(gate * torch.sigmoid(alpha * gate) * (up + beta))

    small = {"oai": split, "align": emulated.align_small}
    monkeypatch.setattr(experts, "triton_functions", lambda problem, sm: small)
    return made


# The layout


@pytest.mark.parametrize("format_", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_thread_reads_every_weight_of_every_expert_exactly(format_, sparse):
    p = problem(format=format_, n=96 if format_ == "mxfp4" else 128, k=256)
    weights = exact.draw_weights(p, 3, "cpu", range(p.groups), sparse)
    n, k = padded_sizes(p, 90)
    shapes = ((weights.w13, 2, (n, k), p.n), (weights.w2, 1, (k, n), p.k))
    for stack, shards, size, rows in shapes:
        made = prepare_stack(stack, None, shards, size, emulated.repack)
        assert (made.n, made.k) == (shards * size[0], size[1])
        for e in range(p.groups):
            read = emulated.weight_read(made.codes[e], made.scales[e]).T
            if format_ == "nvfp4":
                read = read * made.global_scale[e].double()
            parts = read.view(shards, size[0], size[1])
            columns = stack.codes.shape[2] * 2
            right = matrix(stack, e, torch.float64).view(shards, rows, columns)
            assert torch.equal(parts[:, :rows, :columns], right)
            assert not parts[:, rows:].any() and not parts[:, :, columns:].any()


def test_every_code_and_scale_survives():
    """All sixteen codes, and the scales that S0E5M3 keeps in bf16."""
    p = problem(n=128, k=256, groups=2)
    weights = exact.draw_weights(p, 3, "cpu", range(2), False)
    draw = torch.Generator().manual_seed(1)
    for stack in (weights.w13, weights.w2):
        stack.codes.copy_(torch.randint(0, 256, stack.codes.shape, generator=draw).byte())
        stack.scales.copy_(torch.randint(8, 0x7F, stack.scales.shape, generator=draw).byte())
    made = prepare_stack(weights.w13, None, 2, (128, 256), emulated.repack)
    for e in range(2):
        read = emulated.weight_read(made.codes[e], made.scales[e]).T * made.global_scale[e].double()
        assert torch.equal(read, matrix(weights.w13, e, torch.float64))


@given(st.integers(1, 4), st.integers(1, 3))
def test_biases_are_where_threads_read_them(experts_, tiles):
    n = 64 * tiles
    bias = torch.arange(float(experts_ * n)).view(experts_, n)
    moved = permute_bias(bias)
    back = torch.empty_like(bias)
    back[:, emulated.columns_of_biases(n)] = moved
    assert torch.equal(back, bias)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"format": "mxfp4", "n": 2880, "k": 2880, "gate": "swiglu-oai"}, (2944, 3072)),
        ({"format": "mxfp4", "n": 288, "k": 4096, "gate": "swiglu-10"}, (320, 4096)),
        ({"format": "mxfp4", "n": 288, "k": 4096}, (384, 4096)),
        ({"n": 1856, "k": 2688, "gate": "relu2"}, (1920, 2688)),
        ({"n": 768, "k": 2048}, (768, 2048)),
    ],
)
def test_sizes_are_padded_as_sglang_does(changes, sizes):
    assert padded_sizes(problem(**changes), 90) == sizes


# Routing


@pytest.mark.parametrize(
    ("tokens", "top_k", "groups", "block"),
    [(1, 8, 128, 8), (64, 4, 32, 16), (128, 8, 64, 32), (2048, 8, 128, 64), (8192, 8, 128, 64)],
)
def test_blocks_are_those_sglang_chooses(tokens, top_k, groups, block):
    assert marlin_block(tokens, top_k, groups) == block
    assert block == 64 or tokens * top_k / groups < 0.9 * block


batches = st.tuples(
    st.integers(1, 70), st.integers(2, 70), st.integers(1, 8), st.integers(0, 2**40)
).filter(lambda s: s[2] <= s[1])


def layer(p):
    """What alignment needs of a layer."""
    no = torch.empty(0)
    stack = experts.MarlinStack(no, no, no, no)
    calls = {
        "routing": emulated.Experts().load("routing", 90),
        "triton": {"align": emulated.align_small},
    }
    return experts.MarlinLayer(p, stack, stack, calls, 90, emulated.SMS, p.n, p.k, no, no)


@QUICK
@given(
    batches, st.sampled_from(sorted(routing.LAWS)), st.sampled_from(["default", "ep", "block=48"])
)
def test_each_slot_is_in_a_block_of_its_expert_once(batch, law, tactic):
    tokens, groups, top_k, seed = batch
    p = problem(m=tokens, groups=groups, top_k=top_k)
    ids = routing.route(law, tokens, range(groups), top_k, seed).ids
    state, local = layer(p), localised(ids, None, groups, -1)[0]
    here = (ids >= 0) & (ids < groups)
    assert torch.equal(local, torch.where(here, ids, -1))
    how = state.how(tactic, tokens)
    found = experts.align(state, local, how)
    used = int(found.count[0])
    assert used % how.block == 0 and found.slots.numel() >= used
    blocks = found.slots[:used].view(-1, how.block)
    owner = found.experts[: len(blocks)]
    counts = routing.counts(ids, groups)
    away = int((~here).sum())
    if tokens == 1 and not how.parallel:  # one block a slot
        assert len(blocks) == top_k
    else:
        wanted = [-(-c // how.block) for c in [away, *counts.tolist()]]
        assert torch.bincount(owner.clamp(min=-1) + 1, minlength=groups + 1).tolist() == wanted
    seen = torch.zeros(ids.numel(), dtype=torch.int64)
    for expert, slots in zip(owner.tolist(), blocks, strict=True):
        real = slots[slots < ids.numel()].long()
        seen[real] += 1
        assert (local.flatten()[real] == expert).all()
    assert (seen == 1).all()


@pytest.mark.parametrize("law", ["runs", "one-takes-all", "idle"])
@pytest.mark.parametrize("block", MARLIN_BLOCKS)
def test_counts_around_a_block_fill_no_more_than_there_is_room_for(law, block):
    for tokens in (block - 1, block, block + 1, 2 * block + 1):
        p = problem(m=tokens, groups=5, top_k=1)
        ids = routing.route(law, tokens, range(5), 1, 0).ids
        found = experts.align(layer(p), ids, experts.MarlinTactic(block, False, False))
        counts = routing.counts(ids, 5)
        assert int(found.count[0]) == int((-(-counts // block) * block).sum())


# The layer


QUICK = {("nvfp4", "relu2"), ("mxfp4", "swiglu-oai")}
"""The others are run with the slow tests."""


@pytest.mark.parametrize(
    ("format_", "gate"),
    [
        pytest.param(f, g, marks=[] if (f, g) in QUICK else pytest.mark.slow)
        for f in ("nvfp4", "mxfp4")
        for g in GATES
        if (f, g) not in {("nvfp4", "swiglu-oai"), ("mxfp4", "relu2")}
    ],
)
def test_every_stage_and_law_is_exact_on_the_emulated_kernels(kernels, format_, gate):
    p = problem(format=format_, gate=gate, n=128 if gate == "relu2" else 64, scaling=2.5)
    opened = OpenExperts(registry.load_one("marlin-experts"), CPU, p, 7, 1 << 28, lambda text: None)
    items = [Item((0, 1, 17), tactic, 8) for tactic in ("default", "ep")]
    for found in opened.grade(items):
        assert found["width"] == 8 and not found["bad"]
        stages = ("permute", "gemm1", "activate", "gemm2", "finalize")
        assert found["stages"] == dict.fromkeys(stages, "exact")
    for law in routing.ODD:
        for found in opened.family(law, items):
            assert not found["bad"] and "error" not in found


def test_tactics_are_what_was_asked_for(kernels):
    p = problem(groups=4, top_k=2, m=64)
    backend = experts.MarlinExperts()
    assert backend.tactics(p, H200) == [
        "default", "block=8", "block=16", "block=32", "block=64", "reduce=fp32", "ep",
    ]  # fmt: skip
    assert "reduce=atomic" in backend.tactics(problem(format="mxfp4"), H200)
    weights = exact.draw_weights(p, 3, "cpu", range(4), False)
    drawn, right = exact.draw_tokens(p, weights, range(4), ("balanced",), 5)
    state = backend.prepare(weights, p)
    for tactic in TACTICS:
        kernels.calls.clear()
        out = torch.full((p.m, p.k), torch.nan, dtype=torch.bfloat16)
        backend.run(state, drawn.a.x, drawn.a.ids, drawn.a.weights, out, tactic)
        assert torch.equal(out, right.lo)
        first, second = kernels.calls
        name, _, value = tactic.partition("=")
        assert first["block"] == second["block"] == (int(value) if name == "block" else 48)
        assert first["atomic"] is second["atomic"] is (tactic != "reduce=fp32")
        assert first["parallel"] is second["parallel"] is (tactic == "ep")
        assert (first["weighted"], second["weighted"]) == (False, True)
    for wrong in ("block=24", "block=", "reduce=bf16", "ep=1", ""):
        with pytest.raises(ValueError, match="no tactic"):
            state.how(wrong, 1)


def test_updating_gives_new_weights_to_the_same_memory(kernels):
    """Through what launchers see, whose problem is a dense one."""
    p = problem(format="mxfp4", gate="swiglu-oai")
    backend = registry.load_one("marlin-experts")
    backend.problem = p
    first = exact.draw_weights(p, 3, "cpu", range(6), False)
    second = exact.draw_weights(p, 4, "cpu", range(6), False)
    state = backend.prepare(first, p)
    where = state.w13.codes.data_ptr(), state.w2.bias.data_ptr()
    backend.update(state, second, Problem("mxfp4", p.m, p.k, p.k))
    assert where == (state.w13.codes.data_ptr(), state.w2.bias.data_ptr())
    drawn, right = exact.draw_tokens(p, second, range(6), ("zipf",), 5)
    out = torch.empty(p.m, p.k, dtype=torch.bfloat16)
    backend.run(state, drawn.a, out, "default")
    assert torch.equal(out, right.lo)


# What does not run


@pytest.mark.parametrize(
    ("changes", "device", "word"),
    [
        ({}, CPU, "CUDA"),
        ({}, Device("cuda", 75), "SM75"),
        ({"format": "mxfp4"}, Device("cuda", 89), "SM89"),
        ({"gate": "swiglu-oai"}, H200, "biases"),
        ({"format": "mxfp4", "gate": "relu2"}, H200, "gates"),
        ({"n": 96}, H200, "128 and 96"),
        ({"k": 192}, H200, "192"),
    ],
)
def test_a_reason_names_what_does_not_fit_experts(changes, device, word):
    reason = experts.MarlinExperts().unsupported(problem(**changes), device)
    assert reason is not None and word in reason and "\n" not in reason


def test_one_formats_kernels_stay_in_the_table_of_experts():
    table = "  COMMON_GET_IF(host::kU4)\n  NVFP4_GET_IF(host::kFE2M1f)\n"
    table += "  BIGGROUP_GET_IF(host::kFE4M3fn)\n    MXFP4_GET_IF(host::kFE2M1f)\n"
    for kernels in ("NVFP4", "MXFP4"):
        assert _build.cut_table(table, kernels).split() == [f"{kernels}_GET_IF(host::kFE2M1f)"]
    with pytest.raises(ValueError, match="2 times"):
        _build.cut_table(table + "NVFP4_GET_IF(host::kFE2M1f)\n", "NVFP4")


def test_a_file_of_sglangs_is_loaded_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "sglang"
    for folder in (_build.MARLIN, "include"):
        (package / "kernels" / "jit" / folder).mkdir(parents=True)
    for source in (_build.GEMM_SOURCE, _build.REPACK_SOURCE):
        (package / "kernels" / "jit" / _build.MARLIN / source).touch()
    place = package / "kernels" / "ops" / "moe" / "moe_align_small_numel.py"
    place.parent.mkdir(parents=True)
    place.write_text(
        "from sglang.kernels.jit.utils import is_arch_support_pdl\n"
        "def moe_align_small_numel(): return is_arch_support_pdl()\n"
    )
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for sm in (80, 90):
        assert _triton_files.function(_triton_files.SMALL, sm)() is (sm == 90)
    assert not [name for name in sys.modules if name.partition(".")[0] == "sglang"]
    many, few = problem(groups=64), problem(groups=63)
    assert set(experts.triton_functions(many, 90)) == {"align"}
    assert not experts.triton_functions(few, 90)
    with pytest.raises(RuntimeError, match="minimax_m3_swiglu"):
        _triton_files.function(_triton_files.OAI, 90)


def test_a_unit_exports_the_specialisation_that_sglang_calls():
    assert "moe_wna16_marlin_gemm<bf16_t, false, false, true, false, true>" in _build.unit_source(
        _build.experts_unit(1, "nvfp4", False, False), 90
    )
    assert "moe_wna16_marlin_gemm<bf16_t, true, true, false, true, false>" in _build.unit_source(
        _build.experts_unit(2, "mxfp4", True, True), 90
    )
    assert "TopkSumKernel<256, true>" in _build.unit_source("around", 90)
    assert "TopkSumKernel<256, false>" in _build.unit_source("around", 89)


def test_what_is_called_in_triton_is_called_when_it_is_built(monkeypatch):
    of = ExpertsProblem("mxfp4", 0, 96, 160, groups=16, top_k=4, gate="swiglu-oai")
    seen, called = set(), []

    def recorded(ids, weights, groups, elsewhere, scaling=1.0):
        aligned = ids.storage_offset() * 4 % 16 == 0
        seen.add((ids.shape[1], aligned, weights is not None))
        return localised(ids, weights, groups, elsewhere, scaling)

    monkeypatch.setattr(experts, "localised", recorded)
    oai = {"oai": lambda *args, out: called.append((args[0].shape, args[1:], out.shape))}
    monkeypatch.setattr(experts, "triton_functions", lambda problem, sm: oai)
    experts._try_triton(of, 700, 90, torch.device("cpu"))
    for weighted in (False, True):
        assert {(4, True, weighted), (8, True, weighted), (1, False, weighted)} <= seen
    n, _ = padded_sizes(of, 90)
    assert called == [((1, 2 * n), (1.702, 1.0, 7.0), (1, n))]
