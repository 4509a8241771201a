"""Attacks on what fp4tune says and keeps of memory, names, bundles and rows, of kinds that the
tests do not know.

    python benchmarks/trust_said.py --out DIR [--items 9 11 14 15]

Each attack counts as `tried`, and as `failed` where fp4tune did: where a lack of memory condemned a
backend, where what was taken back came again or left no reason, where a name was obeyed by whoever
reads it, where a bundle did not run by itself and was kept, where one odd row kept others on the
node. Some minutes on two cores.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import stores
import test_bundle
import test_inert
from test_forget import taken, wrong
from test_known import Store
from test_report import check as whole_page
from trust_attacks import Score
from trust_more import attack_all, folder

from commands import call
from fp4tune.cache import facts_text
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import Environment, Finding
from fp4tune.daemon.board import Board
from fp4tune.daemon.http import AsciiJson
from fp4tune.daemon.metrics import Metrics
from fp4tune.engines import emit
from fp4tune.errors import Refused
from fp4tune.fleet import merge
from fp4tune.probes import bundle
from fp4tune.probes.bundle.trial import trial
from fp4tune.probes.zoo.controls import NAME as CONTROLS

GIB = 1 << 30

# -- 9: memory, and what is taken back


def memory() -> Score:
    score = Score()
    rng = random.Random(9)
    with folder() as name:
        for number in range(40):
            n = rng.randrange(1, 1 << 44)
            k = 64 * rng.randrange(1, 1 << 38)
            place = Path(name, f"huge-{number}")
            done = call("probe", "--gpu", "none", "--shape", f"{n},{k}", "--state", place)
            held = done.exit_code == 2 and "Traceback" not in done.output and not place.exists()
            score.count(f"--shape {n},{k}", held and len(done.stderr.strip().splitlines()) == 1)
        for gigabytes in (0.25, 0.35, 0.45, 0.6, 0.9):
            place = Path(name, f"limit-{gigabytes}")
            score.count(f"{gigabytes} GB to live in", _innocent(place, gigabytes))
        for number in range(60):
            score.count(f"taken back {number}", _taken_back(Path(name, f"back-{number}"), rng))
    return score


def _innocent(place: Path, gigabytes: float) -> bool:
    """Whether a probe with so much address space condemns nothing, and one with all of it is safe
    on the same state."""
    words = ["probe", "--gpu", "none", "--shape", "512,512", "--max-m", "8", "--level", "quick"]
    words += ["--activation", "bf16", "--backend", "torch-dequant", "--json"]

    def run(limit: int | None) -> subprocess.CompletedProcess[str]:
        def little() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        return subprocess.run(
            [sys.executable, "-m", "fp4tune.cli", *words, "--state", str(place)],
            preexec_fn=little, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    short = run(int(gigabytes * GIB))
    if short.returncode < 0:  # Python itself had no room to begin in
        return True
    right = short.returncode in (0, 2) and "Traceback" not in short.stderr
    if right and (place / "ledger.db").exists():
        with Ledger.open(place, readonly=True) as ledger:
            failed = {row.backend for row in ledger.evidence(status="failed")} - {CONTROLS}
            right = not failed and not ledger.findings()
    return right and run(None).returncode == 0


def _taken_back(place: Path, rng: random.Random) -> bool:
    """Whether what is taken back is gone from what is known, for a reason, and the rest is not."""
    names = tuple(rng.sample("abcdefgh", rng.randint(1, 4)))
    store = Store(place, names=names, status=rng.choice(["failed", "passed"]))
    kind = rng.choice(["run", "backend", "layer", "finding"])
    if kind == "finding":
        with Ledger.open(place) as ledger:
            if not ledger.evidence(status="failed"):
                kind = "run"
    named: dict[str, Any] = {
        "run": lambda: {"run": store.run},
        "backend": lambda: {"backend": rng.choice(names)},
        "layer": lambda: {"n": store.problem.n, "k": store.problem.k},
        "finding": lambda: {"finding": wrong(place, store).id},
    }[kind]()
    try:
        taken(place, **named)
    except Refused:
        return False
    left = set(store.recall(names=names).entries)
    gone = {named["backend"]} if kind == "backend" else set(names)
    with Ledger.open(place) as ledger:
        (row,) = ledger.forgotten()
        whole = not ledger.damage().sentences
    held = whole and bool(row.reason)
    return held and (kind == "finding" or (not left & gone and left == set(names) - gone))


# -- 11: names

PIECES = (
    *test_inert.TEXTS,
    "\x1b[",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x1bP",
    "\x9d0;x\x9c",
    "\x07\x08\x08",
    "\r\x1b[K",
    "</script><svg onload=1>",
    "]]>",
    "<!--",
    "&#27;[2J",
    '"} 1\nfp4tune_forged{a="',
    "\\\n",
    "${IFS}$(touch FORGED)",
    "%0aREADY=1",
    "\u2067\u2068\u2069\u061c",
    "\ufff9\ufffa\ufffb",
    "\U000e0001\U000e007f",
    "\ud83d",
    "a\u0300" * 40,
    "\u1680\u2000\u3000",
)


JSON = ("show", "explain", "choose", "quarantine")
"""Commands of `test_inert.COMMANDS` that print documents, too."""


def odd_name(rng: random.Random) -> str:
    """Pieces that somebody obeys, and characters from everywhere."""
    parts = rng.choices(PIECES, k=rng.randint(1, 4))
    parts += [chr(rng.randrange(0x110000)) for _ in range(rng.randrange(12))]
    rng.shuffle(parts)
    return "".join(parts)[: rng.choice([40, 400, 6000])]


def _held(check: Callable[[], object]) -> bool:
    try:
        check()
    except (AssertionError, ValueError, KeyError, UnicodeError):
        return False
    return True


def names() -> Score:
    from prometheus_client.parser import text_string_to_metric_families as parse

    score = Score()
    rng = random.Random(11)
    with folder() as base:
        for turn in range(20):
            texts = list(dict.fromkeys(odd_name(rng) for _ in test_inert.TEXTS))
            place = test_inert.filled(Path(base, str(turn)), texts)
            for command in test_inert.COMMANDS:
                done = call(*command, "--state", place)
                inert = _unwrapped(done.stdout + done.stderr)
                clean = done.exception is None or isinstance(done.exception, SystemExit)
                score.count(f"{command[0]}, names {turn}", inert and clean)
                if command[0] in JSON and "--engine" not in command:
                    asked = [word for word in command if not str(word).startswith("--f")]
                    told = call(*asked, "--json", "--state", place).stdout
                    right = told.isascii() and _held(lambda: json.loads(told))  # noqa: B023
                    score.count(f"{command[0]} --json, names {turn}", right)
            scopes = test_inert.scopes_of(place, texts)
            for form in ("textfile", "nfd", "line", "text"):
                said = facts_text.render(scopes, form)
                held = _held(lambda: test_inert.inert(said))  # noqa: B023
                if form == "textfile":
                    held = held and not [f for f in parse(said) if "forged" in f.name]
                score.count(f"facts as {form}, names {turn}", held)
            page = Path(base, f"{turn}.html")
            made = call("report", "--html", page, "--state", place).exit_code == 0
            document = page.read_text(encoding="utf-8") if made else ""
            held = made and _held(lambda: whole_page(document.rstrip("\n")))  # noqa: B023
            score.count(f"the page, names {turn}", held and "<script" not in document)
            score.count(f"the daemon's metrics, names {turn}", _metrics(texts))
            body = AsciiJson({"why": texts}).body
            score.count(f"HTTP, names {turn}", json.loads(body) == {"why": texts})
            score.count(f"a shell, names {turn}", _sourced(Path(base), texts))
    return score


def _unwrapped(said: str) -> bool:
    """Whether a terminal obeys nothing of it; a line that was wrapped may begin anywhere in a name,
    so the beginnings of lines say nothing."""
    return _held(lambda: test_inert.inert(said.replace("\n", " ")))


def _metrics(texts: list[str]) -> bool:
    from prometheus_client.parser import text_string_to_metric_families as parse

    board = Board()
    plain = [text.encode("utf-8", "replace").decode() for text in texts]
    counts = {("sm90", text, text, "safe"): 1 for text in plain}
    board.numbers = {"choices": counts, "devices": [], "stale": {}, "seconds": {},
                     "outcomes": {}, "canaries": {}}  # fmt: skip
    said = Metrics(board).text().decode()
    held = _held(lambda: test_inert.inert(said))
    return held and not [f for f in parse(said) if "forged" in f.name]


def _sourced(base: Path, texts: list[str]) -> bool:
    """Whether a shell that sources an emission gets the names, and does nothing else."""
    plain = [text.replace("\x00", "").encode("utf-8", "replace").decode() for text in texts]
    env = {f"NAME_{number}": text for number, text in enumerate(plain)}
    script = base / "emitted.sh"
    made = emit.Emission(None, None, plain, env, plain).shell()
    script.write_text(made + '\nfor a in "${FP4TUNE_ARGS[@]}"; do printf "%s\\0" "$a"; done\n')
    done = subprocess.run(["bash", "-e", str(script)], cwd=base, capture_output=True, timeout=20)
    right = done.returncode == 0 and done.stdout.decode().split("\0")[:-1] == plain
    return right and not (base / "FORGED").exists()


# -- 14: a maintainer's bundle

HEAD = test_bundle.HEAD
PLUGINS: dict[str, tuple[str, dict[str, str]]] = {
    "a name that is imported as another": (
        HEAD + "import helper as h\nIt = type('It', (h.Base,), {})\n", {}),
    "a star": (HEAD + "from helper import *\nclass It(Base): pass\n", {}),
    "imported by its name": (
        HEAD + "import importlib\nh = importlib.import_module('helper')\nclass It(h.Base): pass\n",
        {}),
    "tried first": (
        HEAD + "try:\n    import not_there\nexcept ImportError:\n    import helper as not_there\n"
        "class It(not_there.Base): pass\n", {}),
    "a package whose file says all": (
        HEAD + "import pack\nclass It(pack.Base): pass\n",
        {"pack/__init__.py": "from .a import *\n", "pack/a.py": "from helper import Base\n"}),
    "modules that import each other": (
        HEAD + "import one\nclass It(one.Base): pass\n",
        {"one.py": "import two\nfrom helper import Base\n", "two.py": "import one\n"}),
    "a namespace package": (
        HEAD + "from space.inner import Base\nclass It(Base): pass\n",
        {"space/inner.py": "from helper import Base\n"}),
    "a file of numbers": (
        HEAD + "import json\nfrom helper import Base\n"
        "TABLE = json.loads((Path(__file__).parent / 'table.json').read_text())\n"
        "class It(Base): pass\n", {"table.json": "[1]"}),
    "a module with the name of a standard one": (
        HEAD + "import helper\nclass It(helper.Base): pass\n", {"queue.py": "1/0\n"}),
    "a name with umlauts": (
        HEAD + "import größe\nclass It(größe.Base): pass\n",
        {"größe.py": "from helper import Base\n"}),
}  # fmt: skip


def bundles() -> Score:
    score = Score()
    for kind, plugins in (("known", test_bundle.PLUGINS), ("new", PLUGINS)):
        for name in plugins:
            with folder() as base:
                test_bundle.PLUGINS = {**test_bundle.PLUGINS, name: plugins[name]}
                spec = test_bundle.plugin(Path(base), name)
                out = Path(base, "out")
                try:
                    made = bundle.write(out, test_bundle.shown(), test_bundle.call_of(spec), {})
                except ValueError as error:  # refused with a sentence, and nothing kept
                    held = str(error).isprintable() and not out.exists() and kind == "new"
                    score.count(f"{name}: {error}", held)
                    score.details.setdefault("refused", []).append(name)
                    continue
                Path(base, "mine").rename(Path(base, "gone"))
                code, _ = trial(made)
                score.count(name, code in (0, 1))
    return score


# -- 15: rows


def rows() -> Score:
    score = Score()
    rng = random.Random(15)
    with folder() as base:
        for turn in range(60):
            place, good, odd = Path(base, f"state-{turn}"), rng.randint(1, 6), rng.randint(1, 6)
            with Ledger.open(place) as ledger:
                run = stores.start(ledger)
                for number in range(good):
                    ledger.add_evidence(stores.evidence(run, launches=number + 1, problems=1))
                for number in range(odd):
                    _odd_row(ledger, run, rng, number)
                ledger.finish_run(run)
            out = Path(base, f"{turn}.zip")
            done = call("export", "--out", out, "--state", place, "--json")
            held = done.exit_code == 0 and "\x1b" not in done.output
            if held:
                told = json.loads(done.stdout)
                sent = told["rows"]["evidence"] == good
                left = sum(sum(why.values()) for why in told["skipped"].values())
                merged = merge.merge([str(out)], str(Path(base, f"store-{turn}")))
                held = sent and left >= odd and len(merged.added) == 1 and not merged.refused
            score.count(f"{odd} odd rows beside {good}, {turn}", held)
    return score


def _odd_row(ledger: Ledger, run: str, rng: random.Random, number: int) -> None:
    """A row of some table that no bundle may carry."""
    evil = "x\x1b[31m" + odd_name(rng).encode("utf-8", "replace").decode()[:300] + str(number)
    where = rng.choice(["environment", "backend", "kind", "regime"])
    if where == "environment":
        ledger.add_environment(Environment(f"{number:064x}", evil, "sm90", {}))
        return
    finding = Finding(run, *stores.WHAT, {"m": 1}, "wrong", "serial", "exact", 1, detail={})
    ledger.add_finding(replace(finding, **{where: evil}))


ATTACKS = {
    9: ("out of memory is nobody's fault, and what was found can be taken back", memory),
    11: ("what is printed is inert", names),
    14: ("a bundle runs by itself, or is not kept", bundles),
    15: ("one bad row does not stop the rest", rows),
}

if __name__ == "__main__":
    os.environ["COLUMNS"] = "200"
    attack_all(ATTACKS, textwrap.dedent(__doc__ or ""), "said.json")
