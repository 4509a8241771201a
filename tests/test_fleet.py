"""Bundles and the fleet store: what gets in, what does not, and that order does not matter."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fleets
import pytest
import stores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commands import call

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
pytest.importorskip("fsspec")
pytest.importorskip("cryptography")

from fp4tune.cache.ledger import Ledger  # noqa: E402
from fp4tune.errors import Refused  # noqa: E402
from fp4tune.fleet import bundle, export, merge, places, report, schema, shard, signing  # noqa: E402
from fp4tune.fleet.warehouse import Warehouse  # noqa: E402


def said(result) -> dict:
    assert result.exit_code in (0, 1), (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def place(tmp_path) -> Path:
    """A state directory with evidence and a choice."""
    found = tmp_path / "state"
    found.mkdir()
    with Ledger.open(found) as ledger:
        run = stores.start(ledger)
        ledger.add_evidence(stores.evidence(run, launches=10, problems=5))
        ledger.finish_run(run)
    stores.put(found)
    return found


# -- bundles


def test_a_node_exports_what_it_holds_and_says_what_it_is(place, tmp_path):
    out = tmp_path / "bundles"
    out.mkdir()
    done = said(call("export", "--out", out, "--state", place, "--json"))
    counts = {table: count for table, count in done["rows"].items() if count}
    assert counts == {"run": 1, "environment": 1, "evidence": 1, "choice": 3}
    with zipfile.ZipFile(done["path"]) as file:
        manifest = json.loads(file.read("manifest.json"))
        (row,) = map(json.loads, file.read("evidence.ndjson").splitlines())
        pq = pytest.importorskip("pyarrow.parquet")
        assert pq.read_table(io.BytesIO(file.read("evidence.parquet"))).to_pylist() == [row]
    assert manifest["node"] == done["node"] and manifest["hostname"] is None
    assert row["launches"] == 10 and row["regime"] == "serial"
    assert "argv" not in json.loads(json.dumps(schema.TABLES["run"]))


def test_the_node_keeps_its_id_and_another_has_another(place, tmp_path):
    first = export.node_id(place)
    with ThreadPoolExecutor(8) as pool:
        other = {*pool.map(lambda _: export.node_id(tmp_path / "other"), range(8))}
    assert export.node_id(place) == first and len(other) == 1 and other != {first}


def test_the_published_schema_is_the_program_s_and_bundles_keep_to_it(place, tmp_path):
    published = json.loads((Path(schema.__file__).parent / "bundle.schema.json").read_text())
    assert published == schema.json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    path = export.export(place, str(tmp_path / "one.zip")).path
    with zipfile.ZipFile(path) as file:
        jsonschema.validate(json.loads(file.read("manifest.json")), published)
        for table in schema.TABLES:
            for line in file.read(f"{table}.ndjson").splitlines():
                jsonschema.validate(json.loads(line), {**published["$defs"][table]})


# -- what does not get in


def repacked(data: bytes, change) -> bytes:
    """A bundle taken apart, changed by `change(members, manifest)`, and put together again."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {n: file.read(n) for n in file.namelist()}
    manifest = json.loads(members.pop(bundle.MANIFEST))
    change(members, manifest)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(bundle.MANIFEST, json.dumps(manifest))
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def rehash(members: dict, manifest: dict) -> None:
    for name, data in members.items():
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["content"] = fleets.content(members)


def replaced(table: str, old: str, new: str):
    def change(members, manifest):
        name = f"{table}.ndjson"
        assert old.encode() in members[name]
        members[name] = members[name].replace(old.encode(), new.encode())
        rehash(members, manifest)

    return change


def one_less(members, manifest):
    members.pop("timing.ndjson")
    manifest["files"].pop("timing.ndjson")


