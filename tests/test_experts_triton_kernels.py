"""`triton_kernels`' experts: every code and scale where its kernel reads it, and refusals."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.probes import registry
from fp4tune.probes.backends import _triton_kernels as package
from fp4tune.probes.backends import triton_kernels
from fp4tune.probes.backends.triton_kernels import TritonKernels, VllmOgs, VllmOgsUnfused
from fp4tune.probes.grouped import exact, slots
from fp4tune.probes.grouped.problem import ExpertsProblem
from fp4tune.probes.grouped.tensors import matrix
from fp4tune.probes.problem import Device
from fp4tune.probes.regimes.pdl import stages as raw_stages
from fp4tune.probes.worker import experts as worker

H200 = Device("cuda", 90)
BACKENDS = {made.name: made for made in (VllmOgs, VllmOgsUnfused, TritonKernels)}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
MASK = 0b10000001110000001000000111000000


def problem(**changes):
    given = {"groups": 4, "top_k": 2, "gate": "swiglu-oai", **changes}
    n, k = given.pop("n", 96), given.pop("k", 160)
    return ExpertsProblem(given.pop("format", "mxfp4"), 8, n, k, **given)


def usable(name):
    backend = BACKENDS[name]()
    if backend.unsupported(problem(), H200) is not None:
        pytest.skip(f"needs what {name} calls")
    there = sys.modules.get(package.PACKAGE)
    own = package.packaged() if name == "triton-kernels" else package.vendored()
    if there is not None and str(own) not in there.__path__:
        pytest.skip("this process has the other triton_kernels")
    return backend


def read_values(data):
    """Codes (rows, k), as the kernel untwists words of eight and takes threads' shares apart."""
    rows = data.mT.contiguous()
    words = rows.view(torch.int32).long() & 0xFFFFFFFF
    last = (words << 1 & 0x80008000) | (words >> 3 & 0x01800180) | (words >> 7 & 0x00400040)
    four = torch.stack([words & MASK, words << 3 & MASK, words << 6 & MASK, last], dim=-1)
    halves = torch.stack((four & 0xFFFF, four >> 16 & 0xFFFF), dim=-1)
    codes = (halves >> 15 << 3) | (halves >> 6 & 7)
    wide = codes.flatten(1)
    m, k = wide.shape
    shares = wide.reshape(m // 4, 4, k // 256, 2, 4, 8, 2, 2)
    return shares.permute(0, 6, 1, 3, 2, 5, 4, 7).reshape(4 * m, k // 4)


def read_scales(data):
    """Scale bytes (rows, blocks), as eight warps read them."""
    rows = data.mT
    m, k = rows.shape
    shares = rows.reshape(m // 8, 8, k // 64, 2, 8, 2, 2)
    return shares.permute(0, 3, 1, 6, 4, 2, 5).reshape(32 * m, k // 32)


def read(values, scales, rows, k):
    """The matrix (rows, k) that the kernel multiplies with."""
    value = E2M1[read_values(values)[:rows, :k]]
    scale = torch.exp2(read_scales(scales)[:rows, : k // 32].double() - 127)
    return value.double() * scale.repeat_interleave(32, dim=1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("gate", ["swiglu-oai", "swiglu"])
@pytest.mark.parametrize(("n", "k"), [(96, 160), (64, 256), (160, 64)])
def test_the_kernel_reads_each_experts_own_values(name, gate, n, k):
    backend, p = usable(name), problem(gate=gate, n=n, k=k)
    weights = exact.draw_weights(p, 3, "cpu", range(p.groups), sparse_gates=False)
    state = backend.prepare(weights, p)
    padded = package.padded_size(n)
    for expert in range(p.groups):
        right13 = matrix(weights.w13, expert, torch.float64).view(2, n, k)
        found = read(
            state.w13.storage.data[expert],
            backend._scale(state.precision13).storage.data[expert],
            2 * padded,
            k,
        )
        turns = found.view(padded, 2, k).transpose(0, 1) if backend._fuses(p) else None
        halves = found.view(2, padded, k) if turns is None else turns
        assert torch.equal(halves[:, :n], right13) and not halves[:, n:].any()
        found = read(
            state.w2.storage.data[expert],
            backend._scale(state.precision2).storage.data[expert],
            k,
            padded,
        )
        assert torch.equal(found[:, :n], matrix(weights.w2, expert, torch.float64))
        assert not found[:, n:].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_the_memory_behind_scales_is_nan_and_engines_pad_before_it(name):
    backend, p = usable(name), problem(k=2880, n=64)
    weights = exact.draw_weights(p, 3, "cpu", range(p.groups), sparse_gates=False)
    for multiple, blocks in ((backend.scale_multiple, 92), (1, 90)):
        made = type(backend)()
        made.scale_multiple = multiple
        scales = made._scale(made.prepare(weights, p).precision13)
        data = scales.storage.data
        assert scales.shape[1] == blocks and data.shape[1] == 32 * blocks
        memory = torch.empty(0, dtype=torch.uint8).set_(data.untyped_storage())
        assert (memory[data.numel() :] == 0xFF).all() and memory.numel() > data.numel()
        # What a tile of 128 elements takes beyond the last block of k.
        beyond = read_scales(data[0])[:128, 90:]
        assert (beyond == backend.pad_scale).all() if blocks == 92 else beyond.numel() == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_experts_take_new_values_in_place(name):
    backend, p = usable(name), problem()
    old, new = (exact.draw_weights(p, seed, "cpu", range(4), False) for seed in (1, 2))
    state, wanted = backend.prepare(old, p), backend.prepare(new, p)
    before = [t.data_ptr() for t in backend._tensors(state)]
    backend.update(state, new, p)
    after = backend._tensors(state)
    assert [t.data_ptr() for t in after] == before
    assert all(torch.equal(a, b) for a, b in zip(after, backend._tensors(wanted), strict=True))


@pytest.mark.parametrize(
    ("name", "changes", "device", "said"),
    [
        ("vllm-ogs", {}, Device("cpu"), "CUDA"),
        ("vllm-ogs", {}, Device("cuda", 100), "SM100"),
        ("vllm-ogs", {"gate": "swiglu"}, H200, "swiglu-oai alone"),
        ("vllm-ogs-unfused", {"format": "nvfp4"}, H200, "nvfp4"),
        ("vllm-ogs-unfused", {"gate": "relu2"}, H200, "relu2"),
        ("triton-kernels", {}, Device("cpu"), "CUDA"),
        ("triton-kernels", {"format": "nvfp4"}, H200, "nvfp4"),
    ],
)
def test_a_reason_names_what_does_not_fit(name, changes, device, said):
    backend = registry.load_one(name)
    reason = backend.unsupported(problem(**changes), device)
    assert reason is not None and said in reason and "\n" not in reason


def test_two_copies_in_one_process_are_told(tmp_path, monkeypatch):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, package.PACKAGE, raising=False)
    package._package_loaded.cache_clear()
    package._package_loaded(tmp_path / "one")
    with pytest.raises(RuntimeError, match="another triton_kernels"):
        package._package_loaded(tmp_path / "other")
    monkeypatch.delitem(sys.modules, package.PACKAGE)
    package._package_loaded.cache_clear()


@pytest.mark.parametrize("gate", ["swiglu-oai", "relu2"])
def test_what_is_called_at_a_size_is_compiled_for_it(gate):
    called: dict[str, list[tuple[int, int]]] = {"run": [], "gemm1": [], "activate": [], "gemm2": []}

    class Recorded(VllmOgsUnfused):
        def prepare(self, weights, of):
            assert weights.w13.codes.shape == (4, of.rows13, 80) and of.m == 0
            assert (weights.b2 is None) == (gate == "relu2")
            return SimpleNamespace(problem=of)

        def run(self, state, x, ids, weights, out, tactic):
            assert ids.shape == weights.shape and len(ids) == len(x) and int(ids.max()) < 4
            called["run"].append(ids.shape)

        def gemm1(self, state, x, ids, tactic):
            called["gemm1"].append(ids.shape)
            return x

        def activate(self, state, h13, tactic):
            called["activate"].append((len(h13), 2))
            return h13

        def gemm2(self, state, h, ids, tactic):
            called["gemm2"].append(ids.shape)
            return h

    of, backend = problem(gate=gate), Recorded()
    backend.build([of.at(m) for m in (0, 1, 8, 300)], Device("cpu"), 4)
    own = [m for m, top_k in called["run"] if top_k == 2]
    # No layer of four experts is run with eight a token.
    assert [m for m, top_k in called["run"] if top_k != 2] == [1, 8, 300]
    assert own[0] == 1 and own == sorted(set(own)) and own[-1] <= 300 and len(own) < 30
    staged = [(m, 2) for m in own if m <= 128]
    assert called["gemm1"] == called["activate"] == called["gemm2"] == staged


def test_stages_are_built_for_the_tokens_they_are_run_at():
    assert triton_kernels._CUT == worker._CUT_TOKENS
    assert triton_kernels._STAGED == raw_stages._MOST_ROWS


def power_of_two(x):
    return 1 << max(0, x - 1).bit_length()


def integers(name, of, m):
    """The tile of a call, and the integers that are passed, as the library's sources have them."""
    s = m * of.top_k
    each = max(1, s // of.groups)
    block = max(16, min(power_of_two(each), 128))
    if name == "triton-kernels" and each <= 64:
        block = max(16, min(power_of_two(2 * each), 64))
    grid = s if s <= of.groups else of.groups - 1 - (of.groups - s - 1) // block
    return block, ((s, grid) if name == "triton-kernels" else (m, s, grid))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(BACKENDS)),
    st.integers(2, 300),
    st.integers(1, 10),
    st.lists(st.integers(1, 5000), min_size=1, max_size=6),
)
def test_whatever_a_call_needs_is_built(name, groups, top_k, ms):
    backend = BACKENDS[name]()
    own = problem(groups=groups, top_k=min(top_k, groups))

    def needed(of, m):
        block, passed = integers(name, of, m)
        return block, *((value == 1, value % 16 == 0) for value in passed)

    for k in slots.run_top_ks(own):
        of, every = problem(groups=groups, top_k=k), k == own.top_k
        run = [*range(1, max(ms) + 1), 24] if every else ms
        built = backend.called_to_build(of, ms, every)
        assert set(built) <= set(run)
        assert {needed(of, m) for m in run} == {needed(of, m) for m in built}
        small = {needed(of, m) for m in run if m <= 128}
        assert small == {needed(of, m) for m in built if m <= 128}  # those with stages


def kind_of(value):
    """What Triton compiles an argument for."""
    if hasattr(value, "data_ptr"):  # the library's own tensors have it, too
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, value >= 1 << 31
    return "float" if isinstance(value, float) else repr(value)


@pytest.fixture
def compiled(monkeypatch):
    """What Triton would compile, of all that is launched on an H200 that is not there."""
    jit = pytest.importorskip("triton.runtime.jit")
    import triton

    found = set()

    def run(kernel, *args, grid, warmup, **options):
        free = {p.name for p in kernel.params if p.do_not_specialize}
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        named = dict(zip((p.name for p in kernel.params), args, strict=False)) | options
        kinds = {
            n: v if n in fixed or n in options else kind_of(v)
            for n, v in named.items()
            if n not in free
        }
        found.add((kernel.fn.__name__, repr(sorted(kinds.items(), key=str))))

    target = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    active = SimpleNamespace(
        get_current_target=lambda: target,
        utils=SimpleNamespace(get_device_properties=lambda index: {"multiprocessor_count": 132}),
    )
    facts = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
    return found


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("groups", "top_k"), [(32, 4), (8, 2), (5, 3)])
def test_no_call_compiles_what_was_not_built(name, groups, top_k, compiled):
    backend, most = usable(name), 700
    of = problem(groups=groups, top_k=top_k, n=64, k=64)
    given_ms = [1, 2, 8, 32, 100, 256, 500, most]
    backend.build([of.at(m) for m in given_ms], Device("cpu"), 1)
    built = set(compiled)
    state = backend.prepare(exact.draw_weights(of, 3, "cpu", range(groups), False), of)
    for k in slots.run_top_ks(of):
        odd = problem(groups=groups, top_k=k, n=64, k=64)
        for m in range(1, most + 1) if k == top_k else given_ms:
            backend._call(state, odd, m, torch.device("cpu"))
            assert compiled == built, (k, m)
    assert any("matmul" in kernel for kernel, _ in built)
