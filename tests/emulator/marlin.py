"""Marlin's routed experts on a CPU, from SGLang 0.5.23's sources (vLLM's differ where it says so).

Every byte is read from where a thread of the GEMM reads it: codes by the fragments of a 16x8x16
tensor-core instruction, scales by the eight bytes that a thread has for its 64 columns, biases by
its sixteen. What the C++ checks of its arguments is checked, and what it trusts, too: ids, the
length of lists, scratch and locks.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

SMS = 132
E2M1 = 562949953487106
GARBAGE = 1 << 20
"""What lies in lists behind what a kernel writes."""


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def repack(
    q: torch.Tensor, perm: torch.Tensor, out: torch.Tensor, size_k: int, size_n: int, bits: int
) -> None:
    """int32 (k/8, n), eight k to a word and the lowest bits first, into tiles of 16 x 64: lane
    ``t`` of warp ``w`` has a word at ``4 t + w``."""
    _need(bits == 4 and perm.numel() == 0, "4 bits, no permutation")
    _need(q.dtype == out.dtype == torch.int32, "int32")
    _need(q.shape == (size_k // 8, size_n) and q.is_contiguous(), "b_q_weight")
    _need(out.shape == (size_k // 16, 2 * size_n) and out.is_contiguous(), "out")
    _need(size_k % 16 == 0 and size_n % 64 == 0, "whole tiles")
    shifts = torch.arange(8).view(1, 8, 1) * 4
    codes = ((q.long().unsqueeze(1) >> shifts) & 15).reshape(size_k, size_n)
    tiles = codes.view(size_k // 16, 16, size_n // 64, 64).permute(0, 2, 1, 3)
    lane = torch.arange(32)
    words = torch.zeros(*tiles.shape[:2], 32, 4, dtype=torch.int64)
    for warp in range(4):
        column = 16 * warp + lane // 4
        values = [
            tiles[..., 2 * (lane % 4) + k, column + right] for right in (0, 8) for k in (0, 1, 8, 9)
        ]
        for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[..., warp] |= values[which] << (4 * place)
    out.copy_(words.view(out.shape).to(torch.uint32).view(torch.int32))


def codes_read(packed: torch.Tensor) -> torch.Tensor:
    """int64 (k, n): the codes as the GEMM's threads find them in int32 (k/16, 2n).

    Of a word's eight codes, the lowest of each half are a thread's first two rows of k, the next
    rows 8 and 9; the two above are those of the column 8 to the right.
    """
    tiles, columns = packed.shape[0], packed.shape[1] // 2
    words = (packed.view(torch.uint32).long()).view(tiles, columns // 64, 32, 4)
    found = torch.zeros(tiles, columns // 64, 16, 64, dtype=torch.int64)
    lane = torch.arange(32)
    for group in range(4):
        for nibble in range(8):
            k = 2 * (lane % 4) + 8 * (nibble % 2) + nibble // 4
            column = 16 * group + lane // 4 + 8 * ((nibble // 2) % 2)
            found[..., k, column] = (words[..., group] >> (4 * nibble)) & 15
    return found.permute(0, 2, 1, 3).reshape(16 * tiles, columns)


def columns_of_scales(n: int) -> torch.Tensor:
    """int64 (n,): the column whose scale each byte of a row is."""
    byte = torch.tensor([0, 16, 8, 24, 32, 48, 40, 56])
    one = (torch.arange(8).unsqueeze(1) + byte).flatten()
    return (64 * torch.arange(n // 64).unsqueeze(1) + one).flatten()


def columns_of_biases(n: int) -> torch.Tensor:
    """int64 (n,): the column whose bias each place is."""
    pair = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    one = (2 * torch.arange(4).unsqueeze(1) + pair).flatten()
    return (32 * torch.arange(n // 32).unsqueeze(1) + one).flatten()


def bf16(bits: torch.Tensor) -> torch.Tensor:
    """bf16 of bits, as float64."""
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16).double()


def scales_read(raw: torch.Tensor) -> torch.Tensor:
    """float64 of scale bytes, as the kernel makes bf16 of them."""
    byte = raw.view(torch.uint8).int()
    if raw.dtype == torch.float8_e8m0fnu:
        return bf16(byte << 7)
    return bf16((byte & 0x80) << 7 | (byte & 0x7F) << 4)


def weight_read(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 (k, n): what is multiplied with activations, before any global scale."""
    found = codes_read(codes)
    k, n = found.shape
    value = bf16((found & 8) << 12 | (found & 7) << 6)
    if scales.dtype == torch.float8_e8m0fnu:
        value = value * 2.0**126
    at = torch.empty_like(scales, dtype=torch.float64)
    at[:, columns_of_scales(n)] = scales_read(scales)
    product = value * at.repeat_interleave(k // at.shape[0], dim=0)
    return product.to(torch.bfloat16).double()


class Experts:
    """Stands in for what SGLang builds: `load` gives the functions of a unit. `calls` remembers
    what each GEMM was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._read: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def load(self, unit: str, sm: int) -> dict[str, Callable[..., Any]]:
        if "_experts" in unit:
            parallel, biased = "_ep" in unit, "_bias" in unit

            def gemm(*arguments: Any) -> None:
                e4m3 = arguments[4].dtype == torch.float8_e4m3fn
                _need(unit.startswith("nvfp4" if e4m3 else "mxfp4"), "the table lacks the kernel")
                self.sglang_gemm("_experts2" in unit, parallel, biased, *arguments)

            return {"moe_wna16_marlin_gemm": gemm}
        return {
            "repack": {"gptq_marlin_repack": repack},
            "routing": {
                "align": align,
                "align_ep": align,
                "align_one": align_one,
                "silu_limited": silu_limited,
            },
            "around": {"silu": silu, "sum": topk_sum},
        }[unit]

    def weight(self, codes: torch.Tensor, scales: torch.Tensor, expert: int) -> torch.Tensor:
        key = (codes.data_ptr(), codes._version, scales._version, expert)
        if key not in self._read:  # what was read is kept, or its address could be another's
            self._read[key] = weight_read(codes[expert], scales[expert]), codes
        return self._read[key][0]

    def sglang_gemm(
        self,
        zeroes: bool, parallel: bool, biased: bool,
        a: torch.Tensor, c: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor,
        scales: torch.Tensor, global_scale: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor,
        perm: torch.Tensor, locks: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor,
        count: torch.Tensor, weights: torch.Tensor, a_tmp: torch.Tensor, c_tmp: torch.Tensor,
        block: int, top_k: int, weighted: bool, is_ep: bool, type_id: int, m: int, n: int, k: int,
        act_order: bool, has_bias: bool, k_full: bool, has_zp: bool, groups: int, group: int,
        atomic: bool, fp32: bool, zp_float: bool,
    ) -> None:  # fmt: skip
        """``moe_wna16_marlin_gemm``; `zeroes`, `parallel` and `biased` are its specialisation."""
        _need(is_ep == parallel and has_bias == biased, "another specialisation")
        _need(type_id == E2M1 and not (act_order or has_zp or zp_float) and k_full, "FP4")
        _need(count.shape == ((1,) if parallel else (2,)) and count.data_ptr() % 8 == 0, "count")
        _need(all(x.shape == (0,) for x in (zeros, g_idx, perm, a_tmp)), "not for FP4")
        _need(group == k // groups and scales.shape[1] == groups, "groups")
        nvfp4 = scales.dtype == torch.float8_e4m3fn
        _need(group == (16 if nvfp4 else 32), "FP4's blocks")
        _need(global_scale.shape == ((codes.shape[0],) if nvfp4 else (0,)), "global scales")
        _need(global_scale.dtype == torch.bfloat16, "16-bit global scales")
        if not atomic:
            room = min(n * slots.numel(), SMS * 4 * block * 256) * (2 if block == 8 else 1)
            _need(fp32 and c_tmp.dtype == torch.float32 and c_tmp.numel() >= room, "c_tmp")
        listed = experts
        if not parallel:  # the blocks of -1 are counted, and come first
            used, none = int(count[0]) // block, int(count[1])
            _need(bool((experts[:none] < 0).all()), "blocks of -1")
            ascending = experts[none:used]
            _need(bool((ascending >= 0).all()) and bool((ascending.diff() >= 0).all()), "sorted")
            listed = experts.clone()
            listed[:none] = -1
        self.calls.append(
            {"block": block, "atomic": atomic, "parallel": parallel, "weighted": weighted}
        )
        _check(a, c, codes, bias if biased else None, scales, locks, slots, block, top_k, m, n, k)
        for expert, ids in _blocks(slots, listed, int(count[0]), block, m * top_k):
            if expert == -1:
                if zeroes:
                    c[ids] = 0
                continue
            total = a[ids // top_k].double() @ self.weight(codes, scales, expert)
            row = total.to(torch.bfloat16)
            scale = global_scale[expert] if nvfp4 else torch.tensor(1.0).bfloat16()
            if weighted:
                if biased:  # as it is: before the global scale
                    row = row + _bias(bias[expert])
                row = row * (scale * weights.flatten()[ids].bfloat16()).unsqueeze(1)
            else:
                row = row * scale
                if biased:
                    row = row + _bias(bias[expert])
            c[ids] = row


def _bias(bias: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(bias)
    found[columns_of_biases(bias.shape[0])] = bias
    return found


def _check(
    a: torch.Tensor, c: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None,
    scales: torch.Tensor, locks: torch.Tensor, slots: torch.Tensor, block: int, top_k: int,
    m: int, n: int, k: int,
) -> None:  # fmt: skip
    """What both engines' entry points check."""
    _need(block == 8 or (block % 16 == 0 and 16 <= block <= 64), "block size")
    _need(a.shape == (m, k) and a.is_contiguous() and a.dtype == torch.bfloat16, "a")
    _need(c.shape == (m * top_k, n) and c.is_contiguous() and c.dtype == a.dtype, "c")
    _need(codes.shape[1:] == (k // 16, 2 * n) and codes.is_contiguous(), "b_q_weight")
    _need(scales.dim() == 3 and scales.shape[2] == n and scales.is_contiguous(), "b_scales")
    _need(n % 128 == 0 and k % 64 == 0, "no tile of threads fits")
    if bias is not None:
        _need(bias.shape == (codes.shape[0], n) and bias.is_contiguous(), "b_bias")
        _need(bias.dtype == a.dtype, "16-bit biases")
    _need(locks.numel() >= min(n // 64 * (slots.numel() // block), SMS * 4), "workspace")
    _need(not bool(locks.any()), "locks must be zero")


def _blocks(slots: torch.Tensor, experts: torch.Tensor, padded: int, block: int, real: int) -> Any:
    """(expert, slots that are real) of each block."""
    _need(padded % block == 0 and padded <= slots.numel(), "whole blocks within the list")
    for index in range(padded // block):
        ids = slots[index * block : (index + 1) * block].long()
        _need(bool((ids >= 0).all()), "slots")
        yield int(experts[index]), ids[ids < real]


def align(
    ids: torch.Tensor, buckets: int, block: int, slots: torch.Tensor, experts: torch.Tensor,
    count: torch.Tensor, sums: torch.Tensor, pad: bool,
) -> None:  # fmt: skip
    """``moe_align_block_size``: bucket 0 is for -1. Within an expert the order is any."""
    _need(ids.dtype == torch.int32 and ids.is_contiguous() and pad, "ids")
    _need(sums.numel() >= buckets + 1 and slots.numel() % 4 == 0, "buffers")
    flat = ids.flatten()
    _need(bool(((flat >= -1) & (flat < buckets - 1)).all()), "ids outside [-1, experts)")
    slots.fill_(flat.numel())
    experts.fill_(GARBAGE)
    at = 0
    for expert in range(-1, buckets - 1):
        mine = (flat == expert).nonzero()[:, 0].flip(0)
        blocks = -(-len(mine) // block)
        _need(at + blocks * block <= slots.numel(), "the list of slots is too short")
        slots[at : at + len(mine)] = mine.int()
        experts[at // block : at // block + blocks] = expert
        at += blocks * block
        if expert == -1 and count.numel() == 2:
            count[1] = blocks
    count[0] = at


def align_small(
    ids: torch.Tensor, buckets: int, block: int, slots: torch.Tensor, experts: torch.Tensor,
    count: torch.Tensor, *, write_inactive_prefix_count: bool,
) -> None:  # fmt: skip
    """``moe_align_small_numel``: as `align`, but behind what is used nothing is written."""
    _need(ids.numel() <= 64 and count.numel() == 1 + write_inactive_prefix_count, "few slots")
    align(ids, buckets, block, slots, experts, count, torch.empty(buckets + 1), True)
    slots[int(count[0]) :] = GARBAGE


def align_one(
    ids: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, count: torch.Tensor, block: int
) -> None:
    """``moe_align_single_token``: one block each, in ascending order."""
    _need(ids.dtype == torch.int32 and ids.shape[0] == 1 and ids.shape[1] <= 32, "one token")
    top_k = ids.shape[1]
    _need(slots.shape == (top_k * block,) and experts.shape == (top_k,), "buffers")
    order = torch.argsort(ids[0], stable=True)
    experts.copy_(ids[0][order])
    slots.fill_(top_k)
    slots[::block] = order.int()
    count.copy_(torch.tensor([top_k * block, int((ids < 0).sum())]))


def silu(given: torch.Tensor, out: torch.Tensor, kind: str) -> None:
    _need(kind == "silu" and given.is_contiguous() and out.is_contiguous(), "activation")
    n = out.shape[1]
    _need(given.shape == (out.shape[0], 2 * n) and n % 16 == 0, "activation")
    out.copy_(torch.nn.functional.silu(given[:, :n].float()) * given[:, n:].float())


def silu_limited(given: torch.Tensor, out: torch.Tensor, kind: str, limit: float) -> None:
    """Rounds behind the sigmoid, too."""
    n = out.shape[1]
    _need(kind == "silu" and given.shape == (out.shape[0], 2 * n) and n % 16 == 0, "activation")
    gate = torch.nn.functional.silu(given[:, :n].float().clamp(max=limit)).to(out.dtype)
    out.copy_(gate.float() * given[:, n:].float().clamp(-limit, limit))


def topk_sum(given: torch.Tensor, out: torch.Tensor) -> None:
    _need(given.is_contiguous() and out.is_contiguous(), "contiguous")
    _need(given.dtype == out.dtype == torch.bfloat16 and out.shape[1] % 8 == 0, "bf16 by eights")
    _need(out.shape == (given.shape[0], given.shape[2]), "shapes")
    out.copy_(given.float().sum(dim=1))


class Vllm:
    """vLLM 0.33's operators and preparations, by their schemas and documentation. `calls` remembers
    what each GEMM was asked for."""

    e2m1 = object()
    kinds = Enum("MoEActivation", "SILU SWIGLUOAI_UNINTERLEAVE RELU2_NO_MUL")

    def __init__(self) -> None:
        self.ops = self
        self.calls: list[dict[str, Any]] = []
        self._experts = Experts()

    @staticmethod
    def config(**kwargs: Any) -> dict[str, Any]:
        return kwargs

    # Preparation

    def nvfp4(
        self,
        layer: Any, w13: torch.Tensor, s13: torch.Tensor, g13: torch.Tensor, w2: torch.Tensor,
        s2: torch.Tensor, g2: torch.Tensor, is_act_and_mul: bool,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Pads the intermediate size; a power of two for all experts brings the largest block scale
        near 448, and what is then below 2^-6 is lost."""
        shards = 2 if is_act_and_mul else 1
        experts, n, k = layer.num_experts, layer.intermediate_size_per_partition, layer.hidden_size
        _need(w13.shape == (experts, shards * n, k // 2) and w2.shape == (experts, k, n // 2), "w")
        _need(s13.dtype == s2.dtype == torch.float8_e4m3fn and g13.shape == (experts,), "scales")
        to = -(-n // (64 if k % 128 == 0 else 128)) * (64 if k % 128 == 0 else 128)
        made = []
        for codes, scales, outer, rows, columns in (
            (w13, s13, shards, to, k),
            (w2, s2, 1, k, to),
        ):
            values = scales.to(layer.params_dtype).float()
            largest = values[values > 0].max()
            factor = (448 / largest).log2().floor().exp2()
            half = (_grown(values, outer, rows, columns // 16) * factor).half() * 2.0**7
            half[half < 2] = 0
            byte = ((half.view(torch.int16) >> 7) & 0xFF).to(torch.uint8)
            packed = _packed(_grown(codes, outer, rows, columns // 2))
            made += [packed, _scale_rows(byte).view(torch.float8_e4m3fn)]
            made += [(g13 if codes is w13 else g2) * 2.0**119 / factor]
        return tuple(made)

    def mxfp4(
        self,
        layer: Any, w13: torch.Tensor, w2: torch.Tensor, s13: torch.Tensor, s2: torch.Tensor,
        b13: torch.Tensor | None, b2: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        """Pads nothing."""
        scales = [_scale_rows(s).view(torch.float8_e8m0fnu) for s in (s13, s2)]
        biases = [None if b is None else _bias_rows(b.to(layer.params_dtype)) for b in (b13, b2)]
        return _packed(w13), _packed(w2), *scales, *biases

    # Operators

    def moe_align_block_size(
        self, ids: torch.Tensor, count: int, block: int, slots: torch.Tensor, experts: torch.Tensor,
        padded: torch.Tensor, expert_map: torch.Tensor,
    ) -> None:  # fmt: skip
        """Global ids; what the map has elsewhere is in no block, and blocks behind are -1."""
        flat = ids.flatten()
        _need(bool(((flat >= 0) & (flat < count)).all()), "ids outside the map")
        _need(expert_map.shape == (count,) and expert_map.dtype == torch.int32, "expert_map")
        local = expert_map[flat.long()]
        slots.fill_(flat.numel())
        experts.fill_(-1)
        at = 0
        for expert in range(count):
            mine = (local == expert).nonzero()[:, 0].flip(0)
            blocks = -(-len(mine) // block)
            _need(at + blocks * block <= slots.numel(), "the list of slots is too short")
            slots[at : at + len(mine)] = mine.int()
            experts[at // block : at // block + blocks] = expert
            at += blocks * block
        padded[0] = at

    def moe_wna16_marlin_gemm(
        self,
        a: torch.Tensor, c: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor | None,
        scales: torch.Tensor, a_scales: None, global_scale: torch.Tensor | None, zeros: None,
        locks: torch.Tensor, slots: torch.Tensor, experts: torch.Tensor, padded: torch.Tensor,
        weights: torch.Tensor, moe_block_size: int, top_k: int, mul_topk_weights: bool,
        b_q_type: Any, size_m: int, size_n: int, size_k: int, use_atomic_add: bool,
        use_fp32_reduce: bool, is_zp_float: bool, thread_k: int, thread_n: int, blocks_per_sm: int,
    ) -> torch.Tensor:  # fmt: skip
        """Global scales are float32; rows of no block stay what they were."""
        _need(b_q_type is self.e2m1 and a_scales is zeros is None and use_fp32_reduce, "FP4")
        nvfp4 = scales.dtype == torch.float8_e4m3fn
        _need((global_scale is not None) == nvfp4, "global scales")
        if thread_k != -1:
            _need(size_k % thread_k == 0 and size_n % thread_n == 0, "the tile divides")
            _need(blocks_per_sm <= (4 if moe_block_size <= 16 else 2), "blocks of an SM")
        self.calls.append(
            {"block": moe_block_size, "tile": (thread_k, thread_n), "blocks": blocks_per_sm}
        )
        shape = moe_block_size, top_k, size_m, size_n, size_k
        _check(a, c, codes, bias, scales, locks, slots, *shape)
        blocks = _blocks(slots, experts, int(padded[0]), moe_block_size, size_m * top_k)
        for expert, ids in blocks:
            row = a[ids // top_k].double() @ self._experts.weight(codes, scales, expert)
            if global_scale is not None:
                _need(global_scale.dtype == torch.float32, "float32 global scales")
                row = row * global_scale[expert].double()
            if bias is not None:
                row = row + _bias(bias[expert]).double()
            if mul_topk_weights:
                row = row * weights.flatten()[ids].double().unsqueeze(1)
            c[ids] = row.to(torch.bfloat16)
        return c

    def moe_sum(
        self, given: torch.Tensor, out: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor
    ) -> None:
        here = (expert_map[ids.long()] >= 0).unsqueeze(2)
        out.copy_(torch.where(here, given.float(), 0.0).sum(dim=1))

    def activate(
        self, kind: Any, out: torch.Tensor, given: torch.Tensor, activation_config: dict[str, Any]
    ) -> None:
        if kind is self.kinds.RELU2_NO_MUL:
            out.copy_(given.clamp_(min=0).square())  # in place, as vLLM's
            return
        n, limit = out.shape[1], activation_config["clamp_limit"]
        gate, up = given[:, :n].float(), given[:, n:].float()
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        plain = kind is self.kinds.SILU
        alpha = 1.0 if plain else activation_config["alpha"]
        beta = 0.0 if plain else activation_config["beta"]
        out.copy_(gate * torch.sigmoid(alpha * gate) * (up + beta))


def _grown(x: torch.Tensor, shards: int, rows: int, columns: int) -> torch.Tensor:
    parts = x.reshape(x.shape[0], shards, -1, x.shape[2])
    made = torch.zeros(x.shape[0], shards, rows, columns, dtype=x.dtype)
    made[:, :, : parts.shape[2], : parts.shape[3]] = parts
    return made.flatten(1, 2)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    experts, n, half = codes.shape
    k = 2 * half
    out = torch.empty(experts, k // 16, 2 * n, dtype=torch.int32)
    for e in range(experts):
        q = codes[e].contiguous().view(torch.int32).T.contiguous()
        repack(q, torch.empty(0), out[e], k, n, 4)
    return out


def _scale_rows(raw: torch.Tensor) -> torch.Tensor:
    """(experts, n, blocks) bytes as threads read them."""
    return raw.transpose(1, 2)[..., columns_of_scales(raw.shape[1])].contiguous()


def _bias_rows(bias: torch.Tensor) -> torch.Tensor:
    return bias[:, columns_of_biases(bias.shape[1])].contiguous()
