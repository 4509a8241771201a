"""A reader answers from one whole generation, fast, and never raises."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import tempfile
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import ENVIRONMENT, put, spawn
from test_ledger import KINDS, damage

from fp4tune.cache import codec, fingerprint, publish, reader, snapshot, state
from fp4tune.cache.errors import Missing, StateError
from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment, Layer


@pytest.fixture(autouse=True)
def always_look(monkeypatch):
    """Look at the file at every call, not once a second."""
    monkeypatch.setattr(reader, "INTERVAL", 0.0)


def publish_rows(place, choices, candidates=(), environments=(ENVIRONMENT,), **other) -> int:
    """Publish, with the candidate that each safe choice needs."""
    own = [
        Candidate(
            c.arch, c.gpu, c.profile, c.bucket, c.backend, c.tactic, c.layout, "safe", 0,
            fingerprint=c.fingerprint,
        )
        for c in choices
        if c.status == "safe"
    ]  # fmt: skip
    return publish.publish(place, choices, [*own, *candidates], environments, **other)


def choice(bucket: BucketKey, backend: str = "marlin", status: str = "safe", **other) -> Choice:
    plain = Choice("sm90", "H200", "strict", bucket, backend, "t1", backend, status)
    return replace(plain, fingerprint=ENVIRONMENT.fingerprint, **other)


def bucket(m_lo: int, m_hi: int, n: int = 4096, k: int = 2048) -> BucketKey:
    return BucketKey("nvfp4", "bf16", "bf16", 1, m_lo, m_hi, n, k)


# -- what it answers


@st.composite
def ladders(draw) -> list[Choice]:
    """Disjoint buckets, with and without gaps, for several shapes."""
    found = []
    for shape in draw(st.sets(st.sampled_from(SHAPES), min_size=1)):
        fmt, activation, out, groups, n, k = shape
        edges = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=12)))
        for lo, hi in zip(edges, edges[1:], strict=False):
            if draw(st.booleans()):
                key = BucketKey(fmt, activation, out, groups, lo, hi - 1, n, k)
                found.append(choice(key, draw(st.sampled_from(["marlin", "humming"]))))
    return found


SHAPES = [
    (fmt, activation, out, groups, n, k)
    for fmt in ("nvfp4", "mxfp4")
    for activation in ("bf16", "fp4")
    for out, groups in (("bf16", 1), ("fp16", 8))
    for n, k in ((64, 128), (128, 64))
]


@settings(max_examples=25, deadline=None)
@given(ladders(), st.lists(st.tuples(st.integers(-2, 62), st.sampled_from(SHAPES)), min_size=40))
def test_a_look_up_agrees_with_a_scan_over_the_rows(rows, questions):
    with tempfile.TemporaryDirectory() as place:
        publish_rows(place, rows)
        found = reader.open(place)
        for m, (fmt, activation, out, groups, n, k) in questions:
            decision = found.choose(m, n, k, fmt, activation, out, groups)
            matching = [
                row
                for row in rows
                for b in (row.bucket,)
                if (b.format, b.activation, b.out_dtype, b.groups, b.n, b.k)
                == (fmt, activation, out, groups, n, k)
                and b.m_lo <= m <= b.m_hi
            ]
            assert len(matching) <= 1
            if matching:
                expected = ("safe", matching[0].backend, matching[0].bucket.m_hi)
                assert (decision.status, decision.backend, decision.m_hi) == expected
            else:
                floor = "torch-dequant" if groups == 1 else "torch-experts"
                assert (decision.status, decision.backend) == ("unproven", floor)


def test_whatever_it_is_asked_it_never_raises(tmp_path):
    put(tmp_path)
    found = reader.open(tmp_path)
    strange = (None, [], "x", float("nan"), -1, 1 << 70, {}, object(), ValueError)
    for odd in strange:
        for call in (found.choose, reader.choose):
            assert call(odd, 4096, 2048).status == "unproven"
            assert call(1, odd, 2048).status == "unproven"
            assert call(1, 4096, 2048, odd).status == "unproven"
            assert call(1, 4096, 2048, arch="sm1").status == "unproven"
            assert call(1, 4096, 2048, layout=odd or "none").status == "unproven"
        assert found.alternatives(odd, 4096, 2048) == ()
        assert found.layout(odd, 2048) is None


def test_conditions_times_and_default_come_with_the_choice(tmp_path):
    row = choice(
        bucket(1, 16),
        conditions=({"kind": "min-block-scale", "value": 2**-6},),
        median_us=12.5,
        launches=300,
        default_backend="humming",
    )
    generation = publish_rows(tmp_path, [row], meta={"run": "r1"})
    found = reader.open(tmp_path)
    decision = found.choose(16, 4096, 2048)
    assert decision.conditions == ({"kind": "min-block-scale", "value": 2**-6},)
    assert (decision.median_us, decision.launches) == (12.5, 300)
    assert (decision.default_backend, decision.generation) == ("humming", generation)
    assert found.meta["run"] == "r1"
    assert codec.decode(Choice, found.rows("choice")[0]) == row
    assert found.rows("choice")[0]["conditions"] == [{"kind": "min-block-scale", "value": 2**-6}]


def test_a_decision_is_a_value(tmp_path):
    put(tmp_path)
    decision = reader.open(tmp_path).choose(3, 4096, 2048)
    with pytest.raises(AttributeError):
        decision.backend = "other"
    for same in (copy.deepcopy(decision), pickle.loads(pickle.dumps(decision))):
        assert same == decision and hash(same) == hash(decision)
    assert "marlin" in repr(decision)


def test_the_floor_is_safe_only_where_it_was_proven(tmp_path):
    rows = [
        choice(bucket(1, 1), "torch-dequant", "floor"),
        choice(bucket(2, 2), "torch-dequant", "floor"),
        choice(bucket(3, 3), "torch-dequant", "none"),
    ]
    proven = Candidate(
        "sm90", "H200", "strict", bucket(2, 2), "torch-dequant", "t1", "plain", "safe", 0
    )
    publish_rows(tmp_path, rows, [proven])
    found = reader.open(tmp_path)
    statuses = [found.choose(m, 4096, 2048).status for m in (1, 2, 3)]
    assert statuses == ["unproven", "safe", "unproven"]


def test_inside_one_layout_the_best_of_that_layout_answers(tmp_path):
    def candidate(backend, layout, verdict, rank):
        key = ("sm90", "H200", "strict", bucket(1, 16), backend, "t1", layout, verdict, rank)
        return Candidate(*key, fingerprint=ENVIRONMENT.fingerprint)

    others = [
        candidate("cudnn", "swizzled", "safe", 2),
        candidate("cutlass", "swizzled", "safe", 1),
        candidate("b12x", "swizzled", "unsafe", None),
    ]
    layer = Layer("sm90", "H200", "strict", "nvfp4", "bf16", "bf16", 1, 4096, 2048, "swizzled")
    publish_rows(tmp_path, [choice(bucket(1, 16))], others, layers=[layer])
    found = reader.open(tmp_path)
    assert found.layout(4096, 2048) == "swizzled"
    assert found.choose(3, 4096, 2048).backend == "marlin"
    assert found.choose(3, 4096, 2048, layout="swizzled").backend == "cutlass"
    assert found.choose(3, 4096, 2048, layout="shuffled").status == "unproven"
    ranked = [d.backend for d in found.alternatives(3, 4096, 2048)]
    assert ranked == ["marlin", "cutlass", "cudnn"]


def test_several_gpu_models_are_told_apart_or_not_answered(tmp_path):
    here = bucket(1, 16)
    rows = [
        choice(here, "marlin"),
        choice(here, "humming", gpu="H100"),
        choice(here, "cudnn", arch="sm120", gpu="RTX"),
        choice(here, "triton", arch="sm120", gpu="RTX", profile="vllm"),
    ]
    publish_rows(tmp_path, rows)

    def ask(arch=None, **scope):
        decision = reader.open(tmp_path, **scope).choose(3, 4096, 2048, arch=arch)
        return decision.backend if decision.status == "safe" else decision.reason

    assert "say which arch" in ask()
    assert "say which gpu and profile" in ask(arch="sm90")
    assert "no choices" in ask(arch="sm80")
    assert ask(arch="sm90", gpu="H200") == ask(gpu="H200", profile="strict") == "marlin"
    assert ask(gpu="H100") == "humming"
    assert ask(arch="sm120", profile="vllm") == ask(profile="vllm") == "triton"
    assert "no choices" in reader.open(tmp_path, arch="sm80").choose(3, 4096, 2048).reason
    asked = reader.open(tmp_path, arch="sm90").choose(3, 4096, 2048)
    assert "say which gpu and profile" in asked.reason


# -- staleness


@pytest.mark.parametrize("change", ["rewritten", "replaced", "touched", "removed"])
def test_a_choice_whose_files_changed_is_stale_and_not_used(tmp_path, change):
    library = tmp_path / "kernels.so"
    library.write_bytes(b"abcd")
    stamp = fingerprint.stamp(library)
    rests = Environment("1" * 64, "marlin", "sm90", {}, (stamp,))
    other = Environment("2" * 64, "humming", "sm90", {})
    rows = [
        choice(bucket(1, 16), "marlin"),
        choice(bucket(17, 32), "humming"),
    ]
    rows = [
        replace(r, fingerprint=e.fingerprint) for r, e in zip(rows, (rests, other), strict=True)
    ]
    publish_rows(tmp_path / "s", rows, environments=[rests, other])
    assert reader.open(tmp_path / "s").choose(3, 4096, 2048).status == "safe"
    if change == "rewritten":
        library.write_bytes(b"abcde")
    elif change == "replaced":
        os.rename(library, tmp_path / "old")
        library.write_bytes(b"abcd")
        os.utime(library, ns=(stamp.mtime_ns, stamp.mtime_ns))
    elif change == "touched":
        os.utime(library, ns=(1, stamp.mtime_ns + 1))
    else:
        library.unlink()
    found = reader.open(tmp_path / "s")
    decision = found.choose(3, 4096, 2048)
    assert (decision.status, decision.backend) == ("stale", "torch-dequant")
    assert decision.recorded_backend == "marlin" and str(library) in decision.reason
    assert found.choose(20, 4096, 2048).status == "safe"


# -- generations


def test_a_new_generation_is_seen_and_a_pinned_one_kept(tmp_path):
    put(tmp_path, "a")
    moving, pinned = reader.open(tmp_path), reader.open(tmp_path, pin=True)
    put(tmp_path, "b")
    assert [r.choose(3, 4096, 2048).tactic for r in (moving, pinned)] == ["b", "a"]
    pinned.refresh()
    assert pinned.generation == 1


def test_the_file_is_looked_at_once_a_second_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "INTERVAL", 1.0)
    now = 1000.0
    monkeypatch.setattr(reader, "_monotonic", lambda: now)
    put(tmp_path, "a")
    found = reader.open(tmp_path)
    put(tmp_path, "b")
    now += 0.9
    assert found.choose(3, 4096, 2048).tactic == "a"
    now += 0.2
    assert found.choose(3, 4096, 2048).tactic == "b"


@pytest.mark.parametrize("kind", [*KINDS, "removed"])
def test_a_reload_that_fails_keeps_what_there_was(tmp_path, kind):
    put(tmp_path, "a")
    found = reader.open(tmp_path)
    path = tmp_path / state.CHOICES
    if kind == "removed":
        path.unlink()
        expected: type = Missing
    else:
        expected = damage(path, kind)
    assert found.choose(3, 4096, 2048).tactic == "a"
    assert kind == "removed" or type(found.problem) is expected
    with pytest.raises(expected) as caught:
        reader.open(tmp_path)
    assert caught.value.exit_code == 2
    path.unlink(missing_ok=True)
    put(tmp_path, "b")
    assert found.choose(3, 4096, 2048).tactic == "b" and found.problem is None


def everything(found: reader.Reader) -> list[list[dict]]:
    return [found.rows(table) for table in snapshot.TABLES]


def test_a_changed_byte_is_refused_or_changes_no_row(tmp_path):
    """Bytes of free space, of indexes and of the header's counters are no part of any row."""
    put(tmp_path, "a")
    path = tmp_path / state.CHOICES
    data = path.read_bytes()
    expected = everything(reader.open(tmp_path))
    rng = random.Random(3)
    names = [i for i in range(len(data)) if data.startswith(b"marlin", i)]
    refused = 0
    for at in names + rng.sample(range(len(data)), 150):
        path.unlink()
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            assert everything(reader.open(tmp_path)) == expected
        except StateError:
            refused += 1
    assert refused >= 6  # at least where "marlin" stands in the pages of six rows


