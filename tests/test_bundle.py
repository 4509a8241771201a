"""A bundle holds all that a plugin's file needs, and is kept only if it runs by itself."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from stores import gone

from fp4tune.machine import processes
from fp4tune.probes import bundle, registry
from fp4tune.probes.bundle.siblings import beside
from fp4tune.probes.bundle.trial import trial
from fp4tune.probes.launch.case import Launch
from fp4tune.probes.problem import Problem
from fp4tune.probes.worker.supervisor import Worker

PROBLEM = Problem("nvfp4", 8, 64, 64)

HEAD = """
import sys
from pathlib import Path
from fp4tune.probes.zoo.floor import Right
sys.path.insert(0, str(Path(__file__).parent))
"""
PLUGINS = {
    "a module beside": (HEAD + "from helper import Base\nclass It(Base): pass\n", {}),
    "a package beside": (
        HEAD + "import parts.deep.inner\nclass It(parts.deep.inner.Base): pass\n",
        {
            "parts/__init__.py": "",
            "parts/deep/__init__.py": "from . import other\n",
            "parts/deep/other.py": "from ..near import NEAR\n",
            "parts/near.py": "NEAR = 1\n",
            "parts/deep/inner.py": "from helper import Base\nfrom .other import NEAR\n",
        },
    ),
    "inside a function": (
        HEAD + "class It(Right):\n    def __init__(self): super().__init__('it')\n"
        "    def prepare(self, weight, problem):\n        import helper\n"
        "        return super().prepare(weight, problem)\n",
        {},
    ),
    "a file that is named": (
        HEAD + "from helper import Base\n"
        "KERNEL = (Path(__file__).parent / 'kernels' / 'gemm.cu').read_text()\n"
        "WORDS = Path(__file__).with_name('words.txt').read_text()\nclass It(Base): pass\n",
        {"kernels/gemm.cu": "// nothing", "words.txt": "some"},
    ),
    "from another folder": (
        HEAD + "sys.path.insert(0, str(Path(__file__).parents[1] / 'common'))\n"
        "from shared.base import Base\nclass It(Base): pass\n",
        {
            "../common/shared/__init__.py": "",
            "../common/shared/base.py": "from helper import Base\n",
        },
    ),
    "names of ours": (HEAD + "from call import Base\nclass It(Base): pass\n", {"call.py": ""}),
}
"""A plugin's source, and files beside it, besides ``helper.py``."""
HELPER = """
from fp4tune.probes.zoo.floor import Right
class Base(Right):
    def __init__(self):
        super().__init__("it")
    def run(self, state, a, out, tactic):
        super().run(state, a, out, tactic)
        out[0, 0] += 1
"""


def plugin(folder: Path, name: str) -> str:
    """Write the plugin of PLUGINS; its FILE.py:NAME."""
    source, files = PLUGINS[name]
    place = folder / "mine"
    place.mkdir()
    for path, text in {"it.py": source, "helper.py": HELPER, **files}.items():
        target = place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(HELPER if path == "call.py" else text)
    return f"{place / 'it.py'}:It"


def call_of(spec: str) -> bundle.CallSource:
    """What a worker says of how the backend is called."""
    worker = Worker(environment={"CUDA_VISIBLE_DEVICES": ""})
    try:
        worker.ask("hello", 180.0, backend=spec, kind="cpu", sm=None)
        return bundle.CallSource(**worker.ask("call", 60.0, spec=spec))
    finally:
        worker.close()


def shown(kind: str = "wrong") -> bundle.Shown:
    cases = [bundle.drawn(PROBLEM, "exact", 24, 3, "cpu")]
    return bundle.Shown(
        PROBLEM, "serial", kind, cases, [Launch(0, 1, 4, "fp32", 0)], 0, False, "cpu"
    )


@pytest.mark.parametrize("name", PLUGINS)
def test_what_a_plugin_needs_goes_with_it(tmp_path, name):
    call = call_of(plugin(tmp_path, name))
    files = beside(Path(call.file), call.loaded or {})
    places = set(files.values())
    assert {"backend/it.py"} < places
    for path in PLUGINS[name][1]:
        wanted = path.replace("../common", "vendor") if path.startswith("..") else f"backend/{path}"
        assert wanted in places, places
    assert len(places) == len(files)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_its_bundle_runs_by_itself(tmp_path, name):
    made = bundle.write(tmp_path / "out", shown(), call_of(plugin(tmp_path, name)), {})
    (tmp_path / "mine").rename(tmp_path / "gone")
    code, said = trial(made)
    # Right but for one element, except where `helper` is imported and not used.
    assert code == (0 if name == "inside a function" else 1), said


BROKEN = {
    "a name made up at run time": "open(Path(__file__).with_name('words' + '.txt'))\n",
    "a module made up at run time": "__import__('hel' + 'per2')\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_one_that_does_not_run_is_not_kept_and_says_why(tmp_path, what):
    spec = plugin(tmp_path, "a module beside")
    file = Path(spec.rpartition(":")[0])
    late = textwrap.indent(BROKEN[what], " " * 8)
    more = f"    def prepare(self, weight, problem):\n{late}"
    more += "        return super().prepare(weight, problem)\n"
    file.write_text(file.read_text().replace("pass", "") + more)
    (file.parent / "words.txt").write_text("some")
    (file.parent / "helper2.py").write_text("")
    with pytest.raises(ValueError, match="does not run by itself.*(words.txt|helper2)"):
        bundle.write(tmp_path / "out", shown(), call_of(spec), {})
    assert not (tmp_path / "out").exists()


def test_a_script_that_ends_its_process_is_right_for_a_crash_alone(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "reproduce.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    bundle._must_run(folder, "crash", None)
    with pytest.raises(ValueError, match="signal 11"):
        bundle._must_run(folder, "wrong", None)


def test_a_script_that_hangs_is_right_for_a_hang_alone(tmp_path, monkeypatch):
    (tmp_path / "reproduce.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(bundle, "trial", lambda folder, python: trial(folder, python, 0.5))
    bundle._must_run(tmp_path, "hang", None)
    with pytest.raises(ValueError, match="signal"):
        bundle._must_run(tmp_path, "wrong", None)


def test_what_a_script_prints_is_bounded_and_what_it_starts_ends_with_it(tmp_path):
    (tmp_path / "reproduce.py").write_text(
        "import os, subprocess\n"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "os.write(2, b'x' * (1 << 22) + b'\\nlast')\n"
    )
    before = set(processes.processes())
    assert trial(tmp_path) == (0, "last")
    left = [
        pid
        for pid in set(processes.processes()) - before
        if b"sleep\x00600" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert gone(left)


def test_too_much_for_a_bundle_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("fp4tune.probes.bundle.siblings.MOST_BYTES", 10)
    (tmp_path / "it.py").write_text("x = 1  # more than ten bytes\n")
    with pytest.raises(ValueError, match="too many for a bundle"):
        beside(tmp_path / "it.py", {})


def test_examples_of_the_docs_take_their_siblings_along():
    examples = Path(__file__).resolve().parents[1] / "docs" / "examples"
    file, _ = registry.origin(f"{examples / 'broken.py'}:Tail")
    assert sorted(beside(file, {}).values()) == ["backend/broken.py", "backend/plain.py"]
