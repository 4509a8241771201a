"""The check on the host, for what is not on a GPU: the kernel's counters and records, from torch.

It leaves in a `Bench` what the kernel would, so that one reader serves both.
"""

from __future__ import annotations

import torch

from ..probes.problem import Fp4Tensor
from .launch import HEADER, Bench, CallSite
from .limits import Limit
from .rows import Seen, WatchedCall, check, one_row
from .vectors import Sums


def look(
    call: WatchedCall, sums: Sums, limit: Limit, bench: Bench, site: CallSite, cut: int = 1
) -> None:
    """Check `call` and count it at `site`; each `cut` rows leave one record at most."""
    counters = bench.counters[site.index]
    tick = int(counters[4])
    counters[4] += 1
    if not int(sums.gate) or (tick + site.phase) % site.period or not call.y.shape[0]:
        return
    seen = check(call, sums, limit)
    counters[0] += int((~seen.skipped).sum())
    counters[1] += int(seen.skipped.sum())
    counters[2] += int(seen.suspicious.sum())
    counters[3] += int(seen.beyond.sum())
    for group in range(sums.groups.count):
        bad = seen.suspicious[:, group].nonzero().flatten().tolist()
        for index in {block // cut: block for block in reversed(bad)}.values():
            _leave_record(call, sums, seen, bench, (site.index, index, group, tick))


def _leave_record(
    call: WatchedCall, sums: Sums, seen: Seen, bench: Bench, where: tuple[int, int, int, int]
) -> None:
    site, index, group, tick = where
    claim = int(bench.ring_state[0])
    bench.ring_state[0] += 1
    if claim >= int(bench.ring_state[1]):
        bench.counters[site, 5] += 1
        return
    one = one_row(call, index)
    expert = 0 if one.experts is None else int(one.experts)
    record = bench.ring[claim % bench.slots]
    head = record[:64].view(torch.int64)
    head[1:7] = torch.tensor([site, index, group, expert, call.y.shape[0], tick])
    alpha = float(torch.as_tensor(call.alpha)) * float(sums.alpha[expert])
    numbers = record[64:76].view(torch.float32)
    numbers[:] = torch.tensor([seen.gap[index, group], seen.limit[index, group], alpha])
    parts = [one.y[0, sums.groups.columns(group)].contiguous().view(torch.uint8)]
    if isinstance(one.a, Fp4Tensor):
        scales = one.a.scales.reshape(-1)
        parts[:0] = [one.a.codes[0].contiguous(), scales, scales.new_zeros(scales.numel() % 2)]
    else:
        parts[:0] = [one.a[0].contiguous().view(torch.uint8)]
    whole = torch.cat(parts)
    record[HEADER : HEADER + whole.numel()] = whole
    head[0] = claim + 1