def test_the_shared_reader_finds_what_is_published_later(own_state, monkeypatch):
    monkeypatch.setattr(state, "SYSTEM", str(own_state / "system"))
    monkeypatch.setenv("XDG_STATE_HOME", str(own_state / "home"))
    monkeypatch.setattr(reader, "_shared", None)
    with pytest.raises(StateError):
        reader.open()
    assert reader.choose(3, 4096, 2048).status == "unproven"
    put(own_state)
    assert reader.choose(3, 4096, 2048).backend == "marlin"


# -- threads, processes, files


@pytest.mark.slow
def test_readers_never_see_a_mixture_of_generations(tmp_path):
    """Every row of generation g names the tactic g-1; four readers look while g rises."""
    code = """
        import sys
        from fp4tune.cache import reader
        reader.INTERVAL = 0.0
        kept = reader.open(sys.argv[1])
        last = seen = 0
        while last < int(sys.argv[2]):
            fresh = reader.open(sys.argv[1])
            kept.refresh()
            for r in (fresh, kept):
                rows = [row for t in ("choice", "candidate") for row in r.rows(t)]
                tactics = {row["tactic"] for row in rows}
                assert tactics == {str(r.generation - 1)}, (r.generation, tactics)
                assert len(r.rows("choice")) == 60
            assert kept.problem is None and kept.generation >= last
            seen += kept.generation != last
            last = kept.generation
        print(seen)
    """
    put(tmp_path, "0", layers=20)
    rounds = 60
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    readers = [spawn(code, tmp_path, rounds, **pipes) for _ in range(2)]
    for generation in range(1, rounds):
        assert put(tmp_path, str(generation), layers=20) == generation + 1
    for worker in readers:
        out, err = worker.communicate(timeout=30)
        assert worker.returncode == 0, err
        assert int(out) > 1


