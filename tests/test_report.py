"""A page to look at: whole, escaped, by itself, and with everything that is stored in it."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fleets
import pytest
import stores
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import call
from fp4tune.autotune.publication.published import Publication
from fp4tune.cache import publish, quarantine
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment, Finding
from fp4tune.errors import LONGEST
from fp4tune.fleet import bundle, merge, promote
from fp4tune.probes.check import tilemap
from fp4tune.report.page import changes, findings, node, render, style, tiles
from fp4tune.report.page import fleet as fleet_page

VOID = {"meta", "br"}
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></style></title>--><!--"
    "&lt;b&gt;javascript:alert(3) \x00\x1b[31m\u202egnp.exe\ud800"
)


class Page(HTMLParser):
    """A page, read strictly: elements, text, links and ids."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.feed(document)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice on {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.cells[-1][-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def check(document: str) -> Page:
    """Whole, needs nothing else, runs nothing, and can be found one's way in without seeing it."""
    assert document.startswith("<!doctype html>\n<html lang=")
    document.encode()
    page = Page(document)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a-x"}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], tag
        assert not {"src", "srcset", "xlink:href", "data", "action"} & set(attrs), tag
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for link in page.named("a"):
        assert link["href"] and link["href"][1:] in ids and link["href"].startswith("#")
    (sheet,) = re.findall(r"<style>(.*?)</style>", document, re.S)
    assert not re.search(r"url\(|@import|expression", sheet)
    policy = [m for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy and str(policy[0]["content"]).startswith("default-src 'none'")
    assert tags >= {"header", "nav", "main", "footer", "h1"}
    assert len(page.named("table")) == len(page.named("caption"))
    assert all(th.get("scope") in ("row", "col") for th in page.named("th"))
    for svg in page.named("svg"):
        assert svg["role"] == "img" and svg["aria-label"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    return page


def finding(run: str, **other) -> Finding:
    bad = tilemap.tiles_of(512, 1024, [(0, 0, 9), (3, 7, 1)])
    detail = {
        "map": bad.pack(),
        "diagnosis": "2 tiles: consistent with a test",
        "worst": {"row": 1, "col": 2, "found": "nan", "expected": [1.0, 1.0]},
        "retest": {"kind": "steady", "launches": 8, "failures": 8, "rate": [0.63, 1.0]},
    }
    kept = {
        "problem": {"m": 512, "n": 1024, "k": 2048},
        "kind": "unwritten",
        "regime": "streams",
        "data": "exact",
        "seed": 3,
        "detail": detail,
    } | other
    return Finding(run, *stores.WHAT, **kept)


@pytest.fixture
def place(tmp_path) -> Path:
    """Two generations, a finding with a map, and bounds."""
    place = tmp_path / "state"
    with Ledger.open(place) as ledger:
        run = stores.start(ledger)
        ledger.add_finding(finding(run))
        ledger.finish_run(run)
    stores.put(place, "first", layers=2)
    choices, candidates = stores.rows_for("second", layers=3)
    bounds = {
        "serial": {"launches": 99, "problems": 98, "failures": 0, "upper": 0.03, "confidence": 0.95}
    }
    choices = [
        replace(c, bounds=bounds, conditions=({"id": "x", "text": "if so"},)) for c in choices
    ]
    publish.publish(place, choices, candidates, [stores.ENVIRONMENT], {"run": "second"})
    return place


def test_everything_stored_is_on_the_page(place):
    page = check(node.document(place))
    for heading in ("Choices", "What changed", "Times", "Verdicts", "How sure", "Findings"):
        assert heading in page.text
    for said in ("H200 (sm90), profile strict", "2 of 32 tiles", "2 tiles: consistent with a test"):
        assert said in page.text
    assert "steady: 8 of 8 launches failed, a rate of 0.63 to 1" in page.text
    assert "marlin: if so" in page.text
    assert "0.03" in page.text and "0 of 98" in page.text
    assert "12.0–13.0" in page.text
    assert len(page.named("svg")) == 3 + 1  # a chart for each layer, and the map of tiles


def test_what_changed_since_the_last_generation(place):
    page = check(node.document(place))
    assert "Since generation 1" in page.text
    moved = [row for row in page.cells if len(row) == 4 and row[1] == "choice"]
    new = [row for row in moved if row[2] == "nothing"]
    assert len(moved) == 9 and len(new) == 3
    assert all("n=4224" in row[0] for row in new)
    assert {(row[2], row[3]) for row in moved if row not in new} == {
        ("marlin first", "marlin second under conditions")
    }


def test_an_earlier_generation_that_cannot_be_read_is_told_and_harms_nothing(place):
    damaged = place / "choices-1.db"
    damaged.chmod(0o644)
    damaged.write_bytes(b"no database")
    page = check(node.document(place))
    assert "generation 1 cannot be read" in page.text and "No earlier generation" in page.text


def test_times_and_verdicts_count_as_changes_only_where_they_differ():
    choices, candidates = stores.rows_for("a")
    old = Publication(1, {}, tuple(choices), tuple(candidates), (stores.ENVIRONMENT,))
    assert changes.between(old, replace(old, generation=2)) == []
    slower = [replace(c, median_us=20.0, lo_us=19.0, hi_us=21.0) for c in candidates]
    near = [replace(c, median_us=12.9, lo_us=12.8, hi_us=14.0) for c in candidates]
    worse = [replace(c, verdict="unsafe") for c in candidates]
    other = replace(stores.ENVIRONMENT, fingerprint="e" * 64, facts={"code": "cd"})

    def kinds(**now) -> set[tuple[str, str, str]]:
        return {(c.what, c.before, c.after) for c in changes.between(old, replace(old, **now))}

    assert kinds(candidates=tuple(slower)) == {("time", "12.50 us", "20.00 us")}
    assert kinds(candidates=tuple(near)) == set()
    assert kinds(candidates=tuple(worse)) == {("verdict", "safe", "unsafe")}
    assert kinds(environments=(other,)) == {("environment", "code ab", "code cd")}
    assert {(c[0], c[2]) for c in kinds(choices=())} == {("choice", "")}


buckets = st.builds(
    lambda kind, lo, size, n, k: BucketKey(*kind, 1, lo, lo + size, n, k),
    st.sampled_from([("nvfp4", "bf16", "bf16"), ("mxfp4", "fp4", "fp16")]),
    st.integers(0, 3000),
    st.integers(0, 500),
    st.integers(1, 40_000),
    st.integers(1, 40_000),
)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(buckets, st.sampled_from(["safe", "floor", "none"])), max_size=12),
    st.text(max_size=30),
)
def test_every_choice_is_a_cell_whatever_it_is_called(rows, name):
    name = name or "x"
    rows = {bucket: status for bucket, status in rows}
    choices = [
        Choice("sm90", name, "strict", b, name, name, name, status, (name,), 10.0 + i)
        for i, (b, status) in enumerate(rows.items())
    ]
    candidates = [
        Candidate("sm90", name, "strict", c.bucket, name, name, name, "safe", 0, c.median_us)
        for c in choices
    ]
    page = check(
        node.draw(node.NodeRows(Publication(1, {}, tuple(choices), tuple(candidates), ())))
    )
    cells = [attrs for attrs in page.named("td") if attrs.get("class")]
    shown = [a for a in cells if set(str(a["class"]).split()) & {"none", "n0"}]
    assert len(shown) == len(choices)


