"""Published choices against the node as it is: withdrawn, refreshed, brought back, mended."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import fatbins
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4tune.autotune.publication import environment as checking
from fp4tune.autotune.publication import published
from fp4tune.autotune.publication.revalidate import revalidate
from fp4tune.cache import fingerprint, publish, reader, state
from fp4tune.cache.errors import Busy, Missing
from fp4tune.cache.ledger import Ledger
from fp4tune.cache.rows import BucketKey, Candidate, Choice
from fp4tune.daemon.mend import mend
from fp4tune.machine import codedigest, fatbin

CPU = {"kind": "cpu", "cpu": "Model C", "flags": ["avx"], "cores": 4, "machine": "x86_64"}
MACHINE = {"cpu": CPU}
BUCKET = BucketKey("nvfp4", "bf16", "bf16", 1, 1, 16, 4096, 2048)


def install(site: Path, name: str, version: str) -> Path:
    """The trace that an installer leaves of a distribution."""
    for old in site.glob(f"{name}-*.dist-info"):
        (old / "METADATA").unlink()
        old.rmdir()
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    metadata = folder / "METADATA"
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n")
    return metadata


def environment(backend: str, metadata: Path, version: str, files=(), variables=None):
    on = fingerprint.Dependencies(
        {**CPU, "threads": 2}, backend, {backend: version}, files, variables or {}, arch="cpu"
    )
    made = fingerprint.environment(on)
    return replace(made, stamps=(*made.stamps, fingerprint.stamp(metadata)))


def put(place: Path, site: Path, *versions: tuple[str, str], variables=None) -> int:
    """Publish backends as safe, the first as the choice."""
    choices, candidates, environments = [], [], []
    for rank, (backend, version) in enumerate(versions):
        found = environment(backend, install(site, backend, version), version, variables=variables)
        key = ("cpu", "Model C", "strict", BUCKET, backend, "default", "plain")
        print_ = found.fingerprint
        environments.append(found)
        candidates.append(
            Candidate(*key, "safe", rank, 10.0 + rank, launches=9, problems=9, fingerprint=print_)
        )
        if rank == 0:
            choices.append(Choice(*key, "safe", (), 10.0, 9, 9, fingerprint=print_))
    return publish.publish(place, choices, candidates, environments, {"runs": ["r"]})


def chosen(place: Path) -> tuple[str, str]:
    decision = reader.open(place).choose(8, 4096, 2048)
    return decision.backend, decision.status


def test_what_holds_is_left_alone(tmp_path):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"), ("torch-dequant", "2.0"))
    found = revalidate(tmp_path, MACHINE, {})
    assert (found.generation, dict(found.stale)) == (None, {})
    assert chosen(tmp_path) == ("fast", "safe")


def test_a_replaced_wheel_gives_its_place_to_the_next_that_holds(tmp_path):
    first = put(tmp_path, tmp_path / "site", ("fast", "1.0"), ("torch-dequant", "2.0"))
    install(tmp_path / "site", "fast", "1.1")
    found = revalidate(tmp_path, MACHINE, {})
    assert found.generation is not None and found.generation > first
    assert found.stale == {("Model C", "fast"): ("fast: 1.0, now 1.1",)}
    assert chosen(tmp_path) == ("torch-dequant", "safe")
    (fast,) = [c for c in found.stands.candidates if c.backend == "fast"]
    assert (fast.verdict, fast.rank) == ("inconclusive", None)
    assert fast.reasons == ("stale: fast: 1.0, now 1.1",) and checking.withdrawn(fast)
    assert found.stands.meta["runs"] == ["r"]
    assert revalidate(tmp_path, MACHINE, {}).generation is None, "it is withdrawn once"


def test_where_nothing_holds_the_answer_is_the_fallback(tmp_path):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    install(tmp_path / "site", "fast", "1.1")
    revalidate(tmp_path, MACHINE, {})
    assert chosen(tmp_path) == ("torch-dequant", "unproven")


def test_a_wheel_that_is_rolled_back_brings_its_choice_back(tmp_path):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"), ("torch-dequant", "2.0"))
    install(tmp_path / "site", "fast", "1.1")
    revalidate(tmp_path, MACHINE, {})
    install(tmp_path / "site", "fast", "1.0")
    found = revalidate(tmp_path, MACHINE, {})
    assert found.generation is not None and not found.stale
    assert chosen(tmp_path) == ("fast", "safe")


def test_what_was_found_unsafe_later_does_not_come_back_as_safe(tmp_path):
    site = tmp_path / "site"
    put(tmp_path, site, ("fast", "1.0"), ("torch-dequant", "2.0"))
    stands = published.load(tmp_path)
    unsafe = [
        replace(c, verdict="unsafe", rank=None) if c.backend == "fast" else c
        for c in stands.candidates
    ]
    floor = next(c for c in unsafe if c.backend == "torch-dequant")
    key = (floor.arch, floor.gpu, floor.profile, floor.bucket, floor.backend)
    choice = Choice(*key, "default", "plain", "floor", (), 11.0, 9, 9, floor.fingerprint)
    publish.publish(tmp_path, [choice], unsafe, stands.environments)
    install(site, "fast", "1.1")
    revalidate(tmp_path, MACHINE, {})
    install(site, "fast", "1.0")
    revalidate(tmp_path, MACHINE, {})
    (fast,) = [c for c in published.load(tmp_path).candidates if c.backend == "fast"]
    assert fast.verdict == "unsafe" and chosen(tmp_path) == ("torch-dequant", "safe")


def test_a_wheel_that_was_installed_again_is_no_change(tmp_path):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"), ("torch-dequant", "2.0"))
    metadata = install(tmp_path / "site", "fast", "1.0")
    os.utime(metadata, ns=(1, 1))
    assert chosen(tmp_path)[1] == "stale", "a reader cannot tell"
    found = revalidate(tmp_path, MACHINE, {})
    assert found.generation is not None and not found.stale
    assert chosen(tmp_path) == ("fast", "safe")


@pytest.mark.parametrize(
    ("machine", "environ", "said"),
    [
        ({"cpu": {**CPU, "cores": 2}}, {}, "cores: 4, now 2"),
        (MACHINE, {"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS: none, now 3"),
    ],
)
def test_hardware_and_variables_count(tmp_path, machine, environ, said):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    assert revalidate(tmp_path, machine, environ).stale == {("Model C", "fast"): (said,)}


def test_a_device_that_is_not_here_keeps_its_choices(tmp_path):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    install(tmp_path / "site", "fast", "1.1")
    assert revalidate(tmp_path, {"NVIDIA H200": {"kind": "cuda"}}, {}).generation is None


def test_compiled_files_are_compared_by_content(tmp_path):
    module = tmp_path / "module.bin"
    module.write_bytes(b"kernels")
    metadata = install(tmp_path / "site", "fast", "1.0")
    made = environment("fast", metadata, "1.0", [module])
    module.unlink()
    module.write_bytes(b"kernels")
    again = checking.compare_with_now(made, MACHINE, {})
    assert again is not None and again.changes == ()
    assert not checking.moved([again.environment])
    module.write_bytes(b"others!")
    again = checking.compare_with_now(made, MACHINE, {})
    assert again is not None and again.changes == ("the compiled code is another",)
    module.unlink()
    assert checking.compare_with_now(made, MACHINE, {}).changes


def test_ptx_is_compared_as_the_driver_here_compiles_it(tmp_path):
    gpu = {"kind": "cuda", "gpu": "GPU G", "driver": "580.1"}
    module = fatbins.library(tmp_path / "module.so", fatbins.made(fatbin.Image(True, 80)))
    code = codedigest.combined([module], codedigest.compiler(90, gpu))
    on = fingerprint.Dependencies(gpu, "fast", {}, [module], code=code, arch="sm90")
    made = fingerprint.environment(on)

    def changes(driver: str = "580.1") -> tuple[str, ...]:
        again = checking.compare_with_now(made, {"GPU G": {**gpu, "driver": driver}}, {})
        assert again is not None
        return again.changes

    assert changes() == ()
    assert changes("590.2") == (
        "driver: 580.1, now 590.2",
        "the compiled code is another",
        "the code that the driver compiles is another",
    )
    fatbins.library(module, fatbins.made(fatbin.Image(True, 80)))
    assert changes() == ()  # written again, and the same
    fatbins.library(module, fatbins.made(fatbin.Image(True, 80), content=b"another!"))
    assert "the code that the driver compiles is another" in changes()


NAMES = st.sampled_from(["torch", "fast", "flashinfer-python"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.floats(0, 1e3), st.text("ab"))


@given(
    device=st.dictionaries(st.text("abc", min_size=1), VALUES),
    versions=st.dictionaries(NAMES, st.text("0123.", min_size=1)),
    extra=st.dictionaries(st.text("xy", min_size=1), VALUES),
)
def test_an_environment_put_together_again_has_its_fingerprint(device, versions, extra):
    device = {**device, "kind": "cpu"}
    on = fingerprint.Dependencies(device, "fast", versions, extra=extra, arch="cpu")
    made = fingerprint.environment(on)
    again = checking.compare_with_now(made, {"cpu": device}, {})
    assert (
        again is not None
        and again.changes == ()
        and fingerprint.of(made.facts) == (made.fingerprint)
    )


# -- mending


def test_a_choices_db_that_is_gone_or_damaged_is_put_back_or_published_again(tmp_path):
    first = put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    target = tmp_path / state.CHOICES
    kept = Path(state.generation_file(str(tmp_path), first))

    def damage(path: Path) -> None:
        path.chmod(0o644)
        os.truncate(path, 5000)

    harms = (target.unlink, partial(damage, target), lambda: (damage(target), damage(kept)))
    for harm, generation in zip(harms, (first, first, first + 1), strict=True):
        harm()
        assert "gone or damaged" in mend(tmp_path)[0]
        assert chosen(tmp_path) == ("fast", "safe")
        assert reader.open(tmp_path).generation == generation
    assert mend(tmp_path) == []


def test_a_generation_is_kept_by_a_link_where_there_is_no_room_for_a_copy(tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(publish.shutil, "copyfile", full)
    number = put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    kept = Path(state.generation_file(str(tmp_path), number))
    assert kept.samefile(tmp_path / state.CHOICES)
    (tmp_path / state.CHOICES).unlink()
    assert publish.restore(tmp_path) == number and chosen(tmp_path) == ("fast", "safe")
    assert not list(tmp_path.glob(f".{state.CHOICES}.*"))


def test_a_damaged_ledger_is_moved_aside_and_nothing_is_lost(tmp_path):
    first = put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    (tmp_path / state.LEDGER).write_bytes(b"nothing that SQLite knows" * 100)
    (said,) = mend(tmp_path)
    (aside,) = tmp_path.glob("ledger.db.damaged-*")
    assert aside.name in said and aside.read_bytes().startswith(b"nothing")
    assert chosen(tmp_path) == ("fast", "safe")
    (tmp_path / state.CHOICES).unlink()
    assert "was put back" in mend(tmp_path)[0], "the new ledger has no generation"
    assert chosen(tmp_path) == ("fast", "safe") and reader.open(tmp_path).generation == first


def test_an_older_generation_is_published_under_a_higher_number(tmp_path):
    put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    last = put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    (tmp_path / state.LEDGER).unlink()
    for path in (tmp_path / state.CHOICES, Path(state.generation_file(str(tmp_path), last))):
        os.truncate(path, 5000)
    assert "the kept 1 is 3 now" in mend(tmp_path)[0]
    assert reader.open(tmp_path).choose(8, 4096, 2048).recorded_backend == "fast"


def test_a_choices_db_is_put_back_on_a_full_disk_and_while_nobody_publishes(tmp_path):
    number = put(tmp_path, tmp_path / "site", ("fast", "1.0"))
    assert publish.restore(tmp_path) is None
    (tmp_path / state.CHOICES).unlink()
    with state.exclusive(state.lock_file(tmp_path, "publish")), pytest.raises(Busy):
        publish.restore(tmp_path)
    assert publish.restore(tmp_path) == number
    assert chosen(tmp_path) == ("fast", "safe")


def test_an_empty_state_needs_no_mending(tmp_path):
    assert mend(tmp_path) == []
    with pytest.raises(Missing):
        revalidate(tmp_path, MACHINE, {})
    Ledger.open(tmp_path, readonly=True).close()
