"""The docs and the program say the same: options, keys, tables, words, and every example runs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from fp4tune import __version__, cli, errors
from fp4tune.autotune.evidence.recorder import FLAGGED
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.verdict.profiles import LEFT_OUT, PROFILES
from fp4tune.cache import codec, rows, state
from fp4tune.cache.decision import Decision
from fp4tune.engines.applied import LEVELS as engine_levels
from fp4tune.engines.emit import TARGETS
from fp4tune.engines.names import NAMES
from fp4tune.probes import backends, registry
from fp4tune.probes.census import PDL_WITHOUT_WAIT, SILENT_FALLBACK
from fp4tune.probes.check.sweep import SlotReport
from fp4tune.probes.data import FAMILIES, WIDTHS
from fp4tune.probes.launch.summary import describe
from fp4tune.probes.models import shapes
from fp4tune.probes.regimes import REGIMES
from fp4tune.probes.worker.experts import RUN_TO_RUN
from fp4tune.probes.worker.supervisor import WorkerFailed
from fp4tune.words import COLLECTIVE

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(DOCS.glob("*.md")),
]
COMMANDS = typer.main.get_command(cli.app).commands
SHAPE = ("--gpu", "none", "--shape", "128,256", "--max-m", "4", "--level", "quick", "--seed", "1")

in_pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.M | re.S)


def section(page: Path, heading: str) -> str:
    """The text under a second-level heading."""
    parts = re.split(r"^## (.+)$", text_of(page), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading]


def table(text: str, first_heading: str) -> list[list[str]]:
    """The cells of every table in `text` whose first column has this heading."""
    found: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first_heading:
            inside = True
        elif inside and not set(line) <= set("|- "):
            found.append(cells)
    return found


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def named(text: str, first_heading: str) -> list[str]:
    """Everything in backticks in the first column of the tables with this heading."""
    return [name for row in table(text, first_heading) for name in ticked(row[0])]


def run_cli(*args: str) -> str:
    """What a command prints on stdout; it must end well."""
    done = CliRunner().invoke(cli.app, list(args))
    assert done.exit_code == errors.SAFE, (done.output, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def probed(tmp_path_factory, brief_quick) -> tuple[Path, dict]:
    """The examples, really probed on the CPU: (state directory, the report's document)."""
    place = tmp_path_factory.mktemp("state")
    specs = ("plain.py:Plain", "plain.py:PlainW4A4", "broken.py:Tail", "broken.py:Scratch")
    chosen = [part for spec in specs for part in ("--backend", str(EXAMPLES / spec))]
    out = run_cli("probe", *SHAPE, *chosen, "--state", str(place), "--json")
    (report,) = json.loads(out)
    return place, report


# -- commands


def options_of(command: str) -> set[str]:
    found: set[str] = set()
    group = COMMANDS[command]
    for each in (group, *getattr(group, "commands", {}).values()):
        for parameter in each.params:
            if parameter.param_type_name == "option":
                found.update([*parameter.opts, *parameter.secondary_opts])
    return found - {"--help"}


def test_every_command_is_described_and_no_other():
    headings = re.findall(r"^## fp4tune (.+)$", text_of(DOCS / "commands.md"), re.M)
    assert headings == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described_and_no_other(command):
    text = section(DOCS / "commands.md", f"fp4tune {command}")
    described = {
        name for row in table(text, "option") for cell in row for name in ticked(cell)
        if name.startswith("-")
    }  # fmt: skip
    assert described == options_of(command)


def test_documented_json_keys_are_those_printed(probed):
    place, report = probed
    documents = {
        "probe": report,
        "choose": json.loads(run_cli("choose", "3", "128", "256", "--state", str(place), "--json")),
        "show": json.loads(run_cli("show", "--state", str(place), "--json")),
        "backends": json.loads(
            run_cli("backends", "--gpu", "none", "--backend", "torch-dequant", "--json")
        ),
    }
    for command, document in documents.items():
        text = section(DOCS / "commands.md", f"fp4tune {command}")
        assert set(named(text, "JSON key")) == set(document), command


def shell_lines(page: Path) -> Iterator[list[str]]:
    for block in fenced(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield shlex.split(line, comments=True)


def check_call(words: list[str]) -> None:
    """Parse a call of fp4tune as the program would, and look its names up."""
    command = COMMANDS[words[0]]
    if hasattr(command, "commands"):
        command, words = command.commands[words[1]], words[1:]
    values = command.make_context(words[0], list(words[1:])).params
    assert values.get("level") in {None, *LEVELS}
    assert values.get("profile") in {None, *PROFILES}
    for name in values.get("preset") or ():
        shapes.preset_layers(name, values["tp"])
    for shape in values.get("shape") or ():
        shapes.parse_shape(shape)
    named_ = values.get("backend") or ()
    for spec in [named_] if isinstance(named_, str) else named_:
        registry.known(spec)
        if registry.is_file(spec):
            path, name = spec.split(":")
            assert re.search(rf"^(class )?{name}\b", text_of(ROOT / path), re.M), spec


@in_pages
def test_shell_examples_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M)
    for words in shell_lines(page):
        if words[0] == "fp4tune":
            check_call(words[1:])
        elif words[0] == "make":
            assert words[1] in targets
            arguments = [w.removeprefix("ARGS=") for w in words[2:] if w.startswith("ARGS=")]
            if words[1] == "probe":
                check_call(["probe", *shlex.split(" ".join(arguments))])
        elif words[0].startswith("."):
            assert os.access(ROOT / words[0], os.X_OK)
        else:
            assert words[0] in ("pip", "docker"), words


def test_the_engines_names_are_those_of_the_program():
    rows_ = table(section(DOCS / "engines.md", "What is chosen for an engine"), "backend")
    said = {ticked(row[0])[0]: row[1:] for row in rows_}
    named_ = {b: n for b, n in NAMES.items() if n.sglang or n.linear}
    assert set(said) == set(named_)
    for backend, (sglang, kernels, linear) in said.items():
        name = named_[backend]
        assert (sglang, linear) == (name.sglang or "-", name.linear or "-")
        assert re.findall(r"\w+Kernel", kernels) == list(name.vllm.values())
    assert set(named(text_of(DOCS / "engines.md"), "level")) == set(engine_levels)
    assert set(named(text_of(DOCS / "engines.md"), "target")) == set(TARGETS)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "commands.md"], ids=lambda p: p.name)