def test_nothing_from_a_database_becomes_markup():
    bucket = BucketKey(HOSTILE, HOSTILE, HOSTILE, 1, 1, 16, 64, 64)
    bound = {HOSTILE: {"upper": HOSTILE, "problems": 1, "failures": 0}}
    odd = {"x": {"upper": 0.5, "problems": 4, "failures": 1}, "y": None, "z": 7}
    key = (HOSTILE, HOSTILE, HOSTILE, bucket, HOSTILE, HOSTILE, HOSTILE)
    condition = {"id": HOSTILE, "text": HOSTILE}
    choices = (
        Choice(*key, "safe", (condition, HOSTILE), 1.0, bounds=bound),
        Choice(*key[:3], replace(bucket, n=65), *key[4:], "none", bounds=odd),
        Choice(*key[:3], replace(bucket, n=66), *key[4:], "floor", bounds=odd),
    )
    candidate = Candidate(*key, "unsafe", reasons=(HOSTILE,), conditions=(condition,))
    times = {"median_us": HOSTILE, "lo_us": float("nan"), "hi_us": float("inf")}
    timeless = replace(candidate, bucket=replace(bucket, m_lo=2, m_hi=3), **times)
    facts = {"device": {HOSTILE: HOSTILE}, "distributions": {HOSTILE: HOSTILE}, "code": HOSTILE}
    environment = Environment(HOSTILE, HOSTILE, HOSTILE, facts)
    found = [
        finding(HOSTILE, kind=HOSTILE, regime=HOSTILE, data=HOSTILE, problem={}),
        finding("r", kind="k", detail={"diagnosis": HOSTILE, "map": HOSTILE, "retest": HOSTILE}),
        finding("r", detail={"message": HOSTILE, "retest": {"launches": 1, "rate": HOSTILE}}),
    ]
    meta = {"published": HOSTILE, "unsupported": {HOSTILE: HOSTILE}}
    entry = quarantine.make("b", quarantine.Reach(1, 64, 64), reason=HOSTILE)
    now = Publication(2, meta, choices, (candidate, timeless), (environment,))
    old = Publication(1, meta, choices[:1], (), ())
    document = node.draw(node.NodeRows(now, old, [HOSTILE], found, [], [entry]))
    page = check(document)
    assert "<img" not in document and "<!--" not in document and "<b>javascript" not in document
    assert "<script>alert(1)</script>" in page.text  # it is there to be read
    assert not set("\x00\x1b\u202e") & set(document)


