"""What processes that watch tell their node, and what the node and the fleet make of it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from urllib.request import urlopen

import fleets
import pytest
import test_daemon_evidence as evidence
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.cache import quarantine_store, reader
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey
from fp4tune.daemon.board import Board
from fp4tune.daemon.witnessed import OTHER, WitnessBoard
from fp4tune.fleet import bundle, export, merge, production
from fp4tune.fleet import report as reporting
from fp4tune.witness import counts

BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 16, 4096, 2048)


def report(pid: int = 7, backend: str = "fast", faults: int = 0, **counted: int):
    layer = counts.WatchedLayer(
        backend, "default", "nvfp4", "bf16", "bf16", 1, 4096, 2048, 1, 64, 3,
        {**dict.fromkeys(counts.COUNTED, 0), "faults": faults, **counted},
    )  # fmt: skip
    fault = {
        "status": "fault", "layer": "layers.3.down", "backend": backend, "tactic": "default",
        "format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "groups": 1, "n": 4096,
        "k": 2048, "m": 9, "row": 2, "tile": [0, 3], "columns": [400, 511], "wrong": 100,
        "error": 0.5, "allowed": 0.015, "regime": "production", "why": "100 elements are wrong",
        "at": 5.0 + pid,
    }  # fmt: skip
    return counts.WatchReport(
        pid, 2.0, 3.0, "Model C", "cpu", "", (layer,), (fault,) * faults, unwatched=4
    )


def box(place: Path) -> str:
    return str(place / counts.FOLDER)


# -- the daemon


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 50), st.booleans()), max_size=12))
def test_counts_only_grow_however_files_come_and_go(tmp_path_factory, steps):
    place = tmp_path_factory.mktemp("state")
    board, before, now = WitnessBoard(), 0, 0.0
    for pid, rows, stays in steps:
        path = Path(counts.write(report(pid, rows=rows), box(place)))
        now += 10
        board.look(str(place), now)
        total = sum(own["rows"] for own in board.totals.values())
        assert total >= before
        before = total
        if not stays:
            path.unlink()
    most = {}
    for pid, rows, _ in steps:
        most[pid] = max(most.get(pid, 0), rows)
    assert before == sum(most.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="files of several users")
def test_however_many_files_one_leaves_another_s_are_read(tmp_path):
    """Numbers sort first, names with a dot are no reports, and each is of one who reports."""
    folder = tmp_path / "box"
    counts.make_box(str(folder))
    for number in range(9000):
        name = folder / (f".0{number}" if number % 2 else f"0{number}.json")
        name.touch()
        os.chown(name, 65533, -1)
    counts.write(report(7, rows=3), str(folder))
    mine = folder / "7-2.json"
    os.chown(mine, 65534, -1)
    found, ignored = counts.read(folder)
    assert [each.uid for each in found] == [65534] and len(ignored) < 100
    drops = counts.DropBox(folder)
    seen = [len(drops.read()[0]) for _ in range(6)]
    assert seen[-2:] == [1, 1], "what was found once is not lost while the next pass goes on"


def test_processes_that_one_user_makes_up_press_out_nobody_else_s(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(counts.DropBox, "read", lambda self: (list(told), []))
    board, rows = WitnessBoard(), 0
    for turn in range(3):
        told[:] = [dataclasses.replace(report(n, rows=1), uid=65533) for n in range(6000)]
        told.append(dataclasses.replace(report(9, "fast", rows=10 * (turn + 1)), uid=65534))
        board.look(str(tmp_path), 10.0 * turn)
        rows = board.totals["Model C", "fast"]["rows"]
        mine = board._last[65534]
        assert list(mine.values())[0]["rows"] == 10 * (turn + 1)
    assert rows >= 30 and len(board._last[65533]) <= 4096


def test_the_daemon_makes_the_box_before_anybody_else(tmp_path):
    from fp4tune.daemon.config import DaemonConfig
    from fp4tune.daemon.service import Service

    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    Service(DaemonConfig(state=str(place), gpus=("none",)))._prepare()
    assert (place / counts.FOLDER).stat().st_mode & 0o7777 == 0o1777


def test_names_that_are_made_up_make_no_labels():
    board = WitnessBoard()
    board.totals = {
        ("Model C", "fast"): {**dict.fromkeys(counts.COUNTED, 0), "rows": 5},
        ("Model C", "x" * 50): {**dict.fromkeys(counts.COUNTED, 0), "rows": 2},
        ("<script>", "fast"): {**dict.fromkeys(counts.COUNTED, 0), "rows": 1},
    }
    found = board.metrics({"fast"}, {"Model C"})
    rows = {key: numbers["rows"] for key, numbers in found.items()}
    assert rows == {("Model C", "fast"): 5, ("Model C", OTHER): 2, (OTHER, "fast"): 1}


@pytest.fixture
def node(tmp_path, own_state):
    """A state in which fast and plain are published as safe, and fast as the choice."""
    evidence.put(own_state, tmp_path / "site", ("fast", "1.0"), ("plain", "1.0"))
    return own_state


def test_the_daemon_shows_counts_and_faults(node, tmp_path):
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    from fp4tune.daemon.config import DaemonConfig, HttpOptions
    from fp4tune.daemon.http import Serving, application
    from fp4tune.daemon.service import Service

    counts.write(report(rows=100, suspicions=2), box(node))
    counts.write(report(8, rows=50, faults=2), box(node))
    options = HttpOptions("127.0.0.1:0")
    service = Service(DaemonConfig(state=str(node), gpus=("none",), http=options))
    service.start()
    service.tick()
    serving = Serving(application(service.board, lambda: None), options)
    try:
        told, text = (
            urlopen(f"http://{serving.where}{path}").read() for path in ("/v1/witness", "/metrics")
        )
    finally:
        serving.stop()
        service.stop()
    told, text = json.loads(told), text.decode()
    told_by = {r["pid"]: r["watched"][0]["rows"] for r in told["reporters"]}
    assert told_by == {7: 100, 8: 50}
    assert [(e["backend"], e["regime"], e["tile"]) for e in told["events"]] == [
        ("fast", "production", [0, 3])
    ] * 2
    numbers = [line for line in text.splitlines() if line.startswith("fp4tune_witness_")]
    label = f'{{backend="fast",gpu="{OTHER}"}}'
    assert f"fp4tune_witness_rows_total{label} 150.0" in numbers
    assert f"fp4tune_witness_suspicions_total{label} 2.0" in numbers
    assert f"fp4tune_witness_faults_total{label} 2.0" in numbers


def test_what_came_through_the_drop_box_changes_no_choice(node):
    """Neither good counts nor bad ones: a fault is told by the process that saw it, in its own
    report, under the rules for those."""
    before = reader.open(node).choose(8, 4096, 2048)
    for pid, faults in ((7, 0), (8, 30)):
        counts.write(report(pid, rows=10**12, faults=faults), box(node))
    counts.write(report(9, "plain", rows=10**12), box(node))
    board = Board()
    board._witness.look(str(node))
    after = reader.open(node).choose(8, 4096, 2048)
    assert (before.backend, before.status, before.bounds) == ("fast", "safe", after.bounds)
    assert after.backend == "fast" and not quarantine_store.read(quarantine_store.place(node))[0]


# -- bundles and the fleet


def test_bundles_carry_counts_and_faults_and_the_fleet_sums_them(node, tmp_path):
    with Ledger.open(node) as ledger:
        for name in ("fast", "plain"):
            made = evidence.environment(name, evidence.install(tmp_path / "x", name, "1"), "1")
            ledger.add_environment(made)
    counts.write(report(7, rows=100), box(node))
    counts.write(report(8, rows=50, faults=1), box(node))
    counts.write(report(9, "unheard-of", rows=5), box(node))
    out = tmp_path / "bundles"
    out.mkdir()
    made = export.export(node, f"{out}/")
    assert made.rows["finding"] == 1 and made.rows["evidence"] == 2
    assert "its run or environment is left out" in str(made.skipped)
    store = str(tmp_path / "store")
    merge.merge([made.path], store)
    found = reporting.report(store)
    (served,) = found["production"]
    assert (served["backend"], served["gpu"]) == ("fast", "Model C")
    assert (served["rows"], served["faults"], served["nodes"]) == (150, 1, 1)
    assert found["cohorts"] == [] and found["suspect_builds"] == []
    from fp4tune.report.terminal.fleet import fleet_lines

    assert any("150 rows of 1 GPUs judged, 0 suspicious, 1 faults" in x for x in fleet_lines(found))


def test_counts_of_production_bound_nothing_in_a_fleet(tmp_path):
    """A node's report of many good rows does not dilute what probes of others found."""
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    for number in range(4):
        tables = fleets.rows(number, failures={(0, "fast"): 3})
        _, data = bundle.pack(tables, fleets.node(number), 1e9, None, None)
        (bundles / f"{number}.bundle").write_bytes(data)
    paths = [str(path) for path in sorted(bundles.iterdir())]
    merge.merge(paths, str(tmp_path / "a"))
    before = reporting.report(str(tmp_path / "a"))
    loud = fleets.rows(9, failures={(0, "fast"): 3})
    run = {**loud["run"][0], "id": "served", "level": "production", "profile": "production"}
    row = {
        **loud["evidence"][0], "run": "served", "id": 1 << 61, "regime": "production",
        "data": "served", "status": "skipped",
        "detail": json.dumps({"witness": dict.fromkeys(counts.COUNTED, 10**9)}),
    }  # fmt: skip
    loud["run"].append(run)
    loud["evidence"].append(row)
    without = {**loud, "run": loud["run"][:-1], "evidence": loud["evidence"][:-1]}
    reports = []
    for name, tables in (("with", loud), ("without", without)):
        _, data = bundle.pack(tables, fleets.node(9), 1e9, None, None)
        path = bundles / f"{name}.bundle"
        path.write_bytes(data)
        merge.merge([*paths, str(path)], str(tmp_path / name))
        reports.append(reporting.report(str(tmp_path / name)))
    mine, plain = ({k: v for k, v in r.items() if k in ("cohorts", "suspect_builds",
                    "suspect_gpus", "undetermined")} for r in reports)  # fmt: skip
    assert mine == plain
    assert reports[0]["production"][0]["rows"] == 10**9 and before["production"] == []


def test_counts_in_a_bundle_that_are_none_count_nothing():
    assert production._counts('{"witness": {"rows": -1}}') == dict.fromkeys(counts.COUNTED, 0)
    assert production._counts("[]") == dict.fromkeys(counts.COUNTED, 0)
    good = {**dict.fromkeys(counts.COUNTED, 1), "rows": -3}
    assert production._counts(json.dumps({"witness": good}))["rows"] == 0


def test_a_report_has_the_fields_that_its_file_has():
    names = {field.name for field in dataclasses.fields(counts.WatchReport)} - {"uid"}
    text = json.loads(json.dumps(dataclasses.asdict(report())))
    assert set(text) - {"uid"} == names
