"""A process that watches: what it sees of a layer that breaks, and what it does then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fp4tune
from fp4tune.cache import reader
from fp4tune.probes.formats import dequantise, quantise
from fp4tune.probes.problem import NVFP4, Fp4Tensor, Problem
from fp4tune.witness import counts, here, launch, process, rows, sources, vectors
from fp4tune.witness.confirm import CLEARED, FAULT, SUSPECTED, Confirmation
from fp4tune.witness.forms import weight_of
from fp4tune.witness.limits import Limit
from fp4tune.witness.linear import Known, Watched, watch
from fp4tune.witness.plan import ONE_OF, WatchPlan
from fp4tune.witness.respond import Responder
from fp4tune.witness.ring import Record, RingReader
from fp4tune.witness.watcher import WatchDevice, WatchSubject, Witness, WitnessOptions

pytestmark = pytest.mark.usefixtures("one_thread", "seeded_signs")
N, K = 256, 128
CPU = WatchDevice("cpu", "cpu", "")


class Packed(torch.nn.Module):
    """A linear layer with an NVFP4 weight; `wrong` columns of it come out zero."""

    def __init__(self, seed: int = 1, n: int = N, k: int = K) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        w = quantise(torch.randn(n, k, generator=g), NVFP4)
        self.weight = torch.nn.Parameter(w.codes, requires_grad=False)
        self.weight_scale = torch.nn.Parameter(w.scales.view(torch.float8_e4m3fn), False)
        self.weight_scale_2 = torch.nn.Parameter(w.global_scale, False)
        self.bias = torch.nn.Parameter(torch.randn(n, generator=g).bfloat16(), False)
        self.values = dequantise(w, torch.float32)
        self.wrong = 0

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        out = a.float() @ self.values.T
        if self.wrong:
            out = torch.cat((torch.zeros_like(out[..., : self.wrong]), out[..., self.wrong :]), -1)
        return (out + self.bias.float()).to(a.dtype)


class Heard:
    """A witness that looks at every call, and what it hands on."""

    def __init__(self, **options: object) -> None:
        self.judged: list[tuple[WatchSubject, object, object]] = []
        chosen = {"share": "every", "host_copies": True} | options
        self.witness = Witness(WitnessOptions(**chosen), lambda *found: self.judged.append(found))

    @property
    def statuses(self) -> list[str]:
        self.witness.look()
        return [found.status for *_, found in self.judged]


def activation(m: int = 8, seed: int = 5) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


# -- one layer


def test_a_layer_that_is_right_is_counted_and_nothing_else():
    heard, layer = Heard(), Packed()
    watch(layer, "mlp.down", witness=heard.witness)
    for m in (1, 3, 8):
        layer(activation(m))
    assert heard.statuses == []
    (one,) = heard.witness.layers()
    assert (one.counts["rows"], one.counts["launches"], one.m_lo, one.m_hi) == (12, 3, 1, 8)
    assert one.counts["suspicions"] == one.counts["faults"] == 0


def test_a_layer_that_breaks_is_confirmed_with_its_place():
    heard, layer = Heard(), Packed()
    watch(layer, "mlp.down", Known(backend="mine"), witness=heard.witness)
    layer(activation())
    layer.wrong = 128
    layer(activation())
    assert set(heard.statuses) == {FAULT}
    subject, record, judged = heard.judged[0]
    assert (subject.layer, subject.backend, record.m) == ("mlp.down", "mine", 8)
    assert judged.columns[0] < 128 and judged.columns[1] < 128 and judged.wrong > 100


def test_without_the_weight_it_is_suspected_only():
    heard, layer = Heard(host_copies=False), Packed()
    watch(layer, witness=heard.witness)
    layer.wrong = 128
    layer(activation())
    assert set(heard.statuses) == {SUSPECTED}


def test_a_suspicion_that_is_right_after_all_is_cleared():
    heard, layer = Heard(), Packed()
    watched = watch(layer, witness=heard.witness)
    watched.weight.limit = Limit(0.0, 0.0, 0.0, inf)  # everything is suspicious
    layer(activation())
    assert heard.statuses and set(heard.statuses) == {CLEARED}


def test_a_layer_taken_off_is_left_alone():
    heard, layer = Heard(), Packed()
    watch(layer, witness=heard.witness).remove()
    layer.wrong = 128
    layer(activation())
    assert heard.statuses == [] and not heard.witness.layers()[0].counts["rows"]


def test_any_callable_with_a_weight_can_be_watched():
    heard, layer = Heard(), Packed()
    weight = Fp4Tensor(
        NVFP4, layer.weight.data, layer.weight_scale.view(torch.uint8), layer.weight_scale_2.data
    )
    plain = watch(lambda a: layer(a) - layer.bias, "f", Known(weight), witness=heard.witness)
    layer.bias.data.zero_()
    assert torch.equal(plain(activation()), layer(activation()))
    layer.wrong = 64
    plain(activation())
    assert set(heard.statuses) == {FAULT}


def test_what_cannot_be_read_is_told_once_and_left_alone(caplog):
    heard = Heard()
    for _ in range(2):
        one = watch(torch.nn.Linear(8, 8, dtype=torch.float64), "odd", witness=heard.witness)
        assert isinstance(one, Watched)
    strange = torch.nn.Linear(8, 8)
    strange.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), False)
    assert "in no known form" in watch(strange, "strange", witness=heard.witness).why
    watch(strange, "strange", witness=heard.witness)
    assert sum("strange is not watched" in r.message for r in caplog.records) == 1
    assert any(line.startswith("strange: ") for line in heard.witness.unwatched())


def test_a_weight_with_nan_scales_is_left_alone():
    heard, layer = Heard(), Packed()
    layer.weight_scale.data.view(torch.uint8)[3, 1] = 0x7F
    assert "not finite" in watch(layer, witness=heard.witness).why


def test_torch_compile_keeps_one_graph_and_the_witness_sees_its_calls():
    heard, layer = Heard(), Packed()
    watch(layer, witness=heard.witness)
    from torch._dynamo.testing import CompileCounter

    counted = CompileCounter()

    def serve(a: torch.Tensor) -> torch.Tensor:
        return layer(a).relu()

    compiled = torch.compile(serve, backend=counted, fullgraph=True, dynamic=True)
    for m in (3, 5, 9):
        compiled(activation(m))
    assert counted.frame_count == 1
    heard.witness.look()
    assert heard.witness.layers()[0].counts["rows"] == 17


def test_what_is_kept_of_a_weight_condemns_nobody_once_it_is_another():
    """A copy that has changed, or whose rows lie in another order, is not what was loaded."""
    heard, layer = Heard(), Packed()
    watched = watch(layer, witness=heard.witness)
    (kept,) = watched.weight.source.weights
    order = torch.arange(N)
    order[4 : N - 4] = order[4 : N - 4].flip(0)
    kept.codes.copy_(kept.codes[order])
    watched.weight.limit = Limit(0.0, 0.0, 0.0, inf)
    layer(activation())
    assert set(heard.statuses) == {SUSPECTED}
    heard.witness.redraw(watched.weight)
    assert watched.weight.source is None and watched.weight.drawn == 1 and watched.weight.sums.gate


def test_a_file_that_was_replaced_is_not_read_for_the_one_that_was_loaded(tmp_path):
    weight = quantise(torch.randn(N, K), NVFP4)
    path = safetensors(tmp_path / "a.safetensors", {"w": weight.codes})
    found = sources.stored_tensors(path)["w"]
    assert torch.equal(found.read(slice(0, N), slice(0, K // 2)), weight.codes)
    safetensors(tmp_path / "b.safetensors", {"w": weight.codes.flip(0)}).rename(path)
    with pytest.raises(sources.SourceGone, match="not the file any more"):
        found.read(slice(0, N), slice(0, K // 2))


def test_a_layer_that_quantises_its_activations_is_left_alone():
    heard, layer = Heard(), Packed()
    layer.input_scale = torch.ones(())
    assert "quantises its activations" in watch(layer, witness=heard.witness).why


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_layer_is_watched_in_its_own_type_however_it_is_called(dtype):
    heard, layer = Heard(), torch.nn.Linear(K, N, dtype=dtype)
    watched = watch(layer, witness=heard.witness)
    a = torch.randn(8, K, dtype=dtype)
    layer(input=a)
    watched(a)
    assert not heard.statuses
    heard.witness.look()
    assert heard.witness.layers()[0].counts["rows"] == 16
    assert heard.witness.layers()[0].m_lo == 8


def test_a_plain_layer_s_signs_are_drawn_anew_from_itself():
    heard, layer = Heard(redraw=1e-9, host_copies=False), torch.nn.Linear(K, N).bfloat16()
    watched = watch(layer, witness=heard.witness)
    heard.witness._redraw()
    heard.witness._redraw()
    assert watched.weight.drawn == 2
    layer.weight.data.mul_(2)
    heard.witness._redraw()
    heard.witness._redraw()
    assert watched.weight.drawn == 2 and watched.weight.held is None


def test_calls_of_another_type_than_was_said_are_told_once(caplog):
    heard, layer = Heard(), torch.nn.Linear(K, N).bfloat16()
    watched = watch(layer, "odd", dtype=torch.float16, witness=heard.witness)
    for _ in range(2):
        watched(torch.randn(1, K).bfloat16())
    assert caplog.text.count("odd is not watched in a call of torch.bfloat16") == 1


def test_an_activation_s_own_global_scale_counts_once():
    heard = Heard()
    weight, a = (quantise(torch.randn(rows, K), NVFP4) for rows in (N, 8))
    problem = Problem("nvfp4", 1, N, K, "fp4", "bf16")
    watched = heard.witness.add(WatchSubject("l", "b", problem), [weight])
    y = (dequantise(a, torch.float64) @ dequantise(weight, torch.float64).T).bfloat16()
    heard.witness.see(watched, rows.WatchedCall(a, y))
    assert heard.statuses == []
    y[3, :4] += torch.tensor([100, 230, 470, 950]).bfloat16()
    heard.witness.see(watched, rows.WatchedCall(a, y))
    assert set(heard.statuses) == {FAULT} and heard.judged[0][2].wrong < 200


def test_a_bias_first_seen_in_a_call_is_there_when_it_is_judged():
    heard, layer = Heard(), Packed()
    problem = Problem("nvfp4", 1, N, K, "bf16", "bf16")
    weight = weight_of(layer)
    watched = heard.witness.add(WatchSubject("l", "b", problem), [weight])
    watched.limit = Limit(0.0, 0.0, 0.0, inf)
    a = activation()
    heard.witness.see(watched, rows.WatchedCall(a, layer(a), bias=layer.bias))
    assert heard.statuses and set(heard.statuses) == {CLEARED}


def test_confirmed_faults_are_not_crowded_out_by_suspicions():
    subject = WatchSubject("l", "b", Problem("nvfp4", 1, N, K))
    record = Record(0, 4, 1, 0, 0, 0, 1.0, 0.1, 1.0, torch.zeros(1, dtype=torch.uint8))
    responder = Responder("log")
    responder(subject, record, Confirmation(FAULT, "bad", 3, (0, 2)))
    for _ in range(2 * counts.MOST_FAULTS):
        responder(subject, record, Confirmation(SUSPECTED, "the weight has changed since"))
    kept = [each["status"] for each in responder.faults]
    assert len(kept) == counts.MOST_FAULTS and kept.count(FAULT) == 1


def test_a_process_is_ended_once():
    ends = []
    responder = Responder("stop", None, lambda: ends.append(1))
    subject = WatchSubject("l", "b" * 300, Problem("nvfp4", 1, N, K))
    record = Record(0, 4, 1, 0, 0, 0, 1.0, 0.1, 1.0, torch.zeros(1, dtype=torch.uint8))
    for _ in range(3):
        responder(subject, record, Confirmation(FAULT, "bad", 3, (0, 2)))
    assert ends == [1] and len(responder.faults[0]["backend"]) <= 200


def test_a_storm_of_suspicions_is_read_on_and_on():
    bench = launch.bench(torch.device("cpu"), 4, 32, 1024)
    reader = RingReader(bench)

    def claim(count):
        for _ in range(count):
            number = int(bench.ring_state[0])
            bench.ring_state[0] += 1
            if number < int(bench.ring_state[1]):
                bench.ring[number % 32, :8].view(torch.int64)[0] = number + 1

    claim(40)
    reader.counters()
    claim(20)  # before there is room again
    seen = [len(reader.records())]
    for _ in range(8):
        claim(1000)
        reader.counters()
        seen.append(len(reader.records()))
    assert seen[0] == 32 and min(seen[1:]) > 0


# -- drawing anew, and sources


def test_signs_are_drawn_anew_while_it_serves():
    heard, layer = Heard(redraw=1e-9), Packed()
    watched = watch(layer, witness=heard.witness)
    before = watched.weight.sums.signs.clone()
    heard.witness._redraw()  # closed
    layer(activation())
    heard.witness._redraw()  # made, and open again
    layer(activation())
    assert heard.statuses == [] and watched.weight.drawn == 2
    assert not torch.equal(before, watched.weight.sums.signs)
    assert heard.witness.layers()[0].counts["rows"] == 8  # none while it was closed


def safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    header, data = {}, b""
    kinds = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_weight_is_taken_from_the_checkpoint_and_only_where_it_is_the_same(tmp_path):
    layer = Packed()
    top, bottom = slice(0, 64), slice(64, N)
    stored = {}
    for name, part in (("q", top), ("k", bottom)):
        stored[f"{name}.weight"] = layer.weight.data[part]
        stored[f"{name}.weight_scale"] = layer.weight_scale.data[part]
    found = sources.stored_tensors(safetensors(tmp_path / "a.safetensors", stored))
    parts = tuple(
        sources.StoredPart(
            found[f"{name}.weight"], found[f"{name}.weight_scale"], 0, count, 0, K // 16
        )
        for name, count in (("q", 64), ("k", N - 64))
    )
    source = sources.CheckpointSource(NVFP4, (parts,))
    heard = Heard(host_copies=False)
    watched = watch(layer, known=Known(source=source), witness=heard.witness)
    assert watched.weight.source is source
    layer.wrong = 128
    layer(activation())
    assert set(heard.statuses) == {FAULT}
    swapped = sources.CheckpointSource(NVFP4, (parts[::-1],))
    other = watch(Packed(), known=Known(source=swapped), witness=heard.witness)
    assert other.weight.source is None


def test_a_checkpoint_that_went_leaves_a_suspicion(tmp_path):
    layer = Packed()
    stored = {"weight": layer.weight.data, "scale": layer.weight_scale.data}
    path = safetensors(tmp_path / "a.safetensors", stored)
    found = sources.stored_tensors(path)
    part = sources.StoredPart(found["weight"], found["scale"], 0, N, 0, K // 16)
    heard = Heard(host_copies=False)
    source = sources.CheckpointSource(NVFP4, ((part,),))
    watch(layer, known=Known(source=source), witness=heard.witness)
    path.unlink()
    layer.wrong = 128
    layer(activation())
    assert set(heard.statuses) == {SUSPECTED}


@given(st.binary(max_size=64))
def test_what_is_no_safetensors_file_is_a_source_that_is_gone(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("odd") / "a.safetensors"
    path.write_bytes(data)
    try:
        assert isinstance(sources.stored_tensors(path), dict)
    except sources.SourceGone as error:
        assert "no safetensors file" in str(error)


# -- which calls


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 500))
def test_a_few_calls_are_watched_and_every_key_is_in_the_end(calls, graphs, turn):
    plan: WatchPlan[int] = WatchPlan("few", turn)
    for _ in range(graphs):
        for call in range(calls):
            plan.choose(call)
    total = calls * graphs
    assert total // ONE_OF - 2 <= sum(plan.watched.values()) <= total // ONE_OF + 1
    seen = set(range(calls)) - set(plan.unwatched())
    assert len(seen) >= min(calls, total // ONE_OF - 2) * 0.5


def test_processes_begin_at_different_calls():
    def first(turn: int) -> int:
        plan: WatchPlan[int] = WatchPlan("few", turn)
        return next(call for call in range(200) if plan.choose(call))

    assert len({first(turn) for turn in range(8)}) == 8
    assert first(0) == 0 and all(first(turn) < ONE_OF for turn in range(100))


@given(st.lists(st.integers(0, 5)))
def test_every_call_is_watched_where_that_is_asked(keys):
    plan: WatchPlan[int] = WatchPlan("every")
    assert all(plan.choose(key) for key in keys) and not plan.unwatched()
    with pytest.raises(ValueError, match="few or every"):
        WatchPlan("all")


# -- the ring


def test_a_full_ring_drops_and_counts_and_goes_on():
    heard, layer = Heard(), Packed(n=64)
    watch(layer, witness=heard.witness)
    layer.wrong = 64
    layer(activation(100))
    dropped = 100 - len(heard.statuses)
    device = next(iter(heard.witness._devices.values()))
    assert dropped > 0 and int(device.counters[0, 5]) == dropped
    assert heard.witness.layers()[0].counts["suspicions"] == 100
    before = len(heard.judged)
    layer(activation(4))
    assert len(heard.statuses) == before + 4


def test_one_launch_of_a_period_is_looked_at():
    layer, a = Packed(n=64), activation(2)
    sums = vectors.sums_of([layer.values], vectors.draw_signs(64))
    bench = launch.bench(torch.device("cpu"), 1, 4, launch.evidence_bytes(K, 64))
    from fp4tune.witness.limits import limit

    for _ in range(9):
        call = rows.WatchedCall(a, layer(a), bias=layer.bias)
        here.look(call, sums, limit("bf16", 64, K), bench, launch.CallSite(0, 2, 3))
    assert bench.counters[0, :5].tolist() == [6, 0, 0, 0, 9]


# -- what happens then


def fault(layer: Packed, responder: Responder, name: str = "down", calls: int = 1) -> Witness:
    options = WitnessOptions("every", host_copies=True)
    witness = Witness(options, responder)
    watch(layer, name, Known(backend="mine"), witness=witness)
    layer.wrong = 128
    for _ in range(calls):
        layer(activation())
    witness.look()
    return witness


def test_a_fault_is_quarantined_once_and_said(own_state, caplog):
    own_state.mkdir()
    responder = Responder("quarantine", str(own_state))
    fault(Packed(), responder, calls=3)
    (reported,) = responder.reported
    assert (reported.quarantine.backend, reported.quarantine.by) == ("mine", "report")
    assert reported.shared and "production" in reported.quarantine.reason
    assert [entry.id for entry in reader._own] == [reported.quarantine.id]
    said = [r.getMessage() for r in caplog.records if "mine" in r.getMessage()]
    assert sum("gave a wrong result in down" in text for text in said) == 1


def test_a_fault_is_only_said_where_that_is_asked(caplog):
    responder = Responder("log")
    fault(Packed(), responder)
    assert not reader._own and responder.faults[0]["status"] == FAULT
    assert "gave a wrong result" in caplog.text
    with pytest.raises(ValueError, match="log, quarantine, stop"):
        Responder("panic")


def test_what_is_suspected_never_quarantines(caplog):
    responder = Responder("stop", end=lambda: pytest.fail("ended"))
    witness = Witness(WitnessOptions("every"), responder)
    layer = Packed()
    watch(layer, "down", Known(backend="mine"), witness=witness)
    layer.wrong = 128
    layer(activation())
    witness.look()
    assert not reader._own and responder.faults[0]["status"] == SUSPECTED
    assert "suspected, not confirmed" in caplog.text


STOPS = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
import fp4tune
from test_witness_watch import Packed, activation
from fp4tune.witness.linear import Known
layer = Packed()
fp4tune.watch(layer, "down", Known(backend="mine"))
layer.wrong = 128
print("serving", flush=True)
while True:
    layer(activation())
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_process_that_is_to_stop_ends_by_sigterm_and_has_told_the_node(own_state):
    own_state.mkdir()
    variables = {
        **os.environ,
        "FP4TUNE_WATCH": "every",
        "FP4TUNE_ON_FAULT": "stop",
        "FP4TUNE_WATCH_COPIES": "1",
        "FP4TUNE_WITNESS": str(own_state / "witness"),
    }
    code = STOPS.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], env=variables, timeout=60)
    assert done.returncode == -signal.SIGTERM
    (report,), _ = counts.read(own_state / "witness")
    assert report.total("faults") >= 1 and report.faults[0]["status"] == FAULT


# -- counts


def test_what_is_told_is_read_back(own_state):
    responder = Responder("log")
    witness = fault(Packed(), responder)
    folder = own_state / "witness"
    counts.write(witness.report(responder.faults, CPU), str(folder))
    (report,), ignored = counts.read(folder)
    assert not ignored and report.pid == os.getpid() and report.uid == os.getuid()
    (one,) = report.watched
    # The signs are the system's: of eight rows that each lack a tile, one may now and then pass.
    assert one.counts["faults"] == len(responder.faults) >= 1
    assert one.counts["rows"] == 8 and one.backend == "mine"
    assert report.faults[0]["layer"] == "down" and report.faults[0]["regime"] == "production"
    assert folder.stat().st_mode & 0o7777 == 0o1777
    ((key, summed),) = counts.by_backend([report, report]).items()
    assert key == ("cpu", "mine", report.reporter) and summed["rows"] == 16


@settings(max_examples=60)
@given(st.data())
def test_a_file_that_is_changed_is_read_or_ignored_and_never_more(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("box")
    path = Path(counts.write(_example(), str(folder)))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    found, ignored = counts.read(folder)
    assert len(found) + len(ignored) == 1


def _example() -> counts.WatchReport:
    layer = counts.WatchedLayer(
        "mine", "t", "nvfp4", "bf16", "bf16", 1, 64, 64, 1, 2, 1, dict.fromkeys(counts.COUNTED, 3)
    )
    return counts.WatchReport(1, 2.0, 3.0, "cpu", "cpu", "", (layer,))


def test_a_drop_box_full_of_anything_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    (tmp_path / "b.json").symlink_to("/dev/zero")
    (tmp_path / "c.json").write_bytes(b"[" * 300_000)
    (tmp_path / "d.json").mkdir()
    for index in range(100):
        (tmp_path / f"e{index}.json").write_text("{}")
    counts.write(_example(), str(tmp_path))
    begun = time.monotonic()
    found, ignored = counts.read(tmp_path)
    assert time.monotonic() - begun < 5 and len(found) == 1
    assert any("the newest 64 are read" in sentence for sentence in ignored)


def test_the_process_has_one_witness_as_the_environment_asks(monkeypatch, own_state, caplog):
    process.end()  # of another test's
    monkeypatch.setenv("FP4TUNE_WATCH", "every")
    monkeypatch.setenv("FP4TUNE_ON_FAULT", "explode")
    monkeypatch.setenv("FP4TUNE_WITNESS", str(own_state / "box"))
    try:
        layer = Packed()
        fp4tune.watch(layer, "down")
        assert process.mine() is process.mine()
        assert process.mine().witness.options.share == "every"
        assert process.mine().responder.on_fault == "quarantine" and "explode" in caplog.text
        layer(activation())
    finally:
        process.end()
    (report,), _ = counts.read(own_state / "box")
    assert report.total("rows") == 8


def test_a_problem_of_w4a16_has_the_dtype_of_its_output():
    heard = Heard()
    layer = Packed()
    fp16 = watch(layer, dtype=torch.float16, witness=heard.witness)
    assert fp16.weight.subject.problem == Problem("nvfp4", 1, N, K, "bf16", "fp16")


def test_what_is_watched_nowhere_is_listed_by_layer_and_m():
    heard = Heard(share="few")
    layers = [Packed(seed) for seed in range(3)]
    for index, layer in enumerate(layers):
        watch(layer, f"layers.{index}", witness=heard.witness)
    for layer in layers:
        layer(activation(5))
    left = heard.witness.unwatched()
    assert len(left) >= 2 and set(left) <= {f"layers.{index} up to m=8" for index in range(3)}
    for _ in range(60):
        for layer in layers:
            layer(activation(5))
    assert heard.witness.unwatched() == []
