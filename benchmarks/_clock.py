"""A wall clock that jumps, for the processes that are told so, and no other clock."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path

JUMPS = (-86400 * 30, -3600, -5, 0, 5, 3600, 86400 * 400)
"""Seconds that the clock is put forward or back by."""
_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
/* The wall clock, moved by as many seconds as the file says; all other clocks stay as they are. */
static volatile long *offset;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void start(void) {
  const char *path = getenv("FP4TUNE_BENCH_CLOCK");
  int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  real = dlsym(RTLD_NEXT, "clock_gettime");
  if (fd >= 0) offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, at);
  if (!failed && offset && offset != MAP_FAILED && clock == CLOCK_REALTIME) at->tv_sec += *offset;
  return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


def library(place: Path) -> Path | None:
    """A library to preload, made in `place`; None where there is no C compiler. libfaketime makes
    Python's sleep fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    (place / "clock.c").write_text(_SOURCE)
    made = place / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(made), str(place / "clock.c"), "-ldl"]
    return made if subprocess.run(command).returncode == 0 else None


def variables(made: Path, clock: Path) -> dict[str, str]:
    """What a process needs to live by the clock in the file `clock`."""
    return {"LD_PRELOAD": str(made), "FP4TUNE_BENCH_CLOCK": str(clock)}


def jump(clock: Path, seconds: int) -> None:
    """Put the clock by so many seconds, in place: whoever has the file mapped sees it at once."""
    if not clock.exists():
        clock.write_bytes(b"\0" * 4096)
    with open(clock, "r+b") as file:
        file.write(struct.pack("=q", seconds))


def somewhere(rng: random.Random) -> int:
    return rng.choice(JUMPS)
