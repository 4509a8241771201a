"""The census: its library compiles and says why it sees nothing; what it saw becomes findings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verdicts import decide

from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache.rows import BucketKey, Evidence
from fp4tune.machine import codedigest, elf
from fp4tune.probes import census
from fp4tune.probes.census import Census, Kernel, Wait, code, kernels, rules, shim
from fp4tune.probes.census.attach import kernel as value_of
from fp4tune.probes.census.rules import Ran
from fp4tune.probes.census.shim import CannotSee, RawBlob, RawFunction, RawLaunch, Shim
from fp4tune.words import CENSUS

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


def headers_here() -> bool:
    try:
        return bool(shim.headers())
    except CannotSee:
        return False


needs_headers = pytest.mark.skipif(not headers_here(), reason="needs CUPTI's headers")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4TUNE_CACHE", str(tmp_path / "cache"))


# -- the library


@needs_gcc
@needs_headers
def test_the_library_compiles_once_and_loads():
    path = shim.compiled()
    before = path.stat().st_mtime_ns
    assert shim.compiled() == path and path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert Shim(path).counts() == shim.Counts(*(0,) * 10)


@needs_gcc
@needs_headers
def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP4TUNE_CACHE", str(tmp_path / "file"))
    assert Shim(shim.compiled()).counts().launches == 0


@needs_gcc
@needs_headers
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a driver")
def test_without_a_driver_it_says_so_in_one_sentence():
    try:
        real = shim.library()
    except CannotSee:
        pytest.skip("no libcupti here")
    loaded = Shim()
    with pytest.raises(CannotSee) as raised:
        loaded.open(real)
    assert str(raised.value) and "\n" not in str(raised.value)
    assert not loaded.is_open
    loaded.close()
    with pytest.raises(CannotSee, match="not subscribed"):
        loaded.watch(True)


@needs_gcc
@needs_headers
def test_a_libcupti_that_is_none_is_told():
    with pytest.raises(CannotSee, match="nowhere"):
        Shim().open("/nowhere/libcupti.so")


def test_missing_tools_are_told(monkeypatch):
    monkeypatch.setattr(shim.shutil, "which", lambda name: None)
    with pytest.raises(CannotSee, match="compiler"):
        shim.compiled()
    monkeypatch.setattr(shim.os.path, "isfile", lambda path: False)
    with pytest.raises(CannotSee, match="headers"):
        shim.headers()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_the_census_runs_and_is_empty():
    ran = []
    found = census.census(lambda: ran.append(1))
    assert ran == [1] and not found.kernels and found.source == census.NONE and found.notes


# What CUPTI would tell, told by a library of the same interface: events in a known order.
FAKE = r"""
#include <string.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cupti_callbacks.h>
#include <cupti_driver_cbid.h>
#include <cupti_runtime_cbid.h>
static CUpti_CallbackFunc tell; static char on[4][2048]; int subscribers;
CUptiResult cuptiSubscribe(CUpti_SubscriberHandle *s, CUpti_CallbackFunc f, void *u) {
  if (subscribers++) return CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED;
  *s = (CUpti_SubscriberHandle)1; tell = f; return CUPTI_SUCCESS; }
CUptiResult cuptiUnsubscribe(CUpti_SubscriberHandle s) { subscribers = 0; tell = 0; return 0; }
CUptiResult cuptiEnableCallback(uint32_t e, CUpti_SubscriberHandle s, CUpti_CallbackDomain d,
                                CUpti_CallbackId i) { on[d][i] = e; return CUPTI_SUCCESS; }
CUptiResult cuptiGetResultString(CUptiResult r, const char **t) { *t = "TOLD"; return 0; }
CUresult cuFuncGetParamInfo(CUfunction f, size_t i, size_t *o, size_t *s) {
  if (i > 1) return CUDA_ERROR_INVALID_VALUE;
  *o = 8 * i; *s = i ? 4 : 8; return CUDA_SUCCESS; }
