"""CUDA_VISIBLE_DEVICES is read as CUDA reads it: what an entry names, and where the list ends."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.machine.visible import Instance, NodeGpu, named, seen

HEX = "0123456789abcdef"
UUIDS = st.text(HEX, min_size=8, max_size=12)


@st.composite
def nodes(draw, mig=False) -> list[NodeGpu]:
    """A node in the order of its bus, of one model or of several."""
    uuids = draw(st.lists(UUIDS, min_size=1, max_size=8, unique=True))
    models = draw(st.lists(st.sampled_from([("H200", 90), ("B200", 100)]), min_size=1, max_size=2))
    gpus = []
    for index, uuid in enumerate(uuids):
        name, sm = models[index % len(models)]
        instances = None
        if mig and draw(st.booleans()):
            count = draw(st.integers(0, 3))
            instances = tuple(Instance(f"MIG-{uuid}-{i}", f"{name} MIG") for i in range(count))
        gpus.append(NodeGpu(f"GPU-{uuid}", name, sm, f"00000000:{index:02X}:00.0", instances))
    return gpus


def visible(gpus, variable=None, order=None) -> list[str]:
    environ = {"CUDA_VISIBLE_DEVICES": variable, "CUDA_DEVICE_ORDER": order}
    found = seen(gpus, {key: value for key, value in environ.items() if value is not None})
    return [uuid for uuid, _, _ in found.devices]


def entry(draw, gpus: list[NodeGpu], index: int) -> str:
    """One way to name a GPU."""
    uuid = gpus[index].uuid
    others = [gpu.uuid for gpu in gpus if gpu is not gpus[index]]
    enough = next(n for n in range(5, len(uuid) + 1)
                  if n == len(uuid) or not any(o.startswith(uuid[:n]) for o in others))  # fmt: skip
    cut = draw(st.integers(enough, len(uuid)))
    bare = uuid[4:cut]
    ways = [str(index), f"+{index}", f"{index}x", uuid, uuid[:cut]]
    if not bare.isdigit():
        ways.append(bare)
    return draw(st.sampled_from([" ", ""])) + draw(st.sampled_from(ways))


@settings(max_examples=40)
@given(nodes(), st.data())
def test_gpus_are_seen_in_the_order_they_are_named(gpus, data):
    chosen = data.draw(st.permutations(range(len(gpus))))
    chosen = chosen[: data.draw(st.integers(1, len(gpus)))]
    words = [entry(data.draw, gpus, index) for index in chosen]
    assert visible(gpus, ",".join(words)) == [gpus[index].uuid for index in chosen]


@settings(max_examples=40)
@given(nodes(), st.data(), st.sampled_from(["-1", "99", "", " ", "GPU-", "GPU-zz", "x", "MIG-a"]))
def test_the_list_ends_before_what_names_nothing(gpus, data, nothing):
    if nothing == "GPU-" and len(gpus) == 1:
        return  # the beginning of every UUID names the one there is
    before = data.draw(st.integers(0, len(gpus) - 1))
    words = [str(index) for index in range(before)] + [nothing, str(before)]
    assert visible(gpus, ",".join(words)) == [gpu.uuid for gpu in gpus[:before]]


@settings(max_examples=40)
@given(nodes(), st.data())
def test_a_gpu_that_is_named_twice_leaves_none(gpus, data):
    index = data.draw(st.integers(0, len(gpus) - 1))
    words = [entry(data.draw, gpus, index), entry(data.draw, gpus, index)]
    assert visible(gpus, ",".join(words)) == []


@settings(max_examples=40)
@given(nodes())
def test_without_a_list_all_are_seen_and_with_an_empty_one_none(gpus):
    assert visible(gpus) == [gpu.uuid for gpu in gpus]
    assert visible(gpus, "") == visible(gpus, "-1") == visible(gpus, "NoDevFiles") == []


@settings(max_examples=40)
@given(nodes(), st.data())
def test_an_index_counts_by_the_bus_and_is_certain_only_then(gpus, data):
    """NVML may list them in another order; the bus decides. Among models only CUDA knows."""
    shuffled = data.draw(st.permutations(gpus))
    index = data.draw(st.integers(0, len(gpus) - 1))
    assert visible(shuffled, str(index), "PCI_BUS_ID") == [gpus[index].uuid]
    of_one_kind = len({gpu.name for gpu in gpus}) == 1

    def certain(**environ: str) -> bool:
        return seen(gpus, environ).certain

    assert certain(CUDA_VISIBLE_DEVICES=str(index), CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert certain(CUDA_VISIBLE_DEVICES=gpus[index].uuid, CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert certain(CUDA_VISIBLE_DEVICES=str(index)) == certain() == of_one_kind


@settings(max_examples=40)
@given(nodes(mig=True), st.data())
def test_of_mig_instances_one_is_seen_and_nothing_beside_it(gpus, data):
    listed = data.draw(st.permutations(range(len(gpus))))
    found = visible(gpus, ",".join(map(str, listed)))
    expected = [
        uuid
        for index in listed
        for uuid in ([gpus[index].uuid] if gpus[index].instances is None
                     else [one.uuid for one in gpus[index].instances])
    ]  # fmt: skip
    instances = [uuid for uuid in expected if uuid.startswith("MIG-")]
    assert found == (instances[:1] or expected)
    for gpu in gpus:
        for one in gpu.instances or ():
            assert visible(gpus, one.uuid) == visible(gpus, f"{one.uuid},0") == [one.uuid]
            assert named(gpus, one.uuid) == one.uuid


@settings(max_examples=40)
@given(nodes(mig=True), st.text("0123456789abGPUMI-,+ x", max_size=30))
def test_whatever_the_list_says_what_is_seen_is_here_and_once(gpus, variable):
    found = visible(gpus, variable)
    here = [gpu.uuid for gpu in gpus]
    here += [one.uuid for gpu in gpus for one in gpu.instances or ()]
    assert len(found) == len(set(found)) <= variable.count(",") + 1 + 3
    assert set(found) <= set(here)
    assert found == visible(gpus, variable, "PCI_BUS_ID")
