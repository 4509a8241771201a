"""Advisories on a node: each file in its turn and in its time, whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from pathlib import Path

import fleets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import call

pytest.importorskip("fsspec")
pytest.importorskip("cryptography")

from fp4tune.cache import quarantine_store  # noqa: E402
from fp4tune.cache.errors import Corrupt  # noqa: E402
from fp4tune.errors import Refused  # noqa: E402
from fp4tune.fleet import adopt, advisories, signing, taken  # noqa: E402

NOW = time.time()


def advisory(name: str = "fast", **other) -> dict:
    return {
        "id": hashlib.sha256(name.encode()).hexdigest()[:16],
        "backend": name,
        "arch": "sm90",
        "gpu": "H200",
        "fingerprint": fleets.sha(name),
        "code": None,
        "classes": [{"kind": "unwritten", "regime": "streams", "data": "exact", "nodes": 3}],
        "profiles": [],
        "evidence": [{"regime": "streams", "data": "exact", "gpus": 8}],
        "choices_lost_nodes": 3,
        "text": f"{name}: suspect this build",
    } | other


def choice(**other) -> dict:
    return {
        "arch": "sm90", "gpu": "H200", "profile": "strict", "backend": "plain", "tactic": "default",
        "fingerprint": fleets.sha("plain"), "layout": "plain", "nodes": 3, **fleets.BUCKET,
    } | other  # fmt: skip


def document(serial: int = 1000, **other) -> dict:
    return {
        "format": advisories.FORMAT,
        "schema": advisories.VERSION,
        "fp4tune": "0.1",
        "serial": serial,
        "created": round(NOW, 3),
        "expires": round(NOW + 86400, 3),
        "store_digest": "0" * 64,
        "advisories": [advisory()],
        "suspect_gpus": [],
        "generation": {"number": 1, "stage": "promoted", "at": NOW, "choices": [choice()]},
        "key": None,
        "signature": None,
    } | other


@pytest.fixture
def node(tmp_path) -> Path:
    place = tmp_path / "state"
    place.mkdir()
    return place


@pytest.fixture
def key(tmp_path) -> tuple[Path, Path]:
    return fleets.key(tmp_path / "key")


def put(tmp_path: Path, content: dict, key: Path | None = None) -> Path:
    path = tmp_path / "advice.json"
    path.write_text(json.dumps(signing.sign(content, key) if key else content))
    return path


def everything(place: Path) -> dict[str, bytes]:
    """All that a state directory holds, but for locks."""
    return {
        str(p.relative_to(place)): p.read_bytes()
        for p in place.rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }


def test_a_signed_file_of_long_ago_undoes_nothing(node, tmp_path, key):
    """The one that was played again: five years old, signed, and once right."""
    private, public = key
    adopt.adopt(str(put(tmp_path, document(2000), private)), node)
    (identity,) = taken.load(node).quarantines
    assert call("quarantine", "lift", identity, "--state", node).exit_code == 0
    before = everything(node)
    old = NOW - 5 * 365 * 86400
    for replayed in (
        document(1000, created=old, expires=old + 86400, generation=None),
        document(1000, generation=None),  # dates alone are not what holds it
        {**document(1000), "schema": 1},
    ):
        path = put(tmp_path, replayed, private)
        result = call("import", path, "--keys", public, "--state", node)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert everything(node) == before


def test_numbers_grow_for_each_key_by_itself(node, tmp_path):
    keys = [fleets.key(tmp_path / name)[0] for name in ("one", "two")]
    adopt.adopt(str(put(tmp_path, document(2000), keys[0])), node)
    adopt.adopt(str(put(tmp_path, document(7), keys[1])), node)
    adopt.adopt(str(put(tmp_path, document(8), keys[1])), node)
    adopt.adopt(str(put(tmp_path, document(5), None)), node)
    for serial, signer in ((1999, keys[0]), (7, keys[1]), (4, None)):
        with pytest.raises(Refused, match=f"number {serial} "):
            adopt.adopt(str(put(tmp_path, document(serial), signer)), node)
    with pytest.raises(Refused, match="same number 8"):
        adopt.adopt(str(put(tmp_path, document(8, advisories=[]), keys[1])), node)


def test_what_has_expired_or_is_of_the_future_is_refused(node, tmp_path):
    day = 86400
    for created, expires, reason in (
        (NOW - 9 * day, NOW - 8 * day, "expired"),
        (NOW - day, NOW - 1, "expired"),
        (NOW + 3600, NOW + day, "look at both clocks"),
        (NOW - day, NOW - 2 * day, "not valid"),
        (NOW, NOW + 5 * 365 * day, "not valid"),
    ):
        path = put(tmp_path, document(created=created, expires=expires))
        with pytest.raises(Refused, match=reason):
            adopt.adopt(str(path), node)
    assert everything(node) == {}
    adopt.adopt(str(put(tmp_path, document(created=NOW + 60))), node)  # clocks differ a little


def test_taking_a_file_twice_changes_nothing(node, tmp_path):
    path = put(tmp_path, document())
    assert len(adopt.adopt(str(path), node)["quarantined"]) == 1
    before = everything(node)
    assert adopt.adopt(str(path), node)["quarantined"] == []
    assert everything(node) == before


def test_what_was_lifted_here_stays_lifted_until_asked_for(node, tmp_path):
    done = adopt.adopt(str(put(tmp_path, document(1))), node)
    (identity,) = done["quarantined"]
    assert call("quarantine", "lift", identity, "--state", node).exit_code == 0
    newer = put(tmp_path, document(2, advisories=[advisory(), advisory("slow")]))
    result = call("import", newer, "--state", node)
    assert result.exit_code == 0 and "was lifted here" in result.stdout
    assert "1 new quarantines" in result.stdout
    done = adopt.adopt(str(newer), node)
    assert done["quarantined"] == [] and done["lifted_here"] == [advisory()["id"]]
    result = call("import", newer, "--again", "--state", node, "--json")
    assert len(json.loads(result.stdout)["quarantined"]) == 1
    assert adopt.adopt(str(newer), node)["lifted_here"] == []


def test_a_quarantine_that_vanished_was_not_lifted(node, tmp_path):
    """Whoever removes files behind the program's back does not speak for the operator."""
    path = put(tmp_path, document())
    (identity,) = adopt.adopt(str(path), node)["quarantined"]
    (found,) = node.rglob(f"{identity}.json")
    found.unlink()
    assert len(adopt.adopt(str(path), node)["quarantined"]) == 1