static void api(int domain, int id, int enter, const void *params, const char *name, int result) {
  CUpti_CallbackData d; memset(&d, 0, sizeof d);
  d.callbackSite = enter ? CUPTI_API_ENTER : CUPTI_API_EXIT; d.functionParams = params;
  d.functionReturnValue = enter ? 0 : &result; d.symbolName = name;
  if (tell && on[domain][id]) tell(0, domain, id, &d); }
static void whole(int domain, int id, const void *params, const char *name, int result) {
  api(domain, id, 1, params, name, result); api(domain, id, 0, params, name, result); }
#define DRV CUPTI_CB_DOMAIN_DRIVER_API
#define RT CUPTI_CB_DOMAIN_RUNTIME_API
#define D(name) CUPTI_DRIVER_TRACE_CBID_##name
void load(const void *image, void *handle, void *function, const char *name) {
  void *module = handle; CUfunction got = function;
  struct { void **m; const void *image; } l = {&module, image};
  whole(DRV, D(cuModuleLoadData), &l, 0, 0);
  struct { CUfunction *f; void *m; const char *n; } g = {&got, handle, name};
  whole(DRV, D(cuModuleGetFunction), &g, 0, 0); }
void module_loaded(const char *cubin, size_t size) {
  CUpti_ModuleResourceData m; memset(&m, 0, sizeof m); m.cubinSize = size; m.pCubin = cubin;
  CUpti_ResourceData r; memset(&r, 0, sizeof r); r.resourceDescriptor = &m;
  if (on[3][CUPTI_CBID_RESOURCE_MODULE_LOADED])
    tell(0, CUPTI_CB_DOMAIN_RESOURCE, CUPTI_CBID_RESOURCE_MODULE_LOADED, &r); }
