"""A fingerprint changes with what a backend depends on, and with nothing else."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import fake_nvml
import fatbins
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import spawn

from fp4tune.cache import fingerprint
from fp4tune.machine import codedigest, elf, fatbin
from fp4tune.machine.codedigest import CodeDigest, DriverCompiler

GPU = {
    "kind": "cuda",
    "arch": "sm90",
    "gpu": "NVIDIA H200",
    "uuid": "GPU-1",
    "nvml_index": 0,
    "nvml": "ok",
    "driver": "580.1",
    "sm_count": 132,
    "mig": False,
    "ecc": True,
    "power_cap_w": 700.0,
    "mps": False,
}
CODE = CodeDigest("ab" * 32, 4, "cubin")


def make(device=GPU, backend="humming", distributions=None, **other):
    versions = distributions or {"torch": "2.11", "humming-kernels": "0.1.19"}
    on = fingerprint.Dependencies(device, backend, versions, **{"code": CODE, **other})
    return fingerprint.environment(on)


def test_equal_nodes_share_evidence(tmp_path):
    library = tmp_path / "k.so"
    library.write_bytes(b"x")
    here = make(files=[library])
    other_gpu = GPU | {"uuid": "GPU-2", "nvml_index": 3}
    moved = tmp_path / "elsewhere" / "k.so"
    moved.parent.mkdir()
    shutil.copy(library, moved)
    there = make(other_gpu, files=[moved])
    assert here.fingerprint == there.fingerprint
    assert here.stamps != there.stamps
    assert len(here.fingerprint) == 64 and here.arch == "sm90"


def test_each_fact_of_the_device_counts():
    facts = GPU.keys() - {"uuid", "nvml_index", "nvml"}
    assert len({make(GPU | {key: "other"}).fingerprint for key in facts}) == len(facts)
    assert all(make(GPU | {key: "other"}).fingerprint != make().fingerprint for key in facts)


def test_versions_code_variables_and_more_count():
    prints = {
        make().fingerprint,
        make(backend="marlin").fingerprint,
        make(distributions={"torch": "2.12", "humming-kernels": "0.1.19"}).fingerprint,
        make(code="cd" * 32).fingerprint,
        make(code=None).fingerprint,
        make(variables={"CUDA_LAUNCH_BLOCKING": "1"}).fingerprint,
        make(variables={"HUMMING_COMPILER": "nvcc"}).fingerprint,
        make(extra={"cuda": "13.0"}).fingerprint,
    }
    assert len(prints) == 8


def test_only_variables_that_concern_the_backend_count():
    environ = {
        "FLASHINFER_ENABLE_PDL": "1",
        "HUMMING_CACHE_DIR": "/somewhere",
        "TORCHINDUCTOR_CACHE_DIR": "/somewhere",
        "FLASHINFER_WORKSPACE_BASE": "/somewhere",
        "HOME": "/root",
    }
    assert make(variables=environ).fingerprint == make().fingerprint
    everything = fingerprint.variables(environ | {"NVIDIA_TF32_OVERRIDE": "0"})
    assert everything == {"FLASHINFER_ENABLE_PDL": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    flashinfer = fingerprint.variables(environ, ["flashinfer-python"])
    assert flashinfer == {"FLASHINFER_ENABLE_PDL": "1"}


def test_without_a_code_digest_the_files_bytes_stand_in(tmp_path):
    library = tmp_path / "k.so"
    library.write_bytes(b"one")
    unknown = CodeDigest(None, 0, "no disassembler")
    before = make(code=unknown, files=[library])
    assert before.facts["code_how"] == "no disassembler"
    library.write_bytes(b"two")
    assert make(code=unknown, files=[library]).fingerprint != before.fingerprint


def test_the_order_things_are_named_in_does_not_matter(tmp_path):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(file.name.encode())
    one = make(code=None, files=files)
    other = make(dict(reversed(GPU.items())), code=None, files=files[::-1])
    assert one == other


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        make(files=[tmp_path / "gone.so"])


# -- hardware


def test_the_cpu_s_facts_are_the_same_each_time():
    facts = fingerprint.hardware(None)
    assert facts == fingerprint.hardware(None)
    assert facts["kind"] == "cpu" and facts["cores"] >= 1 and facts["cpu"]
    on = fingerprint.Dependencies(facts, "torch-dequant", {"torch": "2"})
    assert fingerprint.environment(on).arch == "cpu"


@pytest.fixture(scope="module")
def nvml(tmp_path_factory):
    """A driver library with two GPUs of its own, behind the real pynvml."""
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.mark.parametrize(
    ("which", "visible", "expected"),
    [
        (1, None, "Model B"),
        (0, "1,0", "Model B"),
        (0, "GPU-bb", "Model B"),
        ("GPU-bbbb", None, "Model B"),
        ("aaaa", "1", "Model A"),
        (5, None, None),
        (1, "0", None),
        ("GPU-cccc", None, None),
    ],
)
def test_a_gpu_is_found_by_index_or_uuid(nvml, which, visible, expected, monkeypatch):
    code = f"""
        import json
        from fp4tune.machine.hardware import hardware
        print(json.dumps(hardware({which!r})))
    """
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    worker = spawn(code, stdout=subprocess.PIPE, text=True)
    import json

    facts = json.loads(worker.communicate(timeout=30)[0])
    assert facts.get("gpu") == expected
    if expected:
        assert facts["ecc"] is True and facts["power_cap_w"] == 700
        assert facts["mig"] is None and facts["compute_mode"] is None  # it cannot say
    else:
        assert "does not know GPU" in facts["nvml"]


def test_without_the_module_the_facts_say_so(tmp_path, monkeypatch):
    """Where the import of pynvml fails: its own process is told where to look by sys.path."""
    (tmp_path / "pynvml.py").write_text("raise ImportError")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from fp4tune.machine.hardware import hardware
        print(hardware(0)["nvml"])
    """
    worker = spawn(code, stdout=subprocess.PIPE, text=True)
    assert "not installed" in worker.communicate(timeout=30)[0]


