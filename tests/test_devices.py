"""``--gpu`` and CUDA_VISIBLE_DEVICES name the GPUs that a CUDA program started here would see."""

from __future__ import annotations

import json
import subprocess

import fake_nvml
import pytest
from stores import spawn

SELECT = """
import json, os, sys
from fp4tune.machine import devices
answers = []
for visible, gpu in json.loads(sys.argv[1]):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        found = devices.select(gpu)
        answers.append([[t.label, t.name, t.device.arch, t.environment] for t in found])
    except devices.NoSuchDevice as error:
        answers.append(str(error))
print(json.dumps(answers))
"""

A, B = "GPU-aaaa", "GPU-bbbb"
# CUDA_VISIBLE_DEVICES, --gpu: the UUIDs selected, or what the refusal says
CASES = [
    (None, None, [A]),
    (None, "0", [A]),
    (None, "1", [B]),
    (None, "all", [A, B]),
    (None, "none", [""]),
    (None, "2", "no GPU 2: this machine shows 2"),
    (None, "-1", "'-1' is not the index of a GPU"),
    (None, "x", "'x' is not the index of a GPU"),
    (None, "", "'' is not the index of a GPU"),
    (None, "²", "is not the index of a GPU"),
    ("1", None, [B]),
    ("1,0", "all", [B, A]),
    ("1", "1", "no GPU 1: this machine shows 1"),
    (" 1 , 0 ", "all", [B, A]),
    ("GPU-b", None, [B]),
    ("GPU-bbbb,GPU-aaaa", "1", [A]),
    ("GPU-", "0", "hides every GPU"),  # names both, so neither
    ("0,7,1", "all", [A]),  # CUDA stops at the first that names nothing
    ("", None, [""]),
    ("", "0", "CUDA_VISIBLE_DEVICES hides every GPU; use --gpu none"),
    ("-1", "0", "hides every GPU"),
    ("NoDevFiles", "all", "hides every GPU"),
]


def select(cases, library=None) -> list:
    """Each case in one process that loads the driver library at `library`."""
    environ = {} if library is None else {"LD_LIBRARY_PATH": str(library)}
    prefix = ("env", *(f"{key}={value}" for key, value in environ.items()))
    asked = json.dumps([case[:2] for case in cases])
    other = spawn(SELECT, asked, prefix=prefix, stdout=subprocess.PIPE, text=True)
    return json.loads(other.communicate(timeout=60)[0])


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    found = select(CASES, fake_nvml.build(tmp_path_factory.mktemp("nvml")))
    return {case[:2]: answer for case, answer in zip(CASES, found, strict=True)}


@pytest.mark.parametrize(("visible", "gpu", "expected"), CASES)
def test_gpus_are_selected_as_cuda_numbers_them(answers, visible, gpu, expected):
    answer = answers[visible, gpu]
    if isinstance(expected, str):
        assert isinstance(answer, str) and expected in answer and "\n" not in answer
    else:
        assert [target[3]["CUDA_VISIBLE_DEVICES"] for target in answer] == expected


def test_a_target_carries_its_architecture_and_its_place(answers):
    assert [t[:3] for t in answers[None, "all"]] == [
        ["gpu-0", "Model A", "sm90"],
        ["gpu-1", "Model B", "sm120"],
    ]
    assert answers[None, "none"][0][2] == "cpu"
    # Renumbered: the worker sees it as the first of those that are visible.
    assert [t[0] for t in answers["1,0", "all"]] == ["gpu-0", "gpu-1"]


def test_a_driver_that_refuses_is_no_gpu_and_says_so(tmp_path):
    source = fake_nvml.SOURCE.replace(
        "int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; OK; }",
        "int nvmlDeviceGetCount_v2(unsigned *n) { return 999; }",
    )
    asked, default = select([(None, "0"), (None, None)], fake_nvml.build(tmp_path, source))
    assert "NVML failed" in asked and "--gpu none" in asked
    assert default[0][2] == "cpu"


def test_a_driver_without_a_gpu_is_told_apart(tmp_path):
    source = fake_nvml.SOURCE.replace("*n = 2; OK;", "*n = 0; OK;")
    (asked,) = select([(None, "0")], fake_nvml.build(tmp_path, source))
    assert "this machine has no GPU" in asked
