"""Several devices at once: none waits for a bad one, and what they prove is the same tactic."""

from __future__ import annotations

from threading import Barrier, Lock
from types import SimpleNamespace

import pytest

from fp4tune.autotune import several_gpus
from fp4tune.autotune.agreement import Agreement
from fp4tune.autotune.verdict.buckets import MRange


def plans(*labels: str) -> list:
    return [SimpleNamespace(target=SimpleNamespace(label=label, name="H")) for label in labels]


def heard(labels: list[str]) -> tuple[dict, list]:
    said: list[tuple[str, str, str]] = []

    def listener(label: str):
        return lambda who, text: said.append((label, who, text))

    return {label: listener(label) for label in labels}, said


def test_probes_run_at_once_and_each_tells_its_own_progress(monkeypatch):
    together = Barrier(2, timeout=20)

    def probe(plan, ledger, state_dir, progress, agreement):
        together.wait()  # passes only if both are here
        progress("layer", plan.target.label)
        return plan.target.label

    monkeypatch.setattr(several_gpus, "probe", probe)
    progress, said = heard(["gpu-0", "gpu-1"])
    reports, failed = several_gpus.probe_all(plans("gpu-0", "gpu-1"), None, None, progress)
    assert (reports, failed) == (["gpu-0", "gpu-1"], {})
    assert sorted(said) == [("gpu-0", "layer", "gpu-0"), ("gpu-1", "layer", "gpu-1")]


def test_a_device_that_cannot_be_probed_does_not_stop_the_others(monkeypatch):
    def probe(plan, ledger, state_dir, progress, agreement):
        if plan.target.label == "gpu-0":
            raise RuntimeError("the driver is wedged")
        return plan.target.label

    monkeypatch.setattr(several_gpus, "probe", probe)
    progress, _ = heard(["gpu-0", "gpu-1"])
    reports, failed = several_gpus.probe_all(plans("gpu-0", "gpu-1"), None, None, progress)
    assert reports == ["gpu-1"]
    assert str(failed["gpu-0"]) == "the driver is wedged"


def test_where_none_can_be_probed_the_first_reason_is_raised(monkeypatch):
    def probe(plan, ledger, state_dir, progress, agreement):
        raise RuntimeError(plan.target.label)

    monkeypatch.setattr(several_gpus, "probe", probe)
    progress, _ = heard(["gpu-0", "gpu-1"])
    with pytest.raises(RuntimeError, match="gpu-0"):
        several_gpus.probe_all(plans("gpu-0", "gpu-1"), None, None, progress)


def test_an_interrupt_ends_every_probe(monkeypatch):
    ended: list[str] = []

    def probe(plan, ledger, state_dir, progress, agreement):
        try:
            while True:
                progress("layer", "going on")
        finally:
            ended.append(plan.target.label)

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(several_gpus, "probe", probe)
    monkeypatch.setattr(several_gpus, "wait", interrupted)
    progress = {label: lambda who, text: None for label in ("gpu-0", "gpu-1")}
    with pytest.raises(KeyboardInterrupt):
        several_gpus.probe_all(plans("gpu-0", "gpu-1"), None, None, progress)
    assert sorted(ended) == ["gpu-0", "gpu-1"]


def test_the_first_gpu_to_be_done_chooses_the_tactic_for_all():
    agreement = Agreement(Lock())
    one, two = MRange(1, 1), MRange(2, 2)
    every = {one: ["a", "b"], two: ["a", "b"]}
    assert agreement.settle("layer", {one: "a", two: "b"}, every) == {one: "a", two: "b"}
    assert agreement.settle("layer", {one: "b", two: "a"}, every) == {one: "a", two: "b"}
    assert agreement.settle("other layer", {one: "b"}, every) == {one: "b"}


def test_a_gpu_on_which_the_agreed_tactic_is_wrong_keeps_to_its_own():
    agreement = Agreement(Lock())
    one = MRange(1, 1)
    agreement.settle("layer", {one: "a"}, {one: ["a", "b"]})
    assert agreement.settle("layer", {one: "b"}, {one: ["b"]}) == {one: "b"}


def test_within_a_budget_all_gpus_try_backends_in_the_order_of_the_first():
    agreement = Agreement(Lock())
    one = MRange(1, 1)
    assert agreement.order("layer", one, ["a", "b", "c"]) == ["a", "b", "c"]
    assert agreement.order("layer", one, ["c", "b", "a"]) == ["a", "b", "c"]
    assert agreement.order("layer", one, ["d", "c", "a"]) == ["a", "c", "d"]
    assert agreement.order("other layer", one, ["c", "a"]) == ["c", "a"]
