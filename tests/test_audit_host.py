"""Launches read from host code: which kernel is launched with which attributes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fp4tune.probes.audit import launch

pytest.importorskip("capstone")
CC = shutil.which("cc")
pytestmark = pytest.mark.skipif(not CC or not shutil.which("strip"), reason="needs a C compiler")

# The layout is that of cudaLaunchConfig_t and cudaLaunchAttribute (CUDA's driver_types.h).
SOURCE = r"""
typedef struct { int id; char pad[4]; union { char pad[64]; int flag; } val; } Attribute;
typedef struct { unsigned grid[3], block[3]; unsigned long shared; void* stream;
                 Attribute* attrs; unsigned numAttrs; } Config;
int cudaLaunchKernelExC(const Config*, const void*, void**);
int cudaLaunchKernel(const void*, unsigned long, unsigned, unsigned long, unsigned, void**,
                     unsigned long, void*);
int cudaFuncSetAttribute(const void*, int, int);
void** __cudaRegisterFatBinary(void*);
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*,
                            void*, int*);
__attribute__((noinline)) void gemm(void) { cudaLaunchKernel((void*)gemm, 1, 1, 1, 1, 0, 0, 0); }
__attribute__((noinline)) void gemv(void) { cudaLaunchKernel((void*)gemv, 1, 1, 1, 1, 0, 0, 0); }
static struct { int magic, version; void* data; void* name; } fatbin = {0x466243b1, 1, 0, 0};
__attribute__((constructor)) static void registers(void) {
  void** handle = __cudaRegisterFatBinary(&fatbin);
  __cudaRegisterFunction(handle, (char*)gemm, "_Z4gemmv", "_Z4gemmv", -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(handle, (char*)gemv, "_Z4gemvv", "_Z4gemvv", -1, 0, 0, 0, 0, 0);
}
HELPER int launches(const void* kernel, void** args, int pdl, void* stream, int other) {
  Config config = {{1, 1, 1}, {32, 1, 1}, 0, stream, 0, 0};
  Attribute attributes[2];
  attributes[0].id = other;
  attributes[0].val.flag = 1;
  attributes[1].id = 6;
  attributes[1].val.flag = FLAG;
  config.attrs = attributes;
  config.numAttrs = COUNT;
  return cudaLaunchKernelExC(&config, kernel, args);
}
int run(void** args, int pdl, void* stream) {
  cudaFuncSetAttribute((void*)gemm, 8, 1024);
  return launches((void*)gemm, args, pdl, stream, 4);
}
void plainly(void) { gemv(); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """`library(flag, count, *options)`: SOURCE as an object or, with -shared, a library."""
    folder = tmp_path_factory.mktemp("host")

    def made(flag: str, count: str, *options: str) -> Path:
        shared = "-shared" in options
        to = folder / f"{abs(hash((flag, count, options)))}.{'so' if shared else 'o'}"
        if not to.exists():
            helper = "__attribute__((noinline)) static" if "-DFAR" in options else "static inline"
            text = SOURCE.replace("FLAG", flag).replace("COUNT", count).replace("HELPER", helper)
            source = to.with_suffix(".c")
            source.write_text(text)
            kind = ["-shared"] if shared else ["-c"]
            more = [o for o in options if o not in ("-shared", "strip", "-DFAR")]
            subprocess.run([CC, "-w", "-fPIC", *kind, *more, "-o", to, source], check=True)
            if "strip" in options:
                subprocess.run(["strip", to], check=True)
        return to

    return made


@pytest.mark.parametrize(
    ("flag", "count", "pdl"),
    [
        ("1", "2", "yes"),
        ("0", "2", "no"),
        ("pdl", "2", "possible"),
        ("1", "1 + (pdl != 0)", "possible"),
        ("1", "1", "no"),
        ("1", "0", "no"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [("-O2",), ("-O0",), ("-O2", "-shared"), ("-O2", "-shared", "strip"), ("-O1", "-DFAR")],
    ids=" ".join,
)
def test_attributes_are_read_where_a_kernel_is_launched(flag, count, pdl, options, library):
    found = launch.of_host_code(library(flag, count, *options), ["_Z4gemmv", "_Z4gemvv"])
    assert found.pdl == pdl, found
    assert found.of("_Z4gemmv") == pdl
    assert found.of("_Z4gemvv") == "no", "launched plainly, and its address is given to nobody"


def test_a_kernel_whose_address_gets_away_is_not_cleared(tmp_path, library):
    text = Path(library("0", "2", "-O2")).with_suffix(".c").read_text()
    stored = text + "\nvoid* table[2] = {(void*)gemv, 0};\n"
    given = text + "\nvoid unseen(void*);\nvoid give(void) { unseen((void*)gemv); }\n"
    for source in (stored, given):
        (tmp_path / "k.c").write_text(source)
        subprocess.run(
            [CC, "-w", "-fPIC", "-O2", "-c", "-o", tmp_path / "k.o", tmp_path / "k.c"], check=True
        )
        found = launch.of_host_code(tmp_path / "k.o", ["_Z4gemmv", "_Z4gemvv"])
        assert found.of("_Z4gemvv") == "unknown" and found.of("_Z4gemmv") == "no"


def test_bytes_that_look_like_an_attribute_are_none(tmp_path):
    """A 6 and a 1 in the right distance, and no launch near them."""
    (tmp_path / "k.c").write_text(
        "int cudaLaunchKernelExC(void*, void*, void*);\n"
        "struct { long id, flag; } a;\n"
        "void f(void) { a.id = 6; a.flag = 1; }\n"
        "int g(void* c) { return cudaLaunchKernelExC(c, 0, 0); }\n"
    )
    subprocess.run([CC, "-O1", "-c", "-o", tmp_path / "k.o", tmp_path / "k.c"], check=True)
    found = launch.of_host_code(tmp_path / "k.o")
    assert found.pdl == "unknown", "the configuration comes from elsewhere"