BAD = {
    "a byte": (
        lambda m, x: m.update({"run.ndjson": m["run.ndjson"] + b" "}),
        "run.ndjson does not have the hash",
    ),
    "content": (lambda m, x: x.update(content="0" * 64), "content hash"),
    "newer": (lambda m, x: x.update(schema=2), "its schema is 2"),
    "node": (lambda m, x: x.update(node="../x"), "node id"),
    "created": (lambda m, x: x.update(created=-1), "time of creation"),
    "more keys": (lambda m, x: x.update(more=1), "keys"),
    "foreign member": (lambda m, x: m.update({"../../evil": b""}), "no member of a bundle"),
    "missing table": (one_less, "timing.ndjson is missing"),
    "row count": (lambda m, x: x["rows"].update(run=7), "the manifest says 7"),
    "word": (replaced("evidence", '"passed"', '"perfect"'), "is no evidence status"),
    "type": (replaced("evidence", '"launches":2000', '"launches":"2000"'), "evidence.launches"),
    "negative": (replaced("evidence", '"launches":2000', '"launches":-2'), "evidence.launches"),
    "bool": (replaced("evidence", '"width":24', '"width":true'), "evidence.width"),
    "huge": (replaced("timing", '"median_us":10.0', '"median_us":1e999'), "timing"),
    "nan": (replaced("timing", '"median_us":10.0', '"median_us":NaN'), "not JSON"),
    "column": (replaced("verdict", '"bounds"', '"bonds"'), "columns"),
    "orphan": (replaced("evidence", '"run":"run-1-0-a"', '"run":"other"'), "no run or environ"),
    "escape": (replaced("environment", '"sm90"', '"../sm90"'), "not an architecture"),
    "terminal": (replaced("choice", '"H200"', '"\\u001b[2J"'), "not printable"),
    "deep": (replaced("evidence", '"{}"', '"' + "[" * 60000 + '"'), "not JSON"),
    "two rows a line": (replaced("run", '"versions":"{}"}', '"versions":"{}"},{}'), "not one row"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bundle_that_does_not_verify_is_refused_whole_with_its_reason(name, tmp_path):
    change, reason = BAD[name]
    good = fleets.put(tmp_path / "in", 1)
    bad = tmp_path / "in" / f"bad{bundle.SUFFIX}"
    bad.write_bytes(repacked(good.read_bytes(), change))
    fleets.put(tmp_path / "in", 2)
    result = call("fleet", "merge", tmp_path / "in", "--into", tmp_path / "store", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    ((refused),) = document["refused"]
    assert refused["source"] == str(bad) and reason in refused["reason"], refused
    with Warehouse(str(tmp_path / "store")) as warehouse:
        assert {r["node"] for r in warehouse.rows("SELECT node FROM run")} == {
            fleets.node(1), fleets.node(2),
        }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_refused_never_an_error(data):
    good = bundle.pack(fleets.rows(1), fleets.node(1), 1e9, parquet=False)[1]
    cut = data.draw(st.integers(0, len(good) - 1), "cut")
    with pytest.raises(bundle.Refusal):
        bundle.unpack(good[:cut])
    at = data.draw(st.integers(0, len(good) - 1), "at")
    flipped = bytes(b ^ (1 << (cut % 8)) if i == at else b for i, b in enumerate(good))
    try:  # a bit that nothing depends on may flip: a date in the zip's directory
        found = bundle.unpack(flipped)
    except bundle.Refusal:
        return
    assert found.id == bundle.unpack(good).id


def test_a_bomb_is_refused_unopened(monkeypatch):
    monkeypatch.setattr(bundle, "MOST_UNPACKED", 1 << 20)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(bundle.MANIFEST, "{}")
        file.writestr("run.ndjson", b"0" * (1 << 21))
    with pytest.raises(bundle.Refusal, match="unpacks to more"):
        bundle.unpack(out.getvalue())


# -- signatures


def test_with_keys_only_what_they_signed_is_taken(tmp_path):
    mine, public = fleets.key(tmp_path / "mine")
    other, _ = fleets.key(tmp_path / "other")
    place = tmp_path / "in"
    fleets.put(place, 1, key=mine)
    fleets.put(place, 2, key=other)
    fleets.put(place, 3)
    into = tmp_path / "store"
    done = said(call("fleet", "merge", place, "--into", into, "--keys", public, "--json"))
    assert len(done["added"]) == 1
    reasons = sorted(r["reason"] for r in done["refused"])
    assert reasons == [
        "it is not signed",
        "it is signed by a key that is not among those trusted",
    ]


def test_a_key_may_be_bound_to_its_node(tmp_path):
    mine, _ = fleets.key(tmp_path / "mine")
    data = fleets.put(tmp_path, 1, key=mine).read_bytes()
    key = bundle.unpack(data).key
    assert key
    named = tmp_path / "keys.json"
    named.write_text(json.dumps({"keys": [{"key": key, "node": fleets.node(1)}]}))
    assert bundle.unpack(data, signing.keys(named)).key == key
    with pytest.raises(bundle.Refusal, match="another node's key"):
        bundle.unpack(data, [signing.Trusted(key, fleets.node(2))])


def test_a_wrong_signature_is_refused_even_where_none_is_asked_for(tmp_path):
    mine, _ = fleets.key(tmp_path / "mine")
    data = fleets.put(tmp_path, 1, key=mine).read_bytes()
    forged = repacked(data, lambda m, x: x.update(node=fleets.node(2)))
    with pytest.raises(bundle.Refusal, match="signature is wrong"):
        bundle.unpack(forged)


@pytest.mark.parametrize("text", ["", "nonsense", '{"keys": [{"key": "12"}]}', '{"keys": []}'])
def test_a_file_without_keys_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    result = call("fleet", "merge", tmp_path, "--into", tmp_path / "store", "--keys", path)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr


# -- the store


def contents(store: Path | str) -> dict[str, list]:
    """All that a store says, as values that can be compared."""
    with Warehouse(str(store)) as w:
        out = {
            table: sorted(
                json.dumps({k: v for k, v in r.items() if k != "shard"}, sort_keys=True)
                for r in w.rows(f"SELECT * FROM {table}")
            )
            for table in ("bundle", "run", "environment", *shard.ADDED)
        }
    return out


PIECES = 5


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> list[Path]:
    """Bundles of three nodes; one reports three times, the last with more of the same run."""
    folder = tmp_path_factory.mktemp("pieces")
    small = fleets.put(folder, 1, 1e9, gpus=1)
    return [
        small,
        fleets.put(folder, 1, 1e9 + 9, gpus=2, choice="plain"),
        fleets.put(folder, 1, 1e9 + 20, run="b"),
        fleets.put(folder, 2, 1e9, failures={(0, "fast"): 7}),
        fleets.put(folder, 3, 1e9),
    ]


@pytest.mark.slow
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    order=st.lists(st.integers(0, PIECES - 1), max_size=9).map(lambda x: [*x, *range(PIECES)]),
    cuts=st.lists(st.integers(1, 8), max_size=4),
    shuffle=st.randoms(use_true_random=False),
)
def test_order_grouping_and_repetition_do_not_matter(
    order, cuts, shuffle, pieces, tmp_path_factory
):
    plain = tmp_path_factory.mktemp("plain")
    merge.merge([str(p) for p in pieces], str(plain))
    other = tmp_path_factory.mktemp("other")
    shuffle.shuffle(order)
    places = [str(pieces[i]) for i in order]
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(places)], strict=True):
        merge.merge(places[start:end], str(other))
    assert contents(plain) == contents(other)