void launch_ex(void *function, int pdl, long long first, int second, int result) {
  CUlaunchAttribute a[3]; memset(a, 0, sizeof a);
  a[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  a[0].value.programmaticStreamSerializationAllowed = pdl;
  a[1].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION; a[1].value.clusterDim.x = 2;
  a[1].value.clusterDim.y = a[1].value.clusterDim.z = 1;
  a[2].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE; a[2].value.cooperative = 1;
  CUlaunchConfig c; memset(&c, 0, sizeof c);
  c.gridDimX = 7; c.gridDimY = 6; c.gridDimZ = 5; c.blockDimX = 128; c.blockDimY = c.blockDimZ = 1;
  c.sharedMemBytes = 99; c.attrs = a; c.numAttrs = 3;
  void *args[] = {&first, &second};
  struct { const CUlaunchConfig *c; void *f; void **p; void **e; } p = {&c, function, args, 0};
  whole(DRV, D(cuLaunchKernelEx), &p, 0, result); }
void launch_runtime(int inside) {
  struct { const void *f; dim3 g, b; void **a; size_t s; void *st; } p = {(void *)77};
  p.g.x = 3; p.g.y = p.g.z = 1; p.b.x = 32; p.b.y = p.b.z = 1;
  api(RT, CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000, 1, &p, "_Z4gemmPf", 0);
  if (inside) {
    struct { void *f; unsigned d[7]; void *s; void **p, **e; } k = {
      (void *)78, {3, 1, 1, 32, 1, 1}};
    whole(DRV, D(cuLaunchKernel), &k, "_Z4gemmPf", 0); }
  api(RT, CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000, 0, &p, "_Z4gemmPf", 0); }
void launch_named(int first) {
  void *args[] = {&first};
  struct { void *f; unsigned d[7]; void *s; void **p, **e; } k = {
      (void *)79, {1, 1, 1, 1, 1, 1}, 0, args};
  whole(DRV, D(cuLaunchKernel), &k, "named", 0); }
void launch_graph(void) { void *p[2] = {0, 0}; whole(DRV, D(cuGraphLaunch), p, 0, 0); }
"""

DRIVE = """
    import ctypes, json, sys
    from dataclasses import asdict
    from fp4tune.probes.census.shim import CannotSee, Shim

    path, cubin = sys.argv[1], open(sys.argv[2], "rb").read()
    fake = ctypes.CDLL(path)
    for name in ("load", "module_loaded", "launch_ex"):
        getattr(fake, name).argtypes = {
            "load": (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
            "module_loaded": (ctypes.c_char_p, ctypes.c_size_t),
            "launch_ex": (ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, *[ctypes.c_int] * 2),
        }[name]
    image = ctypes.create_string_buffer(cubin, len(cubin))
    shim = Shim()
    shim.open(path, 4 * len(cubin))
    try:
        Shim().open(path)  # the same library: already open
        fake.load(image, 1000, 500, b"gemm")
        fake.launch_ex(500, 1, 5, 6, 0)  # not watching yet
        shim.watch(True)
        fake.launch_ex(500, 1, 5, 6, 0)
        fake.launch_ex(500, 0, 5, 6, 0)
        fake.launch_ex(500, 1, 5, 7, 0)
        fake.launch_ex(500, 1, 5, 6, 1)  # the driver refused it
        fake.launch_runtime(1)
        fake.launch_runtime(0)
        fake.launch_named(5)
        shim.sizes("named", [4])
        fake.launch_named(5)
        fake.launch_named(6)
        fake.launch_named(5)
        fake.launch_graph()
        fake.module_loaded(image, len(cubin))
        for _ in range(9):
            fake.module_loaded(image, len(cubin))
        shim.watch(False)
        fake.launch_runtime(1)
        counts = asdict(shim.counts())
        launches = [asdict(each) for each in shim.launches()]
        functions = [asdict(each) for each in shim.functions()]
        blobs = [(b.seq, b.owner, b.loads, b.data == cubin) for b in shim.take_blobs()]
    finally:
        shim.close()
    left = ctypes.c_int.in_dll(fake, "subscribers").value
    shim.clear()
    out = dict(counts=counts, launches=launches, functions=functions, blobs=blobs, left=left)
    json.dump({**out, "cleared": shim.counts().launches}, sys.stdout)
"""


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> dict[bool, bytes]:
    """The same Triton kernel for SM90, with its wait and without."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    place = tmp_path_factory.mktemp("kernels")
    source = place / "census_kernels.py"
    source.write_text(
        textwrap.dedent(
            """
            import triton
            import triton.language as tl
            from triton.language.extra.cuda import gdc_wait

            @triton.jit
            def gemm(x, y, WAIT: tl.constexpr):
                if WAIT:
                    gdc_wait()
                at = tl.arange(0, 128)
                tl.store(y + at, tl.load(x + at) + 1)
            """
        )
    )
    sys.path.insert(0, str(place))
    try:
        import census_kernels
    finally:
        sys.path.remove(str(place))
    old = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(place / "cache")
    try:
        found = {}
        for wait in (True, False):
            made = compiler.compile(
                compiler.ASTSource(
                    census_kernels.gemm,
                    {"x": "*fp32", "y": "*fp32", "WAIT": "constexpr"},
                    {(2,): wait},
                ),
                target=GPUTarget("cuda", 90, 32),
            )
            found[wait] = made.asm["cubin"]
        return found
    finally:
        if old is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = old


@needs_gcc
@needs_headers
def test_events_are_recorded_once_with_their_attributes(tmp_path, cubins):
    (tmp_path / "fake.c").write_text(FAKE)
    (tmp_path / "a.cubin").write_bytes(cubins[False])
    includes = [part for folder in shim.headers() for part in ("-isystem", folder)]
    # One library stands for both, so that asking the driver is covered, too.
    for name in ("libcupti.so.13", "libcuda.so.1"):
        subprocess.run(
            [
                "gcc",
                "-shared",
                "-fPIC",
                "-w",
                *includes,
                "-o",
                tmp_path / name,
                tmp_path / "fake.c",
            ],
            check=True,
        )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVE), str(tmp_path / "libcupti.so.13"),
         str(tmp_path / "a.cubin")],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FP4TUNE_CACHE": str(tmp_path / "c")},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    launches = seen["launches"]
    assert [launch["name"] for launch in launches] == [
        *4 * ["gemm"],
        *2 * ["_Z4gemmPf"],
        *4 * ["named"],
    ]
    assert [launch["flags"] & 1 for launch in launches] == [1, 0, 1, 1] + 6 * [0]
    assert launches[0]["grid"] == [7, 6, 5] and launches[0]["block"] == [128, 1, 1]
    assert launches[0]["cluster"] == [2, 1, 1] and launches[0]["flags"] == 7
    assert launches[0]["shared"] == 99
    same, same_too, other = (launch["arguments"] for launch in launches[:3])
    assert same == same_too and same not in (None, other)
    assert [launch["result"] for launch in launches] == [0, 0, 0, 1] + 6 * [0]
    # Told of by both interfaces, and by the runtime's alone.
    assert [launch["via"] for launch in launches[4:6]] == [3, 2]
    assert launches[4]["grid"] == launches[5]["grid"] == [3, 1, 1]
    assert (seen["counts"]["driver"], seen["counts"]["runtime"]) == (9, 2)
    before, same, other, same_too = (launch["arguments"] for launch in launches[6:])
    assert before is None and same == same_too and same not in (None, other)
    assert seen["counts"]["graphs"] == 1
    (function,) = seen["functions"]
    assert (function["handle"], function["owner"], function["name"]) == (500, 1000, "gemm")
    assert seen["blobs"][0][1:] == [1000, True, True]
    assert len(seen["blobs"]) == 4 and seen["counts"]["lost_blobs"] == 7
    assert seen["left"] == 0 and seen["cleared"] == 0