# -- machine code

SOURCE = """
#include <cstdio>
extern "C" __global__ void scale(float *x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = x[i] * FACTOR;
}
template <int N> __global__ void add(float *x) { x[threadIdx.x] += N + FACTOR; }
namespace { __global__ void local(float *x) { x[0] = FACTOR; } }
void launch(float *x) { add<3><<<1, 32>>>(x); local<<<1, 1>>>(x); }
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(factor, kind) -> a fresh build, in a folder of its own, of SOURCE."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("needs nvcc")

    def run(factor: str, kind: str) -> Path:
        place = tmp_path_factory.mktemp("build")
        (place / "kernel.cu").write_text(SOURCE)
        how = {
            "cubin": ["-cubin", "-arch=sm_90"],
            "so": ["-shared", "-Xcompiler=-fPIC", "-arch=sm_90", "-cudart=none"],
            "ptx.so": ["-shared", "-Xcompiler=-fPIC", "-cudart=none"]
            + ["-gencode=arch=compute_90,code=compute_90"],
            "both.so": ["-shared", "-Xcompiler=-fPIC", "-cudart=none"]
            + [
                f"-gencode=arch=compute_{a},code={b}"
                for a, b in ((80, "compute_80"), (100, "sm_100"))
            ],
        }[kind]
        command = [nvcc, *how, f"-DFACTOR={factor}", "-o", f"out.{kind}", "kernel.cu"]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
        return place / f"out.{kind}"

    return run


@pytest.fixture(scope="module")
def builds(build):
    """(kind, factor, nth) -> file."""
    return {
        (kind, factor, turn): build(factor, kind)
        for kind in ("cubin", "so")
        for factor, turn in (("2.5f", 0), ("2.5f", 1), ("2.75f", 0))
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cubin", "so"])
def test_the_same_source_built_twice_has_one_digest_and_another_source_another(builds, kind):
    if kind == "so" and not codedigest.disassembler():
        pytest.skip("needs cuobjdump")
    first, again, other = (builds[kind, f, t] for f, t in (("2.5f", 0), ("2.5f", 1), ("2.75f", 0)))
    digests = [codedigest.of(path) for path in (first, again, other)]
    assert [d.kernels for d in digests] == [3, 3, 3]
    assert digests[0].value == digests[1].value
    assert digests[0].value not in (None, digests[2].value)


@pytest.mark.slow
def test_a_library_holds_the_same_code_as_its_cubin(builds):
    if not codedigest.disassembler():
        pytest.skip("needs cuobjdump")
    cubin, library = (codedigest.of(builds[kind, "2.5f", 0]) for kind in ("cubin", "so"))
    assert cubin.value == library.value
    assert (cubin.how, library.how) == ("cubin", "cuobjdump")


def test_one_changed_instruction_changes_the_digest(builds, tmp_path):
    path = builds["cubin", "2.5f", 0]
    data = bytearray(path.read_bytes())
    section = next(elf.parse(bytes(data)).named(".text."))
    data[section.offset + 16] ^= 1
    changed = tmp_path / "changed.cubin"
    changed.write_bytes(data)
    assert codedigest.of(changed).value != codedigest.of(path).value


def test_files_count_whatever_their_order(builds):
    one, other = builds["cubin", "2.5f", 0], builds["cubin", "2.75f", 0]
    both = codedigest.combined([one, other])
    assert both == codedigest.combined([other, one]) and both.kernels == 6
    assert both.value != codedigest.of(one).value


@pytest.mark.slow
def test_a_file_without_machine_code_makes_the_whole_unknown(builds, build, tmp_path):
    cubin = builds["cubin", "2.5f", 0]
    text = tmp_path / "notes.so"
    text.write_text("no code here")
    short = tmp_path / "short.cubin"
    short.write_bytes(cubin.read_bytes()[:-200])
    empty = tmp_path / "empty.so"
    empty.touch()
    reasons = {text: "not an ELF", short: "cut off", empty: "empty", tmp_path / "no": "No such"}
    if codedigest.disassembler():
        reasons[build("2.5f", "ptx.so")] = "PTX only"
    for path, reason in reasons.items():
        found = codedigest.combined([cubin, path])
        assert found.value is None and reason in found.how and path.name in found.how


PTX, NATIVE = fatbin.Image(True, 80), fatbin.Image(False, 100)


def test_code_that_the_driver_compiles_is_that_driver_s(tmp_path):
    only_ptx = fatbins.library(tmp_path / "ptx.so", fatbins.made(PTX))

    def digest(sm: int, version: str) -> CodeDigest:
        return codedigest.combined([only_ptx], DriverCompiler(sm, version))

    first = digest(90, "580.1")
    assert first == digest(90, "580.1") and first.compiled == first.value is not None
    assert first.how == "PTX"
    assert len({first.value, digest(90, "590.2").value, digest(120, "580.1").value}) == 3
    for other in (digest(75, "580.1"), codedigest.of(only_ptx)):  # no GPU it can be compiled for
        assert other.value is None and "PTX only" in other.how
    changed = fatbins.library(tmp_path / "other.so", fatbins.made(PTX, content=b"another!"))
    assert codedigest.combined([changed], DriverCompiler(90, "580.1")) != first
    again = make(code=first), make(code=digest(90, "590.2"))
    assert again[0].fingerprint != again[1].fingerprint != make().fingerprint


@pytest.mark.slow
def test_ptx_beside_machine_code_counts_where_the_driver_compiles_it(build):
    if not codedigest.disassembler():
        pytest.skip("needs cuobjdump")
    library = build("2.5f", "both.so")
    plain = codedigest.of(library)

    def digest(sm: int, version: str = "580.1") -> CodeDigest:
        return codedigest.combined([library], DriverCompiler(sm, version))

    assert plain.value == digest(90).value == digest(100).value is not None
    assert digest(100) == digest(100, "590.2") and digest(100).compiled is None
    assert digest(90).compiled not in (None, digest(90, "590.2").compiled)
    prints = [make(code=digest(*on)).fingerprint for on in ((90,), (90, "590.2"), (100,))]
    assert len(set(prints)) == 3 and prints[2] == make(code=plain).fingerprint


def test_a_library_that_nobody_can_read_is_unknown_and_says_why(builds, monkeypatch):
    library = builds["so", "2.5f", 0]
    monkeypatch.setattr(codedigest, "disassembler", lambda: None)
    found = codedigest.of(library)
    assert found.value is None and "no disassembler" in found.how


def test_a_disassembler_that_hangs_or_fails_is_unknown(builds, monkeypatch, tmp_path):
    library = builds["so", "2.5f", 0]
    monkeypatch.setattr(codedigest, "TIMEOUT", 0.2)
    for body, reason in (("sleep 5", "longer than"), ("echo bad file >&2; exit 3", "bad file")):
        tool = tmp_path / "cuobjdump"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert codedigest.disassembler() == str(tool)
        found = codedigest.of(library)
        assert found.value is None and reason in found.how


def test_a_host_library_is_known_by_its_text(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    digests = []
    for turn, factor in enumerate((2, 2, 3)):
        place = tmp_path / str(turn)
        place.mkdir()
        (place / "host.c").write_text(f"int f(int x) {{ return x * {factor} + {factor}; }}")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", "host.so", "host.c"]
        subprocess.run(command, cwd=place, check=True)
        digests.append(codedigest.of(place / "host.so"))
    assert [d.how for d in digests] == ["host text"] * 3
    assert digests[0] == digests[1] != digests[2]


def interpreter() -> bytes:
    for name in (sys.executable, "/bin/sh"):
        data = Path(os.path.realpath(name)).read_bytes()
        if data[:4] == elf.MAGIC and len(data) < 1 << 23:
            return data
    return Path("/bin/sh").read_bytes()


DATA = interpreter()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(DATA) - 1))
def test_a_file_cut_off_anywhere_is_recognised(size):
    """A section table stands at the end of a linked file: no cut can leave it whole."""
    with pytest.raises(elf.BadElf):
        elf.parse(DATA[:size])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_strange_header_is_an_answer_or_a_bad_elf(changes):
    data = bytearray(DATA)
    for at, value in changes:
        data[at] = value
    try:
        found = elf.parse(data)
    except elf.BadElf:
        return
    assert all(0 <= s.offset + s.size <= len(data) for s in found.sections)


def test_a_walk_over_sections_finds_what_is_there():
    names = {s.name for s in elf.parse(DATA).sections}
    assert {".text", ".shstrtab"} <= names
    assert struct.unpack_from("<H", DATA, 18)[0] == elf.parse(DATA).machine
