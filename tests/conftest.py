"""What tests share: the `gpu` marker, one thread, and a state directory of their own."""

from __future__ import annotations

import os

# Several run at a time, each with processes of its own: threads that spin until there is work would
# take the cores from the others. Read when torch is loaded, here and in every worker.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from fp4tune.cache import reader

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("fp4tune", deadline=None)
settings.load_profile("fp4tune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """Thousands of small sums are slower on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """No test reads or writes the state of the machine it runs on, nor another test's quarantines,
    which hold for a whole process."""
    monkeypatch.setenv("FP4TUNE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(reader, "_own", ())
    monkeypatch.setattr(reader, "_readers", [])
    return tmp_path / "state"