# -- machine code


def launched(seq: int, function: int = 500, name: str = "gemm", flags: int = 1) -> RawLaunch:
    return RawLaunch(seq, function, 0, 1, (1, 1, 1), (32, 1, 1), (0, 0, 0), 0, 1, flags, 0, 0, name)


def book_of(*events) -> code.CodeBook:
    book = code.CodeBook()
    book.add(
        [e for e in events if isinstance(e, RawBlob)],
        [e for e in events if isinstance(e, RawFunction)],
    )
    return book


needs_nvdisasm = pytest.mark.skipif(
    codedigest.disassembler("nvdisasm") is None, reason="needs nvdisasm"
)


@needs_nvdisasm
def test_a_kernel_without_a_wait_is_told_from_one_with_it(cubins):
    for wait, cubin in cubins.items():
        book = book_of(RawBlob(0, 1000, True, cubin), RawFunction(1, 500, 1000, 1, "gemm"))
        kernel = value_of(launched(2), book)
        assert kernel.wait.status == ("wait-present" if wait else "no-wait")
        assert [f["kind"] for f in census.findings(Census((kernel,), census.CUPTI))] == (
            [] if wait else [census.PDL_WITHOUT_WAIT]
        )
        plain = value_of(launched(2, flags=0), book)
        assert not census.findings(Census((plain,), census.CUPTI))


@needs_nvdisasm
def test_modules_of_equal_names_are_told_apart_by_their_handles(cubins):
    book = book_of(
        RawBlob(0, 1000, True, cubins[True]),
        RawFunction(1, 500, 1000, 1, "gemm"),
        RawBlob(2, 2000, True, cubins[False]),
        RawFunction(3, 501, 2000, 1, "gemm"),
        # Unloaded, and its handles used again.
        RawBlob(10, 1000, True, cubins[False]),
        RawFunction(11, 500, 1000, 1, "gemm"),
    )
    first, second = value_of(launched(4), book), value_of(launched(5, 501), book)
    again = value_of(launched(12), book)
    assert first.digest != second.digest == again.digest
    assert [k.wait.status for k in (first, second, again)] == ["wait-present", "no-wait", "no-wait"]
    # Which of them an unknown handle means, nobody can say.
    stray = value_of(launched(13, 777), book)
    assert stray.digest is None and stray.wait.status == census.UNKNOWN
    assert not census.findings(Census((stray,), census.CUPTI))


def test_code_that_was_not_seen_is_unknown():
    kernel = value_of(launched(1), book_of(RawBlob(0, 1000, True, b"no code")))
    assert kernel.digest is None and kernel.wait.status == census.UNKNOWN and kernel.wait.how