def test_one_that_was_stopped_half_way_is_taken_whole_and_its_lift_holds(
    node, tmp_path, monkeypatch
):
    path = put(tmp_path, document(advisories=[advisory(), advisory("slow")]))
    real = adopt._quarantine
    with monkeypatch.context() as patched:

        def dies(entry, where):
            real(entry, where)
            raise KeyboardInterrupt

        patched.setattr(adopt, "_quarantine", dies)
        with pytest.raises(KeyboardInterrupt):
            adopt.adopt(str(path), node)
    (first,) = quarantine_store.read(quarantine_store.place(node))[0]
    assert len(adopt.adopt(str(path), node)["quarantined"]) == 1
    assert call("quarantine", "lift", first.id, "--state", node).exit_code == 0
    adopt.adopt(str(put(tmp_path, document(1001, advisories=[advisory(first.backend)]))), node)
    assert first.backend not in {
        q.backend for q in quarantine_store.read(quarantine_store.place(node))[0]
    }


def test_a_memory_that_is_damaged_is_not_taken_for_none(node, tmp_path):
    path = put(tmp_path, document())
    adopt.adopt(str(path), node)
    for damage in (b"", b"{}", b"[]", b'{"serials": {"": 3}, "quarantines": {}, "lifted": {}}'):
        (node / taken.FILE).write_bytes(damage)
        before = everything(node)
        with pytest.raises(Corrupt, match="to start anew"):
            adopt.adopt(str(path), node)
        assert everything(node) == before


# -- malformed ones

DEEP: list = []
for _ in range(900):
    DEEP = [DEEP]
BAD = [
    lambda d: d["advisories"].append(advisory("../x")),
    lambda d: d["advisories"].append(advisory("has\x1b[31m")),
    lambda d: d["advisories"].append(advisory("-dash")),
    lambda d: d["advisories"].append(advisory("x" * 129)),
    lambda d: d["advisories"].append(advisory(text="two\nlines")),
    lambda d: d["advisories"].append(advisory(fingerprint="short")),
    lambda d: d["advisories"].append(advisory(arch="../../etc")),
    lambda d: d["advisories"].append(advisory(profiles="strict")),
    lambda d: d["advisories"].append(advisory(more=1)),
    lambda d: d["advisories"].append({}),
    lambda d: d["advisories"].extend(advisory() for _ in range(advisories.MOST_ADVISORIES)),
    lambda d: d["suspect_gpus"].append({"device": 3, "node": "x"}),
    lambda d: d["generation"]["choices"].append(choice(m_lo=17)),
    lambda d: d["generation"]["choices"].append(choice(backend=None)),
    lambda d: d["generation"]["choices"].append(choice(n=1e400)),
    lambda d: d["generation"].update(stage="canary"),
    lambda d: d["generation"].update(stage="canary", percent=float("nan")),
    lambda d: d["generation"].update(number=True),
    lambda d: d.update(serial=True),
    lambda d: d.update(serial=-1),
    lambda d: d.update(serial=1 << 60),
    lambda d: d.update(created="now"),
    lambda d: d.update(schema=True),
    lambda d: d.update(schema=DEEP),
    lambda d: d["advisories"][0].update(evidence=DEEP),
    lambda d: d.update(extra=1),
    lambda d: d.pop("expires"),
    lambda d: d.update(key="0" * 64),
    lambda d: d.update(signature="0" * 128),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_malformed_file_changes_nothing_at_all(number, node, tmp_path):
    content = document()
    BAD[number](content)
    result = call("import", put(tmp_path, content), "--state", node)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert everything(node) == {}


def paths(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in items if isinstance(value, (dict, list)) else ():
        if isinstance(child, (dict, list)):
            yield from paths(child, (*at, name))
        else:
            yield (*at, name)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.just([]), st.just({}), st.just("x" * 5000), st.just(10**400),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_one_value_replaced_is_taken_or_refused_never_an_error(data):
    content = document()
    places = [p for p in paths(content) if p]
    place, odd = data.draw(st.sampled_from(places)), data.draw(ODD)
    changed = copy.deepcopy(content)
    inside = changed
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = odd
    try:
        found = advisories.checked_advice(changed)
    except advisories.Unfit as error:
        assert str(error).isprintable() and len(str(error)) < 300
        return
    for each in found.advisories:
        adopt._entry(each, each.fingerprint)  # whatever was let in can be quarantined


@pytest.mark.parametrize("name", ["advisories", "key", "generation"])
def test_a_number_without_a_spelling_is_refused(name):
    with pytest.raises(advisories.Unfit):
        advisories.checked_advice({**document(), name: float("inf")})


def test_a_pipe_or_an_endless_file_in_place_of_advice_is_refused(node, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero", "/dev/stdin", tmp_path):
        result = call("import", source, "--state", node)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert everything(node) == {}