@settings(deadline=None)
@given(st.text(), st.text())
def test_markup_reads_back_as_what_was_put_in(inside, attribute):
    template = render.environment().from_string('<p title="{{ attribute }}">{{ inside }}</p>')
    page = Page(template.render(inside=inside, attribute=attribute))
    (only,) = page.named("p")
    # What a browser may not be shown at all is replaced; line ends are the parser's own business.
    expected = render.shown(inside)
    assert page.text == expected and only["title"] == render.shown(attribute)


def test_what_is_too_long_is_cut():
    template = render.environment().from_string("{{ name }}")
    assert len(template.render(name="x" * 10**6)) == LONGEST


def drawn(packed) -> str:
    figure = tiles.figure(packed)
    template = render.environment().get_template("tiles.html")
    return "" if figure is None else template.render(figure=figure)


@pytest.mark.parametrize("m, n", [(1, 128), (512, 1024), (4096, 28672), (65536, 131072)])
def test_a_map_of_tiles_is_small_and_says_its_scale(m, n):
    rows, cols = -(-m // 128), -(-n // 128)
    checkers = [(r, c, 1) for r in range(rows) for c in range(cols) if (r + c) % 2]
    found = drawn(tilemap.tiles_of(m, n, checkers).pack())
    if rows * cols == 1:
        assert not found
        return
    page = Page(found)
    assert f"{len(checkers)} of {rows * cols} tiles" in page.text
    assert ("each mark" in page.text) == (rows > tiles.HEIGHT or cols > tiles.WIDTH)
    assert len(found) < 60_000
    squares = "".join(str(path["d"]) for path in page.named("path"))
    assert re.fullmatch(r"(M\d+\.\d+ \d+\.\d+h\.\d+v\.\d+h-\.\d+z)*", squares)
    marks = {(r // -(-rows // tiles.HEIGHT), c // -(-cols // tiles.WIDTH)) for r, c, _ in checkers}
    assert squares.count("M") == len(marks)


@pytest.mark.parametrize("packed", [None, 3, [], {}, {"m": "x"}, {"m": 9**99, "n": 1, "rows": []}])
def test_what_is_no_map_is_left_out(packed):
    assert drawn(packed) == ""


def test_the_finding_that_shows_most_is_shown():
    whole = tilemap.tiles_of(256, 256, [(r, c, 1) for r in range(2) for c in range(2)]).pack()
    part = tilemap.tiles_of(256, 256, [(0, 1, 1)]).pack()
    group = [replace(finding("r", detail={"map": m}), id=i) for i, m in enumerate((whole, part))]
    (kind,) = findings.kinds(group)
    assert kind.shown.id == 1 and kind.findings == 2


def luminance(colour: str) -> float:
    """WCAG 2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_ink_stands_out_from_paper_in_both_schemes():
    assert min(contrast(*pair) for pair in style.pairs()) >= 4.5
    assert min(contrast(*pair) for pair in style.lines()) >= 3


@pytest.mark.slow
def test_a_large_store_is_a_page_of_some_megabytes_with_every_choice():
    choices, candidates = [], []
    names = [f"backend-{i}" for i in range(6)]
    for layer in range(60):
        for m in range(20):
            bucket = BucketKey("nvfp4", "bf16", "bf16", 1, m, m, 64 + 64 * layer, 2048)
            key = ("sm90", "H200", "strict", bucket)
            choices.append(Choice(*key, names[m % 6], "t", "l", "safe", (), 5.0 + m))
            candidates += [
                Candidate(*key, b, "t", "l", "safe", 0, 5.0 + m, 4.0 + m, 6.0 + m) for b in names
            ]
    document = node.draw(node.NodeRows(Publication(1, {}, tuple(choices), tuple(candidates), ())))
    assert len(document) < 3_000_000
    maps = [a for a in check(document).named("td") if re.match(r"rel n\d", str(a.get("class")))]
    assert len(maps) == len(choices)


# -- the commands


def test_the_command_says_what_it_wrote_and_where(place, tmp_path):
    out = tmp_path / "page.html"
    result = call("report", "--html", out, "--state", place, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == {"state": str(place), "path": str(out), "bytes": out.stat().st_size}
    check(out.read_text(encoding="utf-8").rstrip("\n"))
    assert str(out) in call("report", "--html", out, "--state", place).stdout
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".fp4tune")] == []


def test_a_page_without_a_ledger_says_that_it_knows_no_findings(tmp_path):
    stores.put(tmp_path / "bare")
    (tmp_path / "bare" / "ledger.db").unlink()
    result = call("report", "--html", tmp_path / "page.html", "--state", tmp_path / "bare")
    assert result.exit_code == 0, result.output
    assert "There is no ledger here" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["", "missing/page.html"])
def test_what_cannot_be_written_is_one_sentence(place, tmp_path, where):
    result = call("report", "--html", tmp_path / where, "--state", place)
    assert result.exit_code == 2 and "cannot be written" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob(".fp4tune*"))


def test_what_is_no_file_is_not_replaced_by_one(place, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (["report", "--html", pipe], ["facts", "--out", pipe]):
        result = call(*command, "--state", place)
        assert result.exit_code == 2 and "it is no regular file" in result.stderr
        assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_nothing_stored_is_one_sentence(tmp_path):
    result = call("report", "--html", tmp_path / "page.html", "--state", tmp_path / "none")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def fleet(made_once) -> str:
    """The store of `fleets.troubled`."""
    return str(made_once("fleet", fleets.troubled) / "store")


def test_a_fleet_s_page_has_cohorts_suspects_and_choices(fleet, tmp_path):
    out = tmp_path / "fleet.html"
    result = call("fleet", "report", fleet, "--html", out, "--json")
    assert result.exit_code == 1  # there are suspects, with a page or without
    assert json.loads(result.stdout)["html"] == {"path": str(out), "bytes": out.stat().st_size}
    page = check(out.read_text(encoding="utf-8").rstrip("\n"))
    assert fleets.gpu(3, 1) in page.text and "23 of 24 GPUs on 12 nodes" in page.text
    assert "11 of 12" in page.text and "plain on 11 nodes, fast on 1 node" in page.text
    assert fleets.gpu(5, 0) in page.text and "Environment of each backend" in page.text
    assert "No generation of choices has been made yet" in page.text
    assert json.loads(call("fleet", "report", fleet, "--json").stdout)["html"] is None


def test_a_fleet_s_page_tells_what_its_generations_changed(tmp_path):
    for number in range(4):
        fleets.put(tmp_path / "in", number, choice="plain")
    merge.merge([str(tmp_path / "in")], str(tmp_path / "store"))
    store = str(tmp_path / "store")
    promote.promote(store)
    promote.record(
        promote.Place(store),
        {"number": 2, "stage": "candidate", "at": 4e9, "choices": []},
    )
    page = check(fleet_page.document(store))
    assert "1 choice changed" in page.text
    assert any(row[1:] == ["plain default", "nothing"] for row in page.cells)


def test_nothing_from_a_bundle_becomes_markup(tmp_path):
    """Names in a bundle are checked when it is merged, what is told freely is not."""
    rows = fleets.rows(1, failures={(0, "fast"): 9})
    told = "<script>alert(1)</script><img src=x>"
    for row in rows["finding"]:
        row["detail"] = json.dumps({"diagnosis": told, "message": told, "map": told})
        row["problem"] = json.dumps({"m": told})
    for row in rows["run"]:
        row["device"] = json.dumps({"name": "H200", "uuid": "GPU-1"})
    _, data = bundle.pack(rows, fleets.node(1), 1e9, None, None, parquet=False)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"one{bundle.SUFFIX}").write_bytes(data)
    done = merge.merge([str(tmp_path / "in")], str(tmp_path / "store"))
    assert not done.refused
    document = fleet_page.document(str(tmp_path / "store"))
    assert told in check(document).text and told not in document