def test_exit_codes_are_those_of_the_program(page):
    said = {int(row[0]): row[1] for row in table(text_of(page), "exit code")}
    assert set(said) == {errors.SAFE, errors.UNSAFE, errors.NOT_ASSESSED}
    for code, meaning in said.items():
        line = re.search(rf"^{code}  ([^,:(]+)", errors.__doc__ or "", re.M)
        assert line and meaning.startswith(line[1].strip())


# -- examples


@in_pages
def test_python_examples_run(page, probed, monkeypatch):
    monkeypatch.setenv(state.VARIABLE, str(probed[0]))
    for marker, block in re.findall(
        r"^(<!-- file: [^\n]+ -->\n)?```python\n(.*?)^```", text_of(page), re.M | re.S
    ):
        if marker:
            name = re.search(r"file: (.+) -->", marker)
            assert name and block == text_of(ROOT / name[1]), "the page shows an older file"
        else:
            exec(compile(block, f"{page.name}: an example", "exec"), {"__name__": "example"})


def candidates(report: dict, backend: str) -> list[dict]:
    return [c for c in report["candidates"] if c["backend"] == backend]


@pytest.mark.parametrize("backend", ["example-plain", "example-plain-w4a4"])
def test_the_example_backends_are_safe(probed, backend):
    found = candidates(probed[1], backend)
    assert {(c["verdict"], c["width"]) for c in found} == {("safe", 24)}
    assert {x["id"] for c in found for x in c["conditions"]} == {LEFT_OUT.id}
    assert [c["bucket"]["m_hi"] for c in found] == [0, 1, 2, 4]
    assert not [f for f in probed[1]["findings"] if f["backend"] == backend]


def test_the_report_names_the_unwritten_tail(probed):
    findings = [f for f in probed[1]["findings"] if f["backend"] == "example-tail"]
    assert {(f["kind"], f["regime"], f["data"]) for f in findings} == {
        ("unwritten", "serial", "exact")
    }
    assert all(f["detail"]["worst"]["found"] == "nan" for f in findings)
    verdicts = {c["bucket"]["m_hi"]: c["verdict"] for c in candidates(probed[1], "example-tail")}
    assert {verdicts[m] for m in (1, 2, 4)} == {"unsafe"}


def test_the_shared_workspace_is_right_serially_and_caught_on_streams(probed):
    findings = [f for f in probed[1]["findings"] if f["backend"] == "example-scratch"]
    # Several threads make the first calls of a weight at once, too.
    seen = {(f["kind"], f["regime"]) for f in findings}
    assert ("wrong", "streams") in seen
    assert seen <= {("wrong", "streams"), ("wrong", "first-calls")}
    assert {c["width"] for c in candidates(probed[1], "example-scratch")} == {24}