def test_without_a_disassembler_the_wait_is_unknown_and_the_digest_known(cubins, monkeypatch):
    monkeypatch.setattr(codedigest, "disassembler", lambda tool="": None)
    book = book_of(RawBlob(0, 1000, True, cubins[False]), RawFunction(1, 500, 1000, 1, "gemm"))
    kernel = value_of(launched(2), book)
    assert kernel.digest and kernel.wait.status == census.UNKNOWN
    assert "disassembler" in kernel.wait.how


def test_a_census_has_one_digest_whatever_the_order(cubins, tmp_path):
    (tmp_path / "a.cubin").write_bytes(cubins[True])
    book = book_of(RawBlob(0, 9, True, cubins[True]))
    kernel = value_of(launched(1, name="gemm"), book)
    # The audit's digest of a file with this kernel alone.
    assert (
        Census((kernel, kernel), census.CUPTI).digest == codedigest.of(tmp_path / "a.cubin").value
    )


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("sm", [90, 120])
def test_sizes_of_parameters_are_read_from_the_cubin(sm, tmp_path):
    (tmp_path / "k.cu").write_text(
        "struct S { long a[20]; char c; };"
        "__global__ void kernel(float* x, S s, char c, int i, double* y) { "
        "x[i] = s.a[i] + *y + c; }"
        "__global__ void none() {}"
    )
    command = ["nvcc", "-cubin", f"-arch=sm_{sm}", "-o", tmp_path / "k.cubin", tmp_path / "k.cu"]
    subprocess.run(command, check=True, timeout=120)
    data = (tmp_path / "k.cubin").read_bytes()
    found = code.parameters(data, elf.parse(data))
    assert found == {"_Z6kernelPf1SciPd": (8, 168, 1, 4, 8), "_Z4nonev": ()}


# -- rules

M = (1, 16, 17)


def ran(tactic: str, bucket: int, *names: str, args: int | None = None, **more) -> Ran:
    launches = tuple(
        Kernel(
            name, (1, 1, 1), (32, 1, 1), 0, False, False, digest=f"d-{name}", arguments=args, **more
        )
        for name in names
    )
    return Ran(tactic, bucket, bucket, Census(launches, census.CUPTI))


def test_a_wait_that_comes_late_is_not_for_the_census_to_blame():
    late = Kernel("k", pdl=True, wait=Wait("access-before-wait", "LDG"))
    idle = Kernel("k2", pdl=True, wait=Wait("no-wait", None))
    unseen = Kernel("k3", pdl=None, wait=Wait("no-wait", "LDG"))
    assert not census.findings(Census((late, idle, unseen), census.CUPTI))
    bare = Kernel("k", pdl=True)
    (found,) = census.findings(Census((bare, bare), census.CUPTI), lambda k: Wait("no-wait", "LDG"))
    assert found["kind"] == "pdl without wait" and found["kernel"] == "k"


def test_a_tactic_that_takes_anothers_code_in_one_bucket_is_accused():
    _, accused = rules.alike(
        [
            ran("fast", 1, "tiles"), ran("slow", 1, "rows"),
            ran("fast", 16, "tiles"), ran("slow", 16, "rows"),
            ran("fast", 17, "rows"), ran("slow", 17, "rows"),
        ]
    )  # fmt: skip
    ((place, (found,)),) = accused.items()
    assert place == ("fast", 17) and found["kind"] == census.SILENT_FALLBACK
    assert found["other"] == "slow" and "rows" in found["message"]


def test_tactics_that_are_alike_everywhere_are_told_and_accused_only_by_their_arguments():
    same, accused = rules.alike([ran(t, m, "tiles") for t in ("one", "two") for m in M])
    assert not accused and same["one", 1] == ["two"] and same["two", 17] == ["one"]
    differ = [ran("one", 1, "tiles", args=1), ran("two", 1, "tiles", args=2)]
    assert not rules.alike(differ)[1]
    equal = [ran("one", 1, "tiles", args=1), ran("two", 1, "tiles", args=1)]
    assert list(rules.alike(equal)[1]) == [("two", 1)]


@pytest.mark.parametrize("name", rules.ANY_CODE)
def test_a_tactic_that_names_no_code_cannot_break_its_word(name):
    assert not rules.alike([ran(t, 1, "tiles", args=1) for t in (name, "two")])[1]