def test_later_bundles_of_a_run_supersede_earlier_ones(pieces, tmp_path):
    merge.merge([str(p) for p in pieces], str(tmp_path))
    with Warehouse(str(tmp_path)) as w:
        rows = w.rows("SELECT node, count(*) AS n FROM evidence GROUP BY node ORDER BY node")
        counts = {row["node"]: row["n"] for row in rows}
        assert counts == {fleets.node(1): 8, fleets.node(2): 4, fleets.node(3): 4}
        (newest,) = w.rows("SELECT backend FROM choice WHERE node = ?", fleets.node(1))
        assert newest["backend"] == "fast"  # that of the third


def test_merges_at_the_same_time_lose_nothing_and_count_nothing_twice(pieces, tmp_path):
    names = [str(p) for p in pieces]
    with ThreadPoolExecutor(4) as pool:
        parts = [names[:3], names[2:], names[1:4], names]
        list(pool.map(lambda part: merge.merge(part, str(tmp_path / "store")), parts))
    merge.merge(names, str(tmp_path / "plain"))
    assert contents(tmp_path / "store") == contents(tmp_path / "plain")


def test_a_store_that_another_merge_made_meanwhile_is_added_to(pieces, tmp_path, monkeypatch):
    store, names = tmp_path / "store", places.Place.names

    def late(place, *folder, **kinds):
        monkeypatch.setattr(places.Place, "names", names)
        merge.merge([str(pieces[0])], str(store))
        return names(place, *folder, **kinds)

    monkeypatch.setattr(places.Place, "names", late)
    merge.merge([str(p) for p in pieces], str(store))
    merge.merge([str(p) for p in pieces], str(tmp_path / "plain"))
    assert contents(store) == contents(tmp_path / "plain")


