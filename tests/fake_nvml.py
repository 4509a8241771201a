"""A driver library of our own behind the real pynvml: two GPUs, of SM90 and SM120."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = """
#include <string.h>
#define OK return 0
int nvmlInit_v2(void) { OK; }
int nvmlInitWithFlags(unsigned f) { OK; }
int nvmlShutdown(void) { OK; }
const char *nvmlErrorString(int r) { return "a fake refusal"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
  if (i > 1) return 2;
  *d = (void *)(long)(i + 1); OK; }
int nvmlDeviceGetUUID(void *d, char *s, unsigned n) {
  strcpy(s, d == (void *)1 ? "GPU-aaaa" : "GPU-bbbb"); OK; }
int nvmlDeviceGetName(void *d, char *s, unsigned n) {
  strcpy(s, d == (void *)1 ? "Model A" : "Model B"); OK; }
int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) {
  *major = d == (void *)1 ? 9 : 12; *minor = 0; OK; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { strcpy(s, "580.1"); OK; }
int nvmlDeviceGetEccMode(void *d, unsigned *now, unsigned *then) { *now = 1; *then = 0; OK; }
int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *then) { return 3; }
int nvmlDeviceGetPowerManagementLimit(void *d, unsigned *mw) { *mw = 700000; OK; }
"""


def build(place: Path, source: str = SOURCE) -> Path:
    """`place`, with a libnvidia-ml.so.1 in it to be put on LD_LIBRARY_PATH."""
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    (place / "nvml.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-w", "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=place, check=True)
    return place