def test_code_that_was_not_seen_accuses_nobody():
    blind = [
        Ran(t, 1, 1, Census((Kernel("tiles", digest=None, arguments=1),), census.CUPTI))
        for t in ("one", "two")
    ]
    assert rules.alike(blind) == ({}, {})
    names_only = [Ran(t, 1, 1, Census((Kernel("k"),), census.PROFILER)) for t in ("one", "two")]
    assert rules.alike(names_only) == ({}, {})


def test_what_a_backend_says_of_its_kernels_is_held_against_it():
    seen = [ran("a", 1, "_Z10fast_tilesPf"), ran("a", 16, "_Z4rowsPf")]
    (found,) = rules.claimed(r"fast_tiles\(", seen)
    assert found["ms"] == [16] and "rows" in found["message"]
    assert not rules.claimed("rows|tiles", seen) and not rules.claimed(None, seen)
    with pytest.raises(ValueError, match="regular expression"):
        rules.claimed("(", seen)
    # Whoever keeps his word is not the one that fell back.
    both = [ran("one", 1, "tiles", args=1), ran("two", 1, "tiles", args=1)]
    assert list(rules.alike(both, kept=["two"])[1]) == [("one", 1)]
    assert not rules.alike(both, kept=["one", "two"])[1]


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=6),
)
def test_what_was_timed_must_have_been_checked(checked, timed):
    seen = ran("t", 1, *checked).census
    found = rules.timed([seen], ran("t", 1, *timed).census)
    assert bool(found) == bool(set(timed) - set(checked))
    # With the code unknown on one side, names decide.
    nameless = Census(tuple(Kernel(name) for name in timed), census.CUPTI)
    assert bool(rules.timed([seen], nameless)) == bool(set(timed) - set(checked))
    assert not rules.timed([Census((), census.NONE)], nameless)


@given(st.permutations(["a", "b", "b", "c"]))
def test_the_digest_of_a_census_does_not_depend_on_order_or_repetition(names):
    assert ran("t", 1, *names).census.digest == ran("t", 1, "a", "b", "c").census.digest


def test_names_are_readable():
    assert kernels.demangled("_Z4gemmPfi") in ("gemm(float*, int)", "_Z4gemmPfi")
    assert kernels.demangled("triton_kernel_0d1") == "triton_kernel_0d1"


# -- verdicts


def evidence(regime: str, status: str, launches: int = 0) -> Evidence:
    bucket = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 1, 128, 128)
    return Evidence("r", "f", "b", "t", bucket, regime, "exact", status, launches, launches, 24)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
def test_a_census_can_fail_a_verdict_and_never_makes_one(profile):
    good = [evidence(regime, "passed", 5) for regime in profile.required]
    for status in ("passed", "not applicable", "skipped"):
        judged = decide([*good, evidence(CENSUS, status)], profile)
        assert (judged.status, judged.launches) == ("safe", 5)
    judged = decide([*good, evidence(CENSUS, "failed")], profile)
    assert judged.status == "unsafe" and "census: failed" in judged.reasons
    assert decide([evidence(CENSUS, "passed")], profile).status != "safe"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_layer_without_a_gpu_has_an_empty_census():
    from fp4tune.probes.backends.torch.dequant import torch_dequant
    from fp4tune.probes.launch.item import Item
    from fp4tune.probes.problem import Device, Problem
    from fp4tune.probes.worker.census import checked, timed
    from fp4tune.probes.worker.session import OpenLayer

    problem = Problem("nvfp4", 32, 64, 64)
    layer = OpenLayer(torch_dequant(), Device("cpu"), problem, 1, 1 << 28, lambda _: None)
    (result,), seen = checked(layer, [Item((1, 2), "fp32")])
    assert not result["seen"] and not result["bad"] and result["detail"]["source"] == census.NONE
    assert "code" not in result["detail"] and result["detail"]["notes"]
    layer.open_timing([Item((2,), "fp32")], 1 << 10)
    assert timed(layer, seen) == [[]]
