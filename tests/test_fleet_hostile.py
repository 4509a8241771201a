"""Bundles and stores that somebody made to harm whoever merges them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import bombs
import fleets
import pytest
import stores
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import call

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
pytest.importorskip("fsspec")

from fp4tune.cache.ledger import Ledger  # noqa: E402
from fp4tune.cache.rows import Environment, Finding  # noqa: E402
from fp4tune.errors import Refused  # noqa: E402
from fp4tune.fleet import bundle, export, merge, places, schema, shard  # noqa: E402
from fp4tune.fleet.pile import Pile  # noqa: E402
from fp4tune.fleet.warehouse import Warehouse  # noqa: E402

MIB = 1 << 20


@pytest.mark.slow
def test_no_bundle_costs_more_memory_than_a_good_one_does(tmp_path):
    """Each of these unpacks to 24 MiB, and parsed to many times that; a merge of all of them has
    64 MiB beyond what the program itself takes."""
    folder = tmp_path / "in"
    folder.mkdir()
    good = fleets.put(tmp_path / "good", 2)
    names = []
    for name, make in bombs.attacks(24):
        path = folder / f"{name.replace(' ', '-')}{bundle.SUFFIX}"
        path.write_bytes(make())
        names.append(str(path))
    code = """
        import json, sys
        from fp4tune.fleet import merge
        good, folder, store = sys.argv[1:]

        def peak():
            (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
            return int(line.split()[1]) // 1024

        merge.merge([good], store)
        before = peak()
        done = merge.merge([folder], store, jobs=1)
        print(json.dumps({"grew": peak() - before, **done.json()}))
    """
    process = stores.spawn(
        code, good, folder, tmp_path / "store", stdout=subprocess.PIPE, text=True
    )
    found = json.loads(process.communicate(timeout=120)[0])
    assert sorted(row["source"] for row in found["refused"]) == sorted(names)
    assert found["grew"] < 64, found


def test_what_is_no_file_in_a_folder_of_bundles_is_refused_and_the_rest_taken(tmp_path):
    folder = tmp_path / "in"
    good = fleets.put(folder, 1)
    elsewhere = fleets.put(tmp_path / "elsewhere", 2)

    def name(what: str) -> Path:
        return folder / f"{what}{bundle.SUFFIX}"

    os.mkfifo(name("pipe"))
    name("folder").mkdir()
    name("link").symlink_to(elsewhere)
    name("zero").symlink_to("/dev/zero")
    name("dangling").symlink_to(tmp_path / "nowhere")
    name("loop").symlink_to(name("loop"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(name("socket")))
        with name("sparse").open("wb") as file:
            file.truncate(1 << 40)
        for sources in ([folder], [f"file://{folder}"]):
            store = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
            done = merge.merge(list(map(str, sources)), str(store))
            assert len(done.added) == 1, done
            refused = {Path(row["source"]).name.partition(".")[0] for row in done.refused}
            assert refused == {
                "pipe", "folder", "link", "zero", "dangling", "loop", "socket", "sparse",
            }  # fmt: skip
    # Who names a link on the command line means it; what is behind it must still be a file.
    done = merge.merge([str(name("link"))], str(tmp_path / "named"))
    assert len(done.added) == 1
    for bad in ("zero", "pipe", "dangling"):
        assert merge.merge([str(name(bad))], str(tmp_path / "named")).refused
    assert good.exists() and elsewhere.exists()


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/full"])
def test_a_store_in_whose_place_something_else_lies_is_refused(kind, tmp_path):
    store = tmp_path / "store"
    merge.merge([str(fleets.put(tmp_path / "in", 1))], str(store))
    (store / merge.STORE).unlink()
    if kind == "pipe":
        os.mkfifo(store / merge.STORE)
    else:
        (store / merge.STORE).symlink_to(kind)
    for command in (["report", store], ["promote", store], ["advise", store, "--out", "x"]):
        result = call("fleet", *command)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    with pytest.raises(Refused):
        merge.merge([str(tmp_path / "in")], str(store))


def test_a_damaged_store_is_one_sentence(tmp_path):
    store = tmp_path / "store"
    merge.merge([str(fleets.put(tmp_path / "in", 1))], str(store))
    (evidence,) = (store / "evidence").rglob("*.parquet")
    content = evidence.read_bytes()
    for damage in (b"", b"PAR1", content[:-20], content[:100] + b"\0" * 50 + content[150:]):
        evidence.write_bytes(damage)
        result = call("fleet", "report", store)
        assert result.exception is None or isinstance(result.exception, SystemExit), damage
        if result.exit_code == 2:
            assert len(result.stderr.splitlines()) == 1, result.stderr
    evidence.write_bytes(content)
    (store / "events").mkdir()
    for text in ("", "[]", "{}", '{"at": "x"}', "[" * 10**5):
        (store / "events" / "1-x.json").write_text(text)
        result = call("fleet", "promote", store)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output


# -- rows


def packed(table: str, change) -> bytes:
    rows = fleets.rows(1, failures={(0, "fast"): 9})
    for row in rows[table]:
        change(row)
    members = {
        f"{t}.ndjson": "".join(json.dumps(r) + "\n" for r in rows.get(t, ())).encode()
        for t in schema.TABLES
    }
    counts = {t: len(rows.get(t, ())) for t in schema.TABLES}
    return bombs.zipped(members, bombs.manifest_of(members, counts))


ROWS = {
    "huge int": ("evidence", lambda r: r.update(launches=10**4000)),
    "huge int text": ("run", lambda r: r.update(seed="9" * 10**5)),
    "negative zero": ("timing", lambda r: r.update(median_us=-1e-300)),
    "half a character": ("evidence", lambda r: r.update(detail='"\ud800"')),
    "deep detail": ("evidence", lambda r: r.update(detail="[" * 30_000 + "]" * 30_000)),
    "deep row": ("evidence", lambda r: r.update(detail=json.loads("[" * 400 + "]" * 400))),
    "long name": ("evidence", lambda r: r.update(regime="x" * 10**5)),
    "device": ("run", lambda r: r.update(device="[]")),
    "device name": ("run", lambda r: r.update(device='{"name": "\\u001b[2J"}')),
    "right to left": ("choice", lambda r: r.update(backend="\u202eevil")),
    "arch": ("choice", lambda r: r.update(arch="..")),
    "null": ("evidence", lambda r: r.update(launches=None)),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_odd_row_is_refused_in_a_short_sentence(name, tmp_path):
    table, change = ROWS[name]
    bad = tmp_path / f"bad{bundle.SUFFIX}"
    bad.write_bytes(packed(table, change))
    done = merge.merge([str(bad), str(fleets.put(tmp_path, 2))], str(tmp_path / "store"))
    if name == "arch":  # it is one, and no way out: `arch=..`
        assert not done.refused and (tmp_path / "store" / "choice" / "arch=..").is_dir()
        return
    ((refused),) = done.refused
    assert len(refused["reason"]) < 300 and refused["reason"].isprintable()
    assert len(done.added) == 1


@settings(max_examples=40, deadline=None)
@given(
    table=st.sampled_from(sorted(schema.TABLES)),
    data=st.data(),
    odd=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30),
        st.just("x" * 70_000), st.lists(st.integers(), max_size=2), st.just({"a": []}),
    ),
)  # fmt: skip
def test_any_value_anywhere_is_taken_or_refused(table, data, odd):
    column = data.draw(st.sampled_from(sorted(schema.TABLES[table])))
    try:
        found = bundle.unpack(packed(table, lambda row: row.update({column: odd})))
        list(shard.staged(found))
    except bundle.Refusal as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 400


# -- piles, temporary files, and processes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=20))
def test_a_pile_gives_back_what_was_not_taken_back(steps):
    import pyarrow as pa

    made = pa.schema([pa.field("x", pa.int64())])
    pile, expected = Pile(), {}
    for number, (key, count, undone) in enumerate(steps):
        mark = pile.mark()
        pile.put((key, ""), pa.RecordBatch.from_pylist([{"x": number}] * count, schema=made))
        if undone:
            pile.back_to(mark)
        else:
            expected.setdefault((key, ""), []).extend([number] * count)
    found = {
        key: [v for batch in pile.batches(key, made) for v in batch["x"].to_pylist()]
        for key in pile.filled()
    }
    assert found == expected


def test_what_a_killed_merge_left_long_ago_is_swept(tmp_path):
    store = tmp_path / "store"
    one = str(fleets.put(tmp_path / "in", 1))
    merge.merge([one], str(store))
    (folder,) = (store / "evidence").iterdir()
    old, new = folder / ".x.parquet.0123abcd", folder / ".y.parquet.0123abcd"
    mine = folder / ".gitkeep"
    for path in (old, new, mine):
        path.write_bytes(b"half")
    then = time.time() - places.FORGOTTEN - 9
    os.utime(old, (then, then))
    os.utime(mine, (then, then))
    merge.merge([one], str(store))
    assert not old.exists() and new.exists() and mine.exists()


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_no_process_and_no_half_bundle(tmp_path):
    """Alone, by SIGKILL: nobody is left to tell its workers."""
    folder, store = tmp_path / "in", tmp_path / "store"
    for number in range(40):
        fleets.put(folder, number)
    code = """
        import sys
        from fp4tune.fleet import merge
        merge.CHUNK = 1
        merge.merge([sys.argv[1]] * 30, sys.argv[2], jobs=2)
    """
    with stores.spawn(code, folder, store, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(store.glob("bundle/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()]
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2 and stores.gone(workers, within=10)
    with Warehouse(str(store)) as warehouse:
        before = warehouse.bundles()
        assert 0 < len(before) <= 40
    merge.merge([str(folder)], str(store), jobs=1)
    merge.merge([str(folder)], str(tmp_path / "plain"), jobs=1)
    with Warehouse(str(store)) as one, Warehouse(str(tmp_path / "plain")) as other:
        assert one.bundles() == other.bundles()
        query = "SELECT node, count(*) AS rows FROM evidence GROUP BY node ORDER BY node"
        assert one.rows(query) == other.rows(query)


# -- export


def test_an_export_sends_the_good_rows_and_says_what_it_left_out(tmp_path):
    """A name with an escape sequence was stored, and then nothing left the node any more."""
    place = tmp_path / "state"
    with Ledger.open(place) as ledger:
        run = stores.start(ledger)
        ledger.add_evidence(stores.evidence(run, launches=10, problems=5))
        evil = Environment("e" * 64, "ev\x1b[31mil", "sm90", {})
        ledger.add_environment(evil)
        bad = ("e" * 64, "ev\x1b[31mil", "default", stores.BUCKET)
        ledger.add_finding(
            Finding(run, *bad, {"m": 1}, "wrong", "serial", "exact", 1, detail={"message": "x"})
        )
        ledger.add_finding(
            Finding(run, *stores.WHAT, {"m": 1}, "a\nb", "serial", "exact", 1, detail={})
        )
        ledger.finish_run(run)
    result = call("export", "--out", tmp_path / "one.zip", "--state", place, "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["rows"]["evidence"] == 1 and done["rows"]["finding"] == 0
    assert sum(done["skipped"]["finding"].values()) == 2
    assert sum(done["skipped"]["environment"].values()) == 1
    assert "\x1b" not in result.stdout + result.stderr
    assert "left out" in result.stderr
    merged = merge.merge([str(tmp_path / "one.zip")], str(tmp_path / "store"))
    assert len(merged.added) == 1 and not merged.refused


def test_an_export_keeps_the_newest_of_more_rows_than_fit(tmp_path, monkeypatch):
    place = tmp_path / "state"
    with Ledger.open(place) as ledger:
        run = stores.start(ledger)
        for number in range(5):
            ledger.add_evidence(stores.evidence(run, launches=number, problems=1, at=1e9 + number))
        ledger.finish_run(run)
    monkeypatch.setattr(bundle, "MOST_ROWS", 3)
    found = export.rows_of(place)
    assert [row["launches"] for row in found.rows["evidence"]] == [2, 3, 4]
    ((reason, count),) = found.skipped["evidence"].items()
    assert count == 2 and "older" in reason


def test_a_bundle_has_the_id_that_it_names(tmp_path):
    data = fleets.put(tmp_path, 1).read_bytes()
    found = bundle.unpack(data)
    assert found.id == bundle.named(data)
