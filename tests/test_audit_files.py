"""What files the audit is given, what it remembers of them, and which SMs they have code for."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import fatbins
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune.cli import app
from fp4tune.machine import elf, fatbin
from fp4tune.probes import audit
from fp4tune.probes.audit import containers, coverage, disassemble, install, memory, sources
from fp4tune.probes.audit.judge import GpuModule
from fp4tune.probes.audit.names import family
from fp4tune.probes.audit.sass import SassKernel

runner = CliRunner()
HOST = Path(json.__file__)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def a_host_library() -> bytes:
    import _ctypes

    return Path(_ctypes.__file__).read_bytes()


def without_headers(data: bytes) -> bytes:
    """The same library with every section header zeroed."""
    at, size, count = (*struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58))
    return data[:at] + bytes(size * count) + data[at + size * count :]


def archive(name: str, data: bytes) -> bytes:
    header = f"{name + '/':<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode()
    return containers.ARCHIVE + header + data + b"\n" * (len(data) % 2)


def test_each_kind_of_file_gets_its_own_sentence(tmp_path):
    host = a_host_library()
    stripped = host[:40] + bytes(8) + host[48:58] + bytes(6) + host[64:]
    cases = {
        "empty.so": (b"", "the file is empty"),
        "text.so": (b"no code\n", "text file"),
        "lfs.so": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        "script.so": (b"/* GNU ld script */\nGROUP ( libx.so.1 )\n", "linker script"),
        "ptx.so": (b".version 9.0\n.target sm_90\n.address_size 64\n", "PTX only"),
        "noise.so": (bytes(range(256)) * 4, "not an ELF file"),
        "host.so": (host, "host library without GPU code"),
        "zeroed.so": (without_headers(host), "section headers are gone"),
        "stripped.so": (stripped, "section headers are gone"),
        "half.so": (host[: len(host) // 2], "cut off"),
        "host.a": (archive("x.o", host), "archive without GPU code"),
        "cut.a": (archive("x.o", host)[:-100], "cut off"),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    for name, (_, said) in cases.items():
        (report,) = audit.audit([tmp_path / name])
        assert report.verdict == "unknown" and said in report.evidence[0], (name, report.evidence)
    result = runner.invoke(app, ["audit", str(tmp_path / "text.so"), str(tmp_path / "none.so")])
    assert result.exit_code == 2 and "does not exist" in result.output
    assert result.output.index("text file") < result.output.index("does not exist")


def test_what_is_not_there_is_one_sentence_and_a_reader_that_left_is_no_verdict(tmp_path):
    gone, empty = tmp_path / "gone", tmp_path / "empty"
    empty.mkdir()
    paths = [str(gone), str(empty)]
    result = runner.invoke(app, ["audit", *paths, "--state", str(tmp_path / "s"), "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 2
    assert [row["evidence"][0] for row in rows] == [
        f"{gone} does not exist",
        f"{empty} holds no FlashInfer and no file with GPU code (.so, .o, .a, .cubin, .fatbin)",
    ]
    assert [len(row["evidence"]) for row in rows] == [1, 1]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fp4tune.cli", "audit", *paths, "--state", str(tmp_path / "s")]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_match_filters_and_finds_nothing_in_one_sentence(tmp_path):
    for name in ("gemm.so", "other.so"):
        (tmp_path / name).write_text("text")
    result = runner.invoke(app, ["audit", str(tmp_path), "--match", "gem+"])
    assert "gemm (file)" in result.output and "other" not in result.output
    for pattern in ("nothing", "("):
        result = runner.invoke(app, ["audit", str(tmp_path), "--match", pattern])
        assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1


def test_an_audit_that_fails_itself_has_no_verdicts_exit_code(tmp_path, monkeypatch):
    (tmp_path / "x.so").write_text("text")

    def broken(*arguments):
        raise RuntimeError("a fault of our own")

    with monkeypatch.context() as patch:
        patch.setattr(audit, "machine_code_of", broken)
        result = runner.invoke(app, ["audit", str(tmp_path / "x.so")])
    assert result.exit_code == 2 and "a fault of our own" in result.output
    monkeypatch.setattr(audit, "audits", broken)
    result = runner.invoke(app, ["audit", str(tmp_path / "x.so")])
    assert result.exit_code == 2 and "the audit failed" in result.output


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("libx.so", True), ("libx.so.1.2", True), ("a.cubin", True), ("a.fatbin", True),
     ("libx.a", True), ("x.so.txt", False), ("a.py", False), (".so.1", False)],
)  # fmt: skip
def test_libraries_are_known_by_their_endings(name, wanted):
    assert sources.has_library_name(name) == wanted


def test_a_folder_of_thousands_of_files_is_walked_lazily(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "z.so").write_text("text")
    with sources.modules([tmp_path], None) as found:
        assert [each.module.name for each in found] == ["z"]


# --- what an install says ------------------------------------------------------------------


def test_another_flashinfer_than_was_asked_for_is_not_judged(tmp_path):
    package = tmp_path / "site" / "flashinfer"
    inside = {"from": str(package / "jit/gemm/core.py")}
    assert install._refused(inside, package) is None
    other = install._refused({"from": "/elsewhere/flashinfer/jit/gemm/core.py"}, package)
    assert other and "another FlashInfer was imported" in other
    assert install._refused({"error": "no torch"}, package) == "no torch"


@pytest.mark.slow
@pytest.mark.parametrize("relative", [False, True])
def test_every_spelling_of_a_path_asks_the_same_package(relative, tmp_path, monkeypatch):
    """A package whose own import fails for want of a GPU is entered all the same."""
    package = tmp_path / "9.9" / "flashinfer"
    for folder in ("jit/gemm", "data"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('no GPU here')\n")
    (package / "version.py").write_text("__version__ = '9.9'\n")
    (package / "jit/__init__.py").touch()
    (package / "jit/gemm/__init__.py").touch()
    (package / "jit/gemm/core.py").write_text(
        "import os, pathlib\n"
        "class Spec:\n"
        "    name = 'fp4_gemm_cutlass_sm120'\n"
        "    ninja_path = pathlib.Path(os.environ['FLASHINFER_WORKSPACE_BASE'], 'build.ninja')\n"
        "    def write_ninja(self):\n"
        "        self.ninja_path.parent.mkdir(parents=True, exist_ok=True)\n"
        "        (self.ninja_path.parent / 'k.cu').write_text('nv_float4_t<float_e2m1_t> a;')\n"
        "        self.ninja_path.write_text('cuda_cflags = -arch=compute_120f,code=sm_120f\\n'\n"
        "            f'build k.o: cuda_compile {self.ninja_path.parent}/k.cu\\n')\n"
        "def gen_gemm_sm120_module_cutlass_fp4():\n"
        "    return Spec()\n"
        "def gen_trtllm_gen_fp4_module():\n"
        "    return get_cubin('cutlass fp4')\n"
    )
    monkeypatch.chdir(tmp_path)
    path = Path("9.9") if relative else tmp_path / "9.9"
    with sources.modules([path], 120) as found:
        (each,) = found
    assert each.problem is None, each.problem
    assert (each.module.name, each.module.version) == ("fp4_gemm_cutlass_sm120", "9.9")
    assert each.build is not None


# --- what is remembered --------------------------------------------------------------------


def test_what_was_read_is_kept_by_content_and_nothing_else_is_believed(tmp_path):
    kernels = [SassKernel("k", "wait-present", 1, 0, {"HMMA": 2}, doubts=("one",))]
    key = memory.key(b"a cubin")
    assert memory.recall(key) is None
    memory.remember(key, kernels)
    assert memory.recall(key) == kernels
    assert memory.key(b"another") != key != memory.key(b"a cubin", (3,))
    path = memory.folder() / key[:2] / key
    for text in ("", "{}", "[1]", '[{"name": "k"}]', path.read_text().replace("2}", '"x"}')[:-3]):
        path.write_text(text)
        assert memory.recall(key) is None
    memory.tidy()


def test_an_unwritable_cache_changes_nothing(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    memory.remember(memory.key(b"x"), [])
    assert memory.recall(memory.key(b"x")) is None
    memory.tidy()


# --- architecture coverage -----------------------------------------------------------------


IMAGES = st.builds(
    fatbin.Image,
    st.booleans(),
    st.sampled_from([75, 80, 86, 89, 90, 100, 103, 120, 121]),
    st.sampled_from([True, False]),
)


@given(st.lists(st.lists(IMAGES, max_size=4), max_size=3))
def test_a_fatbin_is_read_as_it_was_written(modules):
    data = b"".join(fatbins.made(*module) for module in modules)
    found = [(i.ptx, i.sm, i.exact) for i in fatbin.images(data, 0, len(data))]
    assert found == [(i.ptx, i.sm, i.exact) for module in modules for i in module]
    for cut in range(0, len(data), 7):
        list(fatbin.images(data[:cut], 0, cut))  # never past the end


@given(st.lists(IMAGES, max_size=5), st.sampled_from([80, 90, 100, 103, 120, 121]))
def test_native_code_comes_before_ptx_and_ptx_before_nothing(images, sm):
    word, image = fatbin.coverage(images, sm)
    native = [i for i in images if not i.ptx and i.runs_on(sm)]
    ptx = [i for i in images if i.ptx and i.runs_on(sm)]
    assert word == ("native" if native else "ptx" if ptx else "absent")
    assert image in (native or ptx or [None])


@pytest.mark.parametrize(
    ("image", "runs", "not_on"),
    [
        (fatbin.Image(False, 80), (80, 86, 89), (75, 90, 100)),
        (fatbin.Image(False, 90, exact=True), (90,), (100, 120)),
        (fatbin.Image(False, 100, family=True), (100, 103), (90, 110, 120)),
        (fatbin.Image(False, 120), (120, 121), (100,)),
        (fatbin.Image(True, 80), (80, 90, 120), (75,)),
        (fatbin.Image(True, 90, exact=True), (90,), (100,)),
        (fatbin.Image(True, 100, family=True), (100, 103), (120,)),
    ],
)
def test_what_runs_where(image, runs, not_on):
    assert all(image.runs_on(sm) for sm in runs) and not any(image.runs_on(sm) for sm in not_on)


def test_coverage_of_files_and_engines(tmp_path):
    (tmp_path / "k.fatbin").write_bytes(
        fatbins.made(fatbin.Image(True, 80), fatbin.Image(False, 100))
    )
    (tmp_path / "host.so").write_bytes(a_host_library())
    result = runner.invoke(app, ["audit", "--coverage", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    (counts,) = row["families"].values()
    assert counts == {"sm90": {"ptx sm_80": 1}, "sm100": {"native": 1}, "sm120": {"ptx sm_80": 1}}
    shown = runner.invoke(app, ["audit", "--coverage", str(tmp_path), "--arch", "90"])
    assert "SM90: 1 ptx sm_80" in shown.stdout
    for wrong in (["--coverage"], ["--coverage", "--engine", "nothing"], ["--engine", "vllm"],
                  ["--coverage", str(tmp_path / "none")]):  # fmt: skip
        assert runner.invoke(app, ["audit", *wrong]).exit_code == 2


def test_a_family_is_a_name_without_its_arguments():
    assert family("_ZN3moe6MarlinILi4ELb1EEEvPKi") == "moe::Marlin"
    assert family("_Z4gemmILb1EEvPf") == family("_Z4gemmILb0EEvPf") == "gemm"
    assert family("gemm") == "gemm"
    # A name the demangler gives up on still begins with something.
    assert family("_ZN7cutlass13device_kernelIthis is not mangled") == "cutlass::device_kernel"


# --- nothing heavy -------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_is_not_imported_to_audit_a_file(tmp_path):
    (tmp_path / "x.so").write_text("text")
    code = (
        "import sys\nfrom fp4tune.cli import main\n"
        f"sys.argv = ['fp4tune', 'audit', {str(tmp_path / 'x.so')!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.stderr.strip().endswith("False"), done.stderr


def test_the_same_words_under_two_names_are_two_kernels(tmp_path, monkeypatch):
    """How a kernel is launched depends on its name: equal code does not make it one kernel."""
    cubins = []
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
        cubins.append(str(tmp_path / name))

    def read(path, only):
        name = Path(path).name
        return disassemble._Cubin(path, 90, False, 1, ((name, "same words"),), (), {})

    def disassembled(tool, cubin, sections, deadline):
        (kernel,) = cubin.kernels
        return [SassKernel(kernel[0], "no-wait", 0, 0)], None, 0.0

    monkeypatch.setattr(disassemble, "_cubin", read)
    monkeypatch.setattr(disassemble, "disassembled", disassembled)
    monkeypatch.setattr(disassemble.codedigest, "disassembler", lambda tool="": "tool")
    code = disassemble._Reading("x", disassemble.ReadLimits(), 0.0).code(cubins, None)
    assert [k.kernel.name for k in code.kernels] == ["one", "two"]


def test_a_module_is_named_by_where_it_lies(tmp_path):
    cached = tmp_path / ".cache/flashinfer/9.9/120f/cached_ops/fp4_gemm_cutlass_sm120"
    cached.mkdir(parents=True)
    (cached / "build.ninja").touch()
    found = install.module_at(cached / "fp4_gemm_cutlass_sm120.so")
    assert (found.kind, found.version) == ("jit", "9.9")
    assert found.backend == "flashinfer-cutlass"
    assert isinstance(found, GpuModule) and elf.EM_CUDA == 190
    assert coverage.ENGINES["vllm"] == ("vllm",)