def test_a_merge_that_died_leaves_nothing_half_done(pieces, tmp_path, monkeypatch):
    store = tmp_path / "store"
    merge.merge([str(pieces[4])], str(store))
    before = contents(store)
    write = shard.Shard._write

    def dying(self, table, *names):
        if names[0] == shard.INDEX:
            raise KeyboardInterrupt
        write(self, table, *names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard.Shard, "_write", dying)
        merge.merge([str(p) for p in pieces], str(store))
    assert contents(store) == before
    merge.merge([str(p) for p in pieces], str(store))
    merge.merge([str(p) for p in pieces], str(tmp_path / "plain"))
    assert contents(store) == contents(tmp_path / "plain")


def test_a_store_behind_a_url_says_the_same(pieces, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in pieces:
        memory.pipe_file(f"/in/{path.name}", path.read_bytes())
    done = merge.merge(["memory://in"], "memory://fleet/store")
    assert len(done.added) == PIECES
    merge.merge([str(p) for p in pieces], str(tmp_path))
    assert contents("memory://fleet/store") == contents(tmp_path)
    here, there = report.report(str(tmp_path)), report.report("memory://fleet/store")
    assert {**here, "store": ""} == {**there, "store": ""}


def test_processes_merge_as_one_does(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    for number in range(6):
        fleets.put(folder, number)
    monkeypatch.setattr(merge, "CHUNK", 2)
    merge.merge([str(folder)], str(tmp_path / "many"), jobs=2)
    merge.merge([str(folder)], str(tmp_path / "one"), jobs=1)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_what_is_no_store_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("mine")
    for command in (
        ["merge", tmp_path / "x", "--into", tmp_path / "x"],
        ["merge", tmp_path / "nowhere", "--into", tmp_path / "new"],
        ["merge", tmp_path / "x", "--into", "nonsense://x"],
        ["report", tmp_path / "x"],
        ["report", tmp_path / "nowhere"],
        ["advise", tmp_path / "nowhere", "--out", tmp_path / "advice"],
        ["promote", tmp_path / "nowhere"],
    ):
        result = call("fleet", *command)
        assert result.exit_code == 2, (command, result.output)
        assert len(result.stderr.splitlines()) == 1, (command, result.stderr)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["file"]


@pytest.mark.slow
def test_without_the_extra_it_is_one_sentence(tmp_path):
    code = """
        import sys
        for name in ("pyarrow", "duckdb", "fsspec", "cryptography"):
            sys.modules[name] = None
        from fp4tune.cli import main
        sys.argv = ["fp4tune", "fleet", "report", sys.argv[1]]
        main()
    """
    process = stores.spawn(
        code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert error.splitlines() == ["fp4tune: this needs duckdb: pip install 'fp4tune[fleet]'"]
    assert sys.modules.get("duckdb") is not None


def test_refused_is_what_a_bad_key_ends_in(tmp_path):
    (tmp_path / "key").write_text("no key")
    with pytest.raises(Refused, match="Ed25519"):
        bundle.pack(fleets.rows(1), fleets.node(1), 1.0, None, tmp_path / "key", parquet=False)
