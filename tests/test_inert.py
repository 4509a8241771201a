"""What is printed is inert: names from plugins, stores, bundles and findings, in every sink."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path

import fleets
import pytest
import stores
from hypothesis import given
from hypothesis import strategies as st
from test_report import check as whole_page

from commands import call
from fp4tune.cache import facts, facts_text, publish, quarantine_store, reader
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Candidate, Choice, Environment, Finding
from fp4tune.daemon.board import Board
from fp4tune.daemon.http import AsciiJson
from fp4tune.daemon.metrics import Metrics
from fp4tune.daemon.notify import Notifier
from fp4tune.engines import emit, plugin
from fp4tune.errors import LONGEST, printable
from fp4tune.fleet import bundle, merge
from fp4tune.machine.devices import Target
from fp4tune.probes.problem import Device
from fp4tune.report.terminal import console, progress, tables

NAMES = {
    "script": "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H\x9b31m",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\click\x1b]8;;\x1b\\",
    "newline": "x\nsafe: generation 9: forged\nfp4tune_forged 1\nREADY=1\ntouch FORGED\r\n",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    "quotes": "'; touch FORGED; echo \"$(touch FORGED)`touch FORGED`\\",
    "right to left": "\u202egnp.exe\u2066\u200f\u061c",
    "invisible": "a\u200bb\ufeffc\u00add\U000e0041",
    "nul": "a\x00b\x7fc",
    "half": "\ud800 \udfff",
    "markup": "[bold]x[/] [link=https://example.org]y[/link] [/nothing] :smile:",
    "long": "n" * 5000,
    "format": "%s %d {0} {{x}} {% raw %}",
    "equals": "=cmd|' /C calc'!A0 -1+1 @SUM(1)",
}
TEXTS = list(NAMES.values())
STYLES = re.compile(r"\x1b\[[0-9;]*m")
"""What rich writes for colours; none of the names has it."""


def inert(text: str, keep: str = "\n") -> str:
    """Nothing in `text` would be obeyed, and no line of it was forged."""
    obeyed = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    bad = {c for c in text if c not in keep and unicodedata.category(c) in obeyed}
    assert not bad, bad
    forged = ("safe: generation 9", "fp4tune_forged", "READY=1", "touch FORGED")
    assert not [line for line in text.split("\n") if line.startswith(forged)]
    return text


@given(st.text(st.characters()), st.sampled_from(["", "\n", "\n\t"]))
def test_printable_keeps_what_is_seen_and_the_width(text, keep):
    shown = printable(text, keep=keep)
    assert len(shown) == min(len(text), LONGEST) and inert(shown, keep) == shown
    assert printable(shown, keep=keep) == shown
    seen = [(a, b) for a, b in zip(text, shown, strict=True) if a.isprintable()]
    assert all(a == b for a, b in seen)


def test_what_cannot_even_be_told_is_told():
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert printable(Odd()) == "<Odd>" and printable(3) == "3" and printable(None) == "None"


# -- a store whose every name is one of them


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("inert") / "state", TEXTS)


def filled(place: Path, names: list[str]) -> Path:
    """A state whose every name is one of these."""
    texts = [t.encode("utf-8", "replace").decode() for t in names]  # as SQLite takes it
    environments, choices, candidates, findings = [], [], [], []
    with Ledger.open(place) as ledger:
        run = ledger.start_run(
            seed=1, level="quick", profile="strict", device={"gpu": "H200"}, argv=["probe"]
        )
        for number, text in enumerate(texts):
            print_ = fleets.sha("inert", number)
            facts_ = {"code": text, "distributions": {text: text}, "device": {"name": text}}
            environments.append(Environment(print_, text, "sm90", facts_))
            bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 16, 64 + 64 * number, 128)
            key = ("sm90", "H200", "strict", bucket, text, text, text)
            condition = {"id": text, "text": text}
            bound = {"launches": 9, "problems": 9, "failures": 0, "upper": 0.3, "confidence": 0.95}
            told = {"conditions": (condition,), "bounds": {text: bound}, "fingerprint": print_}
            choices.append(Choice(*key, "safe", median_us=1.0, launches=9, problems=9, **told))
            candidates.append(Candidate(*key, "safe", 0, 1.0, 0.9, 1.1, reasons=(text,), **told))
            detail = {"message": text, "diagnosis": text}
            ledger.add_environment(environments[-1])
            findings.append(
                Finding(
                    run, print_, text, text, bucket, {"m": 1, "n": text, "k": 1}, text, text, text,
                    number, detail=detail,
                )
            )  # fmt: skip
            ledger.add_finding(findings[-1])
        ledger.finish_run(run)
    meta = {"unsupported": dict.fromkeys(texts, texts[0]), "published_by": texts[1]}
    publish.publish(place, choices, candidates, environments, meta)
    spool = place / quarantine_store.FOLDER
    spool.mkdir(exist_ok=True)
    for text in ("\x1b]0;owned\x07.json", "right\u202eleft.json"):
        (spool / text).write_text("{}")
    return place


COMMANDS = [
    ("show",),
    ("show", "--findings"),
    ("show", "--engine", "sglang"),
    ("choose", 8, 64 + 64 * 4, 128),
    ("choose", 8, 64 + 64 * 6, 128, "--layer"),
    *(("explain", 8, 64 + 64 * number, 128) for number in range(0, len(TEXTS), 3)),
    ("quarantine", "list"),
    ("facts",),
    ("facts", "--check"),
    ("facts", "--format", "nfd"),
    ("facts", "--format", "textfile"),
    ("emit", "sglang", "--arch", "sm90", "--gpu-name", "H200", "--profile", "strict"),
    ("emit", "env", "--arch", "sm90", "--gpu-name", "H200", "--profile", "strict"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: "-".join(map(str, c)))
def test_a_terminal_is_told_nothing_by_a_name(place, command):
    result = call(*command, "--state", place)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    inert(result.stdout)
    inert(result.stderr)


@pytest.mark.parametrize(
    "command",
    [
        ("show", "--json"),
        ("explain", 8, 64 + 64 * 3, 128, "--json"),
        ("choose", 8, 64 + 64 * 9, 128, "--json"),
        ("facts", "--json"),
        ("facts", "--format", "ansible"),
        ("quarantine", "list", "--json"),
    ],
    ids=lambda c: "-".join(map(str, c)),
)
def test_json_is_ascii_and_says_what_was_stored(place, command):
    result = call(*command, "--state", place)
    assert result.stdout.isascii()
    inert(result.stdout)
    document = json.loads(result.stdout)
    if command[0] == "show":
        told = {c["backend"] for c in document["choices"]}
        assert told == {t.encode("utf-8", "replace").decode() for t in TEXTS}


def test_what_is_sourced_by_a_shell_does_nothing_but_export(tmp_path):
    texts = [text.replace("\x00", "").encode("utf-8", "replace").decode() for text in TEXTS]
    env = {f"NAME_{number}": text for number, text in enumerate(texts)}
    script = tmp_path / "emitted.sh"
    made = emit.Emission(None, None, texts, env, texts).shell()
    script.write_text(made + '\nfor a in "${FP4TUNE_ARGS[@]}"; do printf "%s\\0" "$a"; done\n')
    done = subprocess.run(
        ["bash", "-e", str(script)], cwd=tmp_path, capture_output=True, timeout=20
    )
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert done.stdout.decode().split("\0")[:-1] == texts
    assert not (tmp_path / "FORGED").exists()


def test_a_page_holds_them_as_text(place, tmp_path):
    out = tmp_path / "page.html"
    assert call("report", "--html", out, "--state", place).exit_code == 0
    document = out.read_text(encoding="utf-8").rstrip("\n")
    page = whole_page(document)
    assert not set(document) & set("\x00\x1b\x7f\x9b\u202e\u200b\u2028")
    assert "<script>alert(1)</script>" in page.text and "<script" not in document


def test_pictures_are_whole_xml(place, tmp_path):
    from xml.etree import ElementTree

    from fp4tune.autotune import reproduce
    from fp4tune.probes.check import tilemap

    found = Finding("r", "f", NAMES["nul"], NAMES["script"], stores.BUCKET, {"m": 1, "n": 1,
                    "k": 1}, NAMES["title"], NAMES["newline"], "exact", 1,
                    detail={"message": NAMES["right to left"]})  # fmt: skip
    drawn = reproduce.picture(found, tilemap.tiles_of(512, 1024, [(0, 0, 9)]))
    ElementTree.fromstring(drawn)
    inert(drawn)


# -- what machines read


@pytest.fixture
def scopes(place) -> dict:
    return scopes_of(place, TEXTS)


def scopes_of(place: Path, names: list[str]) -> dict:
    """The facts of a node whose GPUs and profiles have these names."""
    found = facts.gather(place)
    (scope,) = found["scopes"]
    found["scopes"] = [
        {**scope, "gpu": text, "profile": text, "backends": {text: 1}} for text in names
    ]
    return {**found, "reason": NAMES["newline"] + NAMES["clear"]}


def test_prometheus_reads_each_sample_with_its_labels(scopes, tmp_path):
    from prometheus_client.parser import text_string_to_metric_families as parse

    text = facts_text.render(scopes, "textfile")
    inert(text)
    (answers,) = [f for f in parse(text) if f.name == "fp4tune_reader_answers"]
    gpus = {sample.labels["gpu"] for sample in answers.samples}
    assert gpus == {printable(t, 200) for t in TEXTS}
    assert all(len(label) <= 200 for s in answers.samples for label in s.labels.values())
    assert not [f for f in parse(text) if "forged" in f.name]


def test_the_daemons_metrics_and_documents_are_inert():
    from prometheus_client.parser import text_string_to_metric_families as parse

    board = Board()
    texts = [t.encode("utf-8", "replace").decode() for t in TEXTS]
    board.numbers = {
        "choices": {("sm90", text, text, "safe"): 1 for text in texts},
        "devices": [],
        "stale": {},
        "seconds": {},
        "outcomes": {},
        "canaries": {},
    }
    text = Metrics(board).text().decode()
    inert(text)
    (choices,) = [f for f in parse(text) if f.name == "fp4tune_choices"]
    assert len(choices.samples) == len(TEXTS)
    assert not [f for f in parse(text) if "forged" in f.name]
    body = AsciiJson({"why": TEXTS}).body
    inert(bytes(body).decode("ascii"))
    assert json.loads(body) == {"why": TEXTS}


def test_systemd_is_told_a_status_and_nothing_else(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for text in TEXTS:
            notifier.status(text)
            said = heard.recv(1 << 16).decode()
            assert said.startswith("STATUS=") and inert(said, "") == said


def test_labels_of_a_node_are_labels(scopes):
    for line in facts_text.render(scopes, "nfd").splitlines()[1:]:
        name, _, value = line.partition("=")
        assert re.fullmatch(r"feature\.node\.kubernetes\.io/fp4tune\.[A-Za-z0-9_.-]{1,90}", name)
        assert re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", value), line


def test_a_drain_reason_of_slurm_is_one_line(scopes):
    line = facts_text.render(scopes, "line")
    assert line.count("\n") == 1 and inert(line.rstrip("\n"), "")
    inert(facts_text.render(scopes, "text"))


def test_slurms_prolog_reads_the_generation_and_no_forged_one(place):
    """As deploy/slurm/fp4tune-prolog.sh does, from the program itself."""
    done = subprocess.run(
        [sys.executable, "-m", "fp4tune.cache.facts", "--check"],
        env={**os.environ, "FP4TUNE_STATE": str(place), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1
    inert(done.stdout + done.stderr)
    found = re.findall(r"^[a-z]*: generation ([0-9]+): ", done.stdout + done.stderr, re.M)
    assert found == ["1"], done.stdout


# -- terminals, logs and progress


def test_a_real_terminal_gets_colours_and_no_other_sequence():
    out = io.StringIO()
    term = console.InertConsole(file=out, force_terminal=True, width=120, color_system="standard")
    made = console.table(NAMES["title"], TEXTS[:3], TEXTS[:1])
    for first, second, third in zip(TEXTS, TEXTS[1:], TEXTS[2:], strict=False):
        made.add_row(first, second, third)
    term.print(made)
    for text in TEXTS:
        term.print(text, style="red")
    term.print(console.styled((NAMES["title"] + NAMES["newline"], "bold"), NAMES["clear"]))
    term.print(console.Text(NAMES["title"] + NAMES["clear"], "bold"))
    said = out.getvalue()
    assert "\x1b[31m" in said  # rich's own
    assert "[bold]x[/]" in STYLES.sub("", said) and ":smile:" in said
    inert(STYLES.sub("", said))


def test_tables_of_plugins_and_devices_are_inert(capsys):
    target = Target(Device("cpu"), NAMES["title"])
    rows = [
        {"name": t, "status": "broken", "last": t, "reason": t, "layout": t, "formats": (t,)}
        for t in TEXTS
    ]
    tables.print_support(target, rows)
    inert(capsys.readouterr().out)


def test_progress_lines_are_lines(capsys):
    report = progress._progress_lines(0.0, NAMES["right to left"])
    for text in TEXTS:
        report(f"layer {text}", text)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == len(TEXTS)
    inert(said)


def test_a_long_layer_says_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = progress._progress_lines(0.0, "")
    report("survey", "asking")
    for second in range(0, 200, 5):
        now[0] = float(second)
        report("layer 1/2 x", "grading")
        report("some backend", "serial: alive")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and all("layer 1/2 x" in line for line in said[1:])


def test_logs_are_lines(caplog):
    with caplog.at_level(logging.INFO):
        for number, text in enumerate(TEXTS):
            reader._warn(text)
            plugin.say_once(f"{number} {text}", logging.WARNING)
    assert len(caplog.records) == 2 * len(TEXTS)
    for record in caplog.records:
        inert(record.getMessage(), "")


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_one_sentence_whatever_it_is_about(name, tmp_path):
    text = NAMES[name].replace("\x00", "").replace("/", "-")[:200] or "x"
    bad = tmp_path / f"b{text.encode('utf-8', 'replace').decode()[:60]}"
    commands = [
        ("show", "--state", bad),
        ("quarantine", "lift", text, "--state", tmp_path),
        ("choose", 1, 64, 64, "--format", text, "--state", tmp_path),
    ]
    if name in ("title", "newline", "right to left"):
        commands += [
            ("fleet", "report", bad),
            ("fleet", "merge", bad, "--into", tmp_path / "store"),
            ("import", bad, "--state", tmp_path / "state"),
            ("backends", "--backend", text, "--gpu", "none"),
        ]
    for command in commands:
        result = call(*command)
        assert result.exit_code == 2, (command, result.output)
        assert len(result.stderr.strip("\n").split("\n")) == 1, (command, result.stderr)
        inert(result.stderr)


# -- bundles


@pytest.mark.parametrize("name", NAMES)
def test_what_a_finding_s_bundle_says_of_itself_is_text(name):
    from fp4tune.autotune import reproduce

    text = NAMES[name]
    detail = {"message": text, "diagnosis": text}
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 16, 64, 128)
    problem = {"format": text, "n": text, "k": 1, "m": 1, "activation": text, "out_dtype": text}
    said = reproduce.readme(
        Finding(text, text, text, text, bucket, problem, text, "serial", text, 1, detail=detail)
    )
    inert(said)
    rendered = re.sub("`[^`\n]*`", "", said)  # what is code is shown as it is
    assert not re.search(r"<(script|img)|(?<!\\)\[[^\]]*\]\(", rendered)


def test_a_bundles_names_are_refused_or_inert(tmp_path):
    """Each name in each column that takes a text or a name."""
    for number, text in enumerate(TEXTS):
        rows = fleets.rows(number, failures={(0, "fast"): 9})
        for each in rows["evidence"] + rows["finding"] + rows["timing"] + rows["verdict"]:
            each["tactic"] = text
        rows["choice"][0]["gpu"] = text
        for each in rows["finding"]:
            each["detail"] = json.dumps({"message": text, "diagnosis": text})
        try:
            _, data = bundle.pack(rows, fleets.node(number), 1e9, None, None, parquet=False)
        except ValueError as error:
            inert(str(error))
            for each in rows["evidence"] + rows["finding"] + rows["timing"] + rows["verdict"]:
                each["tactic"] = "default"
            rows["choice"][0]["gpu"] = "H200"
            _, data = bundle.pack(rows, fleets.node(number), 1e9, None, None, parquet=False)
        (tmp_path / f"{number}{bundle.SUFFIX}").write_bytes(data)
    done = merge.merge([str(tmp_path)], str(tmp_path / "store"))
    assert len(done.added) == len(TEXTS) and not done.refused
    page = tmp_path / "page.html"
    result = call("fleet", "report", tmp_path / "store", "--html", page)
    inert(result.stdout)
    assert not set(page.read_text(encoding="utf-8")) & set("\x00\x1b\x7f\x9b\u202e\u200b\u2028")
    whole_page(page.read_text(encoding="utf-8").rstrip("\n"))
    assert call("fleet", "report", tmp_path / "store", "--json").stdout.isascii()


def test_no_command_prints_past_the_sink():
    """Whoever adds a command prints through `say`: then nothing more need be thought of."""
    import fp4tune.commands

    (folder,) = fp4tune.commands.__path__
    for path in Path(folder).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "_console.py":
            assert not re.search(r"typer\.echo|click\.echo|(?<![\w.])print\(", text), path.name