def test_threads_share_a_reader_that_reloads(tmp_path):
    put(tmp_path, "0")
    found = reader.open(tmp_path)
    wrong: list[object] = []
    done = threading.Event()

    def look():
        while not done.is_set():
            decision = found.choose(random.randrange(1, 65), 4096, 2048)
            if decision.tactic != str(decision.generation - 1):
                wrong.append(decision)
            time.sleep(1e-4)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for generation in range(1, 15):
        put(tmp_path, str(generation))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert found.choose(3, 4096, 2048).generation == 15


def test_a_fork_while_another_thread_loads_does_not_block_the_child(tmp_path):
    """In a process of its own: this one has threads that a fork should not copy."""
    code = """
        import os, sys
        from pathlib import Path
        from fp4tune.cache import reader
        from stores import put
        place = Path(sys.argv[1])
        reader.INTERVAL = 0.0
        put(place, "a")
        found = reader.open(place)
        found._lock.acquire()  # as a thread would hold it that is loading just now
        put(place, "b")
        child = os.fork()
        if child == 0:
            os._exit(0 if found.choose(3, 4096, 2048).tactic == "b" else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert found.choose(3, 4096, 2048).tactic == "a"
    """
    assert spawn(code, tmp_path).wait(30) == 0


def test_no_descriptor_and_no_file_is_left(tmp_path):
    put(tmp_path)
    names = sorted(os.listdir(tmp_path))
    before = os.listdir("/proc/self/fd")
    found = [reader.open(tmp_path) for _ in range(5)]
    assert os.listdir("/proc/self/fd") == before
    assert sorted(os.listdir(tmp_path)) == names and len(found) == 5


def test_the_file_or_its_folder_may_have_any_name(tmp_path):
    place = tmp_path / "50% odd? name#1 é"
    put(place)
    assert reader.open(place).choose(3, 4096, 2048).status == "safe"
    assert reader.open(place / state.CHOICES).choose(3, 4096, 2048).status == "safe"


def test_reading_needs_the_standard_library_only(tmp_path):
    put(tmp_path)
    code = """
        import sys
        before = set(sys.modules)
        from fp4tune.cache import reader
        imported = set(sys.modules) - before
        assert not imported & {"dataclasses", "pathlib", "typing", "threading", "logging"}, imported
        assert reader.open(sys.argv[1]).choose(3, 4096, 2048).status == "safe"
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - {"fp4tune"}
        foreign = {n for n in loaded if n not in sys.stdlib_module_names}
        sys.exit(f"not of the standard library: {foreign}" if foreign else 0)
    """
    done = spawn(code, tmp_path, stderr=subprocess.PIPE, text=True)
    _, err = done.communicate(timeout=30)
    assert done.returncode == 0, err
