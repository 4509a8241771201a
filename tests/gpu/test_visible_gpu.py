"""What CUDA itself shows under CUDA_VISIBLE_DEVICES is what is read from it without CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fp4tune.machine import driver, visible

pytestmark = pytest.mark.gpu

ASK = """
import ctypes, json, sys
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int(0)
found = []
if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
    for index in range(count.value):
        device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetUuid_v2(raw, device)
        text = bytes(raw).hex()
        cut = (0, 8, 12, 16, 20, 32)
        found.append("-".join(text[a:b] for a, b in zip(cut, cut[1:])))
print(json.dumps(found))
"""


def documented(uuids: list[str]) -> list[str | None]:
    """What CUDA's programming guide has: indices, UUIDs and their beginnings, the list's end."""
    first, last = uuids[0], uuids[-1]
    found: list[str | None] = [None, "", "-1", "0", "0,-1", "99", "0,99,0", first, f"{last},99"]
    if len(uuids) > 1:
        found += ["1", "1,0", "0,1", f"{last},{first}"]
    return found


def beyond(uuids: list[str]) -> list[str | None]:
    """What drivers make of other lists, by what has been reported of them."""
    first, last = uuids[0], uuids[-1]
    found: list[str | None] = [
        " ", "NoDevFiles", " 0 ", "+0", "0x", "0,", ",0", "0,0", f"{first},{first}", "GPU", "all",
        f"-1,{first}",
    ]  # fmt: skip
    if len(uuids) > 1:
        found += [f"1,{first}", f"{last},0", "1x,0y"]
    return found


@pytest.mark.parametrize("lists", [documented, beyond])
def test_cuda_shows_what_is_read_without_it(lists):
    """In a process each, since CUDA reads the variable once. All that differ are told at once."""
    node = visible.node(driver.ask("gpus"))
    differing = {}
    for variable in lists([gpu.uuid for gpu in node]):
        environ = {k: v for k, v in os.environ.items() if k != visible.DEVICES}
        environ[visible.ORDER] = visible.BY_BUS
        if variable is not None:
            environ[visible.DEVICES] = variable
        done = subprocess.run(
            [sys.executable, "-S", "-c", ASK], env=environ, capture_output=True, text=True
        )
        cuda = json.loads(done.stdout)
        ours = [uuid[4:] for uuid, _, _ in visible.seen(node, environ).devices]
        if cuda != ours:
            differing[str(variable)] = {"cuda": cuda, "here": ours}
    assert differing == {}


def test_the_driver_answers_all_that_is_asked():
    (first, *_) = driver.ask("gpus")
    facts, health = (driver.ask(name, first["uuid"]) for name in ("facts", "health"))
    assert facts["uuid"] == first["uuid"] and facts["driver"] and facts["memory_bytes"] > 1 << 30
    assert health["sm_mhz"] > 0 and health["temperature_c"] > 0 and health["slowed"] is not None
    look = driver.ask("look", first["uuid"])
    assert look["memory_used"] > 0 and isinstance(look["processes"], list)
    assert driver.ask("look", first["uuid"])["events"] == []