def test_sql_examples_run(probed):
    blocks = fenced(DOCS / "state.md", "sql")
    assert blocks
    for block in blocks:
        name = block.splitlines()[0].removeprefix("-- ")
        with sqlite3.connect(f"file:{probed[0] / name}?mode=ro", uri=True) as db:
            assert db.execute(block).fetchall(), block


INTERPRETED = """
    import sys
    import torch
    from fp4tune.probes.data import draw, exact
    from fp4tune.probes.problem import Problem
    from fp4tune.probes.check.reference import expect, right
    import triton_gemm

    for seed, (m, n, k) in enumerate([(5, 96, 176), (17, 200, 256)]):
        problem = Problem("nvfp4", m, n, k, "bf16", "fp16")
        for operands in (
            exact(problem, 24, seed, "cpu"),
            draw(problem, "subnormal-scales", seed, "cpu"),
        ):
            expected = expect(operands, problem)
            for tactic in triton_gemm.TACTICS:
                gemm = triton_gemm.Gemm()
                out = torch.full((m, n), torch.nan, dtype=problem.dtype)
                gemm.run(gemm.prepare(operands.weight, problem), operands.a, out, tactic)
                assert bool(right(out, expected).all()), (m, n, k, tactic, operands.family)
"""


INTERPRETED_EXPERTS = """
    import torch
    from fp4tune.probes.grouped.exact import draw_tokens, draw_weights
    from fp4tune.probes.grouped.problem import ExpertsProblem
    import triton_experts

    for gate, law in (("swiglu", "balanced"), ("swiglu-oai", "elsewhere")):
        problem = ExpertsProblem("nvfp4", 3, 32, 64, groups=4, top_k=2, gate=gate, scaling=2.0)
        weights = draw_weights(problem, 1, "cpu", range(4), sparse_gates=False)
        drawn, right = draw_tokens(problem, weights, range(4), (law,), 1)
        a, backend = drawn.a, triton_experts.Experts()
        state, out = backend.prepare(weights, problem), torch.full_like(a.x, torch.nan)
        backend.run(state, a.x, a.ids, a.weights, out, "default")
        assert torch.equal(out, right.lo), gate
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [INTERPRETED, INTERPRETED_EXPERTS])
def test_a_triton_example_computes_right_in_the_interpreter(program):
    """Products in fp16: the interpreter's of bf16 are not to be trusted."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(EXAMPLES), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_triton_example_compiles_for_the_sms_the_page_names(tmp_path, monkeypatch):
    compiler = pytest.importorskip("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("triton_gemm")
    types = {"a": "*bf16", "codes": "*u8", "scales": "*u8", "global_scale": "*fp32", "out": "*bf16"}
    types.update(dict.fromkeys("mnk", "i32"))
    bm, bn = example.TACTICS["bm16-bn64"]
    tile = {"BM": bm, "BN": bn, "HALF": example.HALF_K}
    source = compiler.ASTSource(
        example._gemm,
        {**types, **dict.fromkeys(tile, "constexpr")},
        {(len(types) + index,): value for index, value in enumerate(tile.values())},
    )
    page = text_of(DOCS / "backends.md")
    named_there = re.search(r"It compiles for (.+?);", page, re.S)
    assert named_there
    for sm in re.findall(r"SM(\d+)", named_there[1]):
        made = compiler.compile(source, target=target("cuda", int(sm), 32))
        assert made.asm["cubin"], sm


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
def test_the_triton_example_of_experts_compiles_for_the_sms_the_page_names(
    tmp_path, monkeypatch, biased
):
    compiler = pytest.importorskip("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("triton_experts")
    names = example._rows.arg_names
    constants = {"BIASED": biased, "COLUMNS": example.COLUMNS, "HALF": example.HALF_K}
    types = {"x": "*bf16", "ids": "*i32", "codes": "*u8", "scales": "*u8", "out": "*bf16"}
    types.update(global_scale="*fp32", bias="*fp32", **dict.fromkeys(constants, "constexpr"))
    source = compiler.ASTSource(
        example._rows,
        {name: types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    named_there = re.search(r"It was compiled for (SM.+?);", text_of(DOCS / "backends.md"), re.S)
    assert named_there
    for sm in re.findall(r"(\d+)", named_there[1]):
        assert compiler.compile(source, target=target("cuda", int(sm), 32)).asm["cubin"], sm


@pytest.mark.gpu
def test_the_triton_example_is_safe_on_a_gpu(tmp_path):
    specs = ("--backend", f"{EXAMPLES}/triton_gemm.py:Gemm", "--backend", "torch-dequant")
    size = ("--shape", "1024,1024", "--max-m", "64", "--level", "quick", "--activation", "bf16")
    (report,) = json.loads(
        run_cli("probe", *size, *specs, "--seed", "1", "--state", str(tmp_path), "--json")
    )
    assert {c["verdict"] for c in candidates(report, "example-triton")} == {"safe"}


# -- words


def constants(*files: str) -> set[str]:
    """Every string in these modules of the program."""
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(text_of(ROOT / file))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_finding_kinds():
    said = set(named(text_of(DOCS / "verdicts.md"), "kind"))
    assert said <= constants(
        "probes/worker/session.py",
        "probes/launch/summary.py",
        "probes/worker/supervisor.py",
        "probes/worker/experts.py",
        "autotune/evidence/recorder.py",
        "probes/census/rules.py",
        "probes/regimes/plain/off_bucket.py",
        "probes/regimes/leaks.py",
        "probes/regimes/host/weights.py",
        "probes/regimes/host/effects.py",
    )
    seen = {
        describe(SlotReport(*counts, 1, guard, None, (), early))["kind"]
        for counts, guard, early in (
            ((1, 1, 0), 0, 0),
            ((1, 0, 1), 0, 0),
            ((1, 0, 0), 0, 0),
            ((0, 0, 0), 1, 0),
            ((0, 0, 0), 0, 1),
        )
    }
    fatal = {kind for kind in said if WorkerFailed(kind, "", "").fatal}
    assert said == seen | fatal | {"input modified", "error", FLAGGED} | {
        PDL_WITHOUT_WAIT,
        SILENT_FALLBACK,
    } | {"host leak", "device leak", "host sync", "plan per m", RUN_TO_RUN} | {
        "memory held",
        "side effect",
        "setting changed",
    }
    assert fatal == {"crash", "hang", "poisoned"}


def test_regimes_profiles_levels_and_widths():
    verdicts, probing = text_of(DOCS / "verdicts.md"), text_of(DOCS / "probing.md")
    assert set(named(verdicts, "regime")) == {*REGIMES, COLLECTIVE}
    for name, profile in PROFILES.items():
        assert f"`{name}`" in verdicts and f"`{name}`" in probing
        assert set(REGIMES) - set(profile.required) == set(profile.conditions), name
    rows_ = {ticked(row[0])[0]: row[1:] for row in table(probing, "level")}
    assert rows_ == {
        level.name: [
            str(level.ragged),
            f"{level.least} to {level.most:,}",
            f"{level.seconds:g}",
            str(level.samples),
            f"{level.launches:,}",
        ]
        for level in LEVELS.values()
    }
    assert ", ".join(map(str, WIDTHS[:-1])) + f" and {WIDTHS[-1]}" in verdicts


def test_statuses():
    verdicts, reading = text_of(DOCS / "verdicts.md"), text_of(DOCS / "reading.md")
    for status in (*rows.EVIDENCE, *rows.VERDICTS, *rows.CHOICES):
        assert f"`{status}`" in verdicts, status
    for status in rows.RUNS:
        assert f"`{status}`" in text_of(DOCS / "state.md"), status
    fields = [name for name in named(reading, "field")]
    assert set(fields) == set(Decision.__slots__)
    statuses = {"unproven", "stale", "safe", "quarantined"}
    assert constants("cache/view.py", "cache/decision.py") >= statuses


def test_families_and_conditions():
    verdicts = text_of(DOCS / "verdicts.md")
    for family in FAMILIES:
        assert f"`{family}`" in verdicts, family
    said = {ticked(row[0])[0]: row[2] for row in table(verdicts, "condition") if ticked(row[0])}
    real = {f.condition.id: f.condition.text for f in FAMILIES.values() if f.condition}
    granted = [c for profile in PROFILES.values() for c in profile.conditions.values()]
    assert said == {**real, **{c.id: c.text for c in (*granted, LEFT_OUT)}}


def test_every_backend_is_in_the_table_and_no_other():
    said = named(text_of(DOCS / "backend-table.md"), "backend")
    assert said == list(registry.BUILTIN)
    for row in table(text_of(DOCS / "backend-table.md"), "backend"):
        backend = registry.load_one(ticked(row[0])[0])
        assert row[1] == {"bf16": "W4A16", "fp4": "W4A4"}[backend.activation]
    experts = named(text_of(DOCS / "backend-table.md"), "routed experts")
    assert sorted(experts) == sorted(registry.EXPERTS)


def test_members_of_a_backend():
    page = text_of(DOCS / "backends.md")
    said = {re.split(r"\W", name)[0] for name in named(page, "member")}
    protocol = set(backends.Backend.__annotations__) | {
        name for name in vars(backends.Backend) if not name.startswith("_")
    }
    optional = set(re.findall(r"^    ``(\w+)", backends.Backend.__doc__ or "", re.M))
    assert said == protocol | optional
    assert f'entry-points."{registry.GROUP}"' in page


def test_every_benchmark_is_listed_and_no_other():
    page = text_of(ROOT / "benchmarks" / "README.md")
    listed = [f for line in re.findall(r"^\| (`.*?) \|", page, re.M) for f in ticked(line)]
    scripts = [p.name for p in (ROOT / "benchmarks").glob("[!_]*.py")]
    assert sorted(listed) == sorted(scripts)


def test_variables_of_our_own():
    parts = ("autotune", "cache", "engines", "machine", "probes", "witness")
    files = [file for part in parts for file in (ROOT / part).rglob("*.py")]
    used = {name for file in files for name in re.findall(r"FP4TUNE_[A-Z_]+", text_of(file))}
    said = {
        name
        for page in ("probing.md", "engines.md", "witness.md")
        for name in named(text_of(DOCS / page), "variable")
    }
    assert {name for name in said if name.startswith("FP4TUNE_")} == used


@pytest.mark.parametrize("database", [state.CHOICES, state.LEDGER])
def test_tables_and_columns(probed, database):
    text = section(DOCS / "state.md", database)
    with sqlite3.connect(f"file:{probed[0] / database}?mode=ro", uri=True) as db:
        tables = {
            name
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith(("sqlite_", "_"))
        }
        assert tables == set(named(text, "table"))
        for row in table(text, "table"):
            if len(ticked(row[0])) > 1:
                continue
            real = [info[1] for info in db.execute(f"PRAGMA table_info({ticked(row[0])[0]})")]
            columns = re.split(r"[;:]", row[1])[0].replace("bucket", "`bucket`")
            said = [c for name in ticked(columns) for c in bucket_or(name)]
            assert sorted(said) == sorted(real), row[0]


def bucket_or(name: str) -> tuple[str, ...]:
    return codec.BUCKET if name == "bucket" else (name,)


# -- pages


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@in_pages
def test_internal_links_resolve(page):
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(found), re.M)
            assert anchor in map(slug, headings), target


@in_pages
def test_nothing_is_left_to_fill_in(page):
    text = text_of(page)
    assert not re.search(r"\b(TODO|FIXME|TBD|XXX|lorem)\b|@@|\?\?\?", text)
    for comment in re.findall(r"<!-- (.+?) -->", text):
        assert re.fullmatch(
            r"(h200|cpu|verification):(begin|end)|file: docs/examples/\w+\.py", comment
        )


def test_markers_for_measured_output_come_in_pairs():
    text = text_of(DOCS / "results-h200.md")
    assert 0 <= text.find("<!-- h200:begin -->") < text.find("<!-- h200:end -->")


def test_the_readme_is_short_and_its_lines_are_not_long():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 120


def test_every_page_is_in_the_readmes_order_of_reading():
    order = section(ROOT / "README.md", "Read on")
    for page in DOCS.glob("*.md"):
        assert f"docs/{page.name})" in order, page.name


def test_every_example_file_and_page_is_reachable():
    everything = "".join(map(text_of, PAGES))
    for file in [*EXAMPLES.glob("*.py"), *DOCS.glob("*.md")]:
        assert f"{file.name})" in everything, file.name


def test_the_changelog_has_this_version():
    newest = re.search(r"^## \[(.+?)\] - (\d{4}-\d\d-\d\d)$", text_of(ROOT / "CHANGELOG.md"), re.M)
    assert newest and newest[1] == __version__


def test_every_row_of_who_can_do_what_names_tests_that_are_there():
    text = (ROOT / "docs" / "security.md").read_text()
    known = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    tables = re.findall(r"^\| who \| can .*\n((?:\|.*\n)+)", text, re.M)
    lines = [line for table in tables for line in table.splitlines()[1:]]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(tables) > 4 and {len(row) for row in rows} == {4}
    for party in ("root", "daemon's user", "engine's user", "local user", "pod", "peer", "holder"):
        assert any(party in who for who, *_ in rows), party
    for who, _, cannot, shown in rows:
        names = re.findall(r"`([\w.]+)`", shown)
        links = re.findall(r"\]\(([^)]+)\)", shown)
        assert names or links or not cannot.strip() or who.startswith(("root", "whoever may")), who
        for name in names:
            is_file = name.endswith(".py") and (ROOT / "tests" / name).is_file()
            assert is_file or any(name in each for each in known), f"{who}: {name}"
        for link in links:
            assert link.startswith("#") or (ROOT / "docs" / link).exists(), link
