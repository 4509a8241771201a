"""What other users report: it counts, and presses out nothing that others said."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import KNOWN, alone, ban, chosen, collect, drop, entry_for, place  # noqa: F401
from strangers import OTHER, STRANGER, as_user, shared_place  # noqa: F401
from test_quarantine import K, N

import fp4tune
from commands import call
from fp4tune.cache import dropbox, quarantine, quarantine_store, reader
from fp4tune.cache.errors import StateError


def test_files_by_the_thousand_press_nothing_out(place):  # noqa: F811
    ban("cutlass", place)
    box = place / dropbox.FOLDER

    def floods() -> None:
        for number in range(5000):
            (box / f"0{number}.json").touch()
        for number in range(300):
            drop(box, entry_for(f"invented-{number}"))

    as_user(floods)
    assert chosen(place) == "marlin"
    collect(place)
    assert chosen(place) == "marlin" and os.listdir(box) == []
    found, ignored = quarantine_store.read(quarantine_store.place(place))
    assert ignored == [] and len(found) <= 1 + quarantine.OF_ONE_USER


def test_an_id_is_its_owners(place):  # noqa: F811
    mine = ban("cutlass", place)
    harmless = {**mine.json(), "backend": "cudnn", "scope": "bucket", "m": 17}
    as_user(lambda: drop(place / dropbox.FOLDER, harmless))
    as_user(lambda: drop(place / dropbox.FOLDER, {**harmless, "id": mine.id + "x"}), OTHER)
    collect(place)
    found = {q.id: q.backend for q in quarantine_store.read(quarantine_store.place(place))[0]}
    assert found == {
        mine.id: "cutlass",
        f"u{STRANGER}.{mine.id}": "cudnn",
        f"u{OTHER}.{mine.id}x": "cudnn",
    }
    assert chosen(place) == "marlin"


def test_one_who_may_only_report_can_neither_write_nor_remove_nor_replace_the_store(place):  # noqa: F811
    entry = ban("cutlass", place)
    kept = quarantine_store.place(place)

    def attacks() -> None:
        for attack in (
            lambda: os.unlink(f"{kept}/{entry.id}.json"),
            lambda: os.rename(kept, f"{kept}-"),
            lambda: os.rename(f"{kept}/{entry.id}.json", f"{kept}/x.json"),
            lambda: Path(kept, "x.json").write_text("{}"),
            lambda: os.open(f"{kept}/{entry.id}.json", os.O_WRONLY),
            lambda: quarantine_store.lift(entry.id, kept),
            lambda: quarantine_store.write(entry, kept),
        ):
            with pytest.raises((OSError, StateError)):
                attack()

    as_user(attacks)
    assert chosen(place) == "marlin"
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o755


def test_a_report_acts_here_at_once_and_elsewhere_once_it_is_taken_up(place):  # noqa: F811
    def reports() -> None:
        told = fp4tune.report_fault("cutlass", 3, N, K, reason="NaN", state_dir=place)
        assert told.shared and told.shared.startswith(str(place / dropbox.FOLDER))
        assert chosen(place) == "marlin", "in this process at once"

    as_user(reports)
    assert chosen(place) == "cutlass"
    assert "as was reported" in collect(place)[0]
    assert chosen(place) == "marlin"
    (found,) = quarantine_store.read(quarantine_store.place(place))[0]
    assert found.id.startswith(f"u{STRANGER}.") and found.reason == "NaN"


def test_one_user_s_flood_does_not_press_out_another_s_report_or_the_users_own(place):  # noqa: F811
    box = place / dropbox.FOLDER
    as_user(lambda: drop(box, entry_for("cutlass", scope="layer")), OTHER)
    as_user(lambda: drop(box, entry_for("marlin", scope="layer")))

    def floods() -> None:
        for number in range(3000):
            drop(box, entry_for("cudnn", scope="bucket", m=number, n=number))

    as_user(floods)
    collect(place)
    found = quarantine_store.read(quarantine_store.place(place))[0]
    assert {q.backend for q in found if q.id.startswith(f"u{OTHER}.")} == {"cutlass"}
    wide = {q.backend for q in found if q.id.startswith(f"u{STRANGER}.") and q.scope == "backend"}
    assert wide == {"marlin", "cudnn"}, "what is over the quota reaches further, and not less far"
    assert reader.open(place).choose(3, N, K).status == "quarantined"
    before = sorted(os.listdir(quarantine_store.place(place)))
    as_user(floods)
    collect(place)
    assert sorted(os.listdir(quarantine_store.place(place))) == before, "and costs nothing more"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1000, 1003),
            st.sampled_from(["cutlass", "marlin", "made-up", "else"]),
            st.sampled_from(quarantine.SCOPES),
            st.integers(0, 90),
        ),
        max_size=400,
    )
)
def test_whatever_is_reported_nothing_reported_of_what_is_published_is_lost(reports):
    tally = quarantine.ReportTally(KNOWN)
    for user, backend, scope, at in reports:
        tally.add(user, quarantine.make(backend, quarantine.Reach(at, at, at, scope)))
    found = tally.entries()
    users = {user for user, *_ in reports}
    assert len(found) <= len(users) * (quarantine.OF_ONE_USER + len(KNOWN))
    assert len({q.id for q in found}) == len(found)
    for user, backend, _, at in reports:
        if backend not in KNOWN:
            continue
        row = {
            "backend": backend, "tactic": "t", "fingerprint": "f", "n": at, "k": at, "m_lo": at,
            "m_hi": at, "format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "groups": 1,
        }  # fmt: skip
        assert any(q.covers(row) and q.id.startswith(f"u{user}.") for q in found)


@pytest.mark.parametrize("harm", ["unreadable store", "unreadable file", "too many"])
def test_where_it_cannot_be_known_everything_is_taken_away(place, harm, monkeypatch):  # noqa: F811
    entry = ban("cudnn", place)
    kept = Path(quarantine_store.place(place))
    if harm == "unreadable store":
        kept.chmod(0o700)
    elif harm == "unreadable file":
        (kept / f"{entry.id}.json").chmod(0o600)
    else:
        monkeypatch.setattr(quarantine_store, "MOST", 2)
        for _ in range(3):
            ban("cudnn", place)

    def reads() -> None:
        assert reader.open(place).choose(3, N, K).status == "quarantined"

    as_user(reads)


def test_links_to_others_files_are_no_reports(place):  # noqa: F811
    box = place / dropbox.FOLDER
    entry = ban("cutlass", place)
    (box / f"{entry.id}.json").symlink_to(f"{quarantine_store.place(place)}/{entry.id}.json")
    os.mkfifo(box / "pipe.json")
    (box / "folder.json").mkdir()
    collect(place)
    assert len(os.listdir(quarantine_store.place(place))) == 1


def test_a_second_name_hides_no_report_and_puts_none_into_anothers_mouth(place):  # noqa: F811
    """A kernel without protected_hardlinks lets anyone link another's file."""
    box = place / dropbox.FOLDER
    as_user(lambda: drop(box, entry_for("cutlass")), OTHER)
    (report,) = box.iterdir()
    os.link(report, place / "kept by a stranger")
    collect(place)
    assert chosen(place) == "marlin"
    (found,) = quarantine_store.read(quarantine_store.place(place))[0]
    assert found.id.startswith("others.")


@pytest.mark.parametrize("to", ["the store", "a pipe", "itself", "everything"])
def test_what_a_stranger_puts_in_the_place_of_a_drop_box_is_none(
    place,  # noqa: F811
    shared_place,  # noqa: F811
    monkeypatch,
    to,
):
    (shared_place / "open").mkdir()
    (shared_place / "open").chmod(0o1777)
    box = shared_place / "open" / "box"
    monkeypatch.setenv(dropbox.VARIABLE, str(box))
    kept = quarantine_store.place(place)
    ban("cutlass", place)
    before = os.listdir(kept)
    as_user(
        lambda: (
            os.mkfifo(box)
            if to == "a pipe"
            else box.symlink_to({"the store": kept, "itself": box, "everything": "/"}[to])
        )
    )
    collect(place)
    assert os.listdir(kept) == before and chosen(place) == "marlin"
    box.unlink()
    monkeypatch.setenv(dropbox.VARIABLE, kept)
    collect(place)
    assert os.listdir(kept) == before, "nor is the store, though its owner names it"


def test_a_drop_box_is_gone_through_as_it_was_opened(place, shared_place):  # noqa: F811
    """Who owns it may put something else in its place meanwhile."""
    entry = ban("cutlass", place)
    box = shared_place / "box"
    box.mkdir()
    going = dropbox._Pass(str(box), quarantine_store.place(place))
    drop(box, entry.json())
    box.rename(shared_place / "away")
    box.symlink_to(quarantine_store.place(place))
    assert going.batch(True) == [] and len(going.batch(True)) == 1
    dropbox._take_up(str(place), [], frozenset())
    going.close()
    assert os.listdir(quarantine_store.place(place)) == [f"{entry.id}.json"]


def test_every_users_first_report_is_reached_before_the_second_of_one(place):  # noqa: F811
    box = place / dropbox.FOLDER
    as_user(lambda: [(box / f"{n}.json").touch() for n in range(3000)])
    as_user(lambda: drop(box, entry_for("cutlass")), OTHER)
    going = dropbox._Pass(str(box), quarantine_store.place(place))
    while not (found := going.batch(False)) and not going.ended:
        pass
    assert [user for user, _, _ in found] == [OTHER]
    going.close()


def test_a_folder_of_the_users_is_left_as_it_is_where_it_is_named_as_a_drop_box(
    place,  # noqa: F811
    shared_place,  # noqa: F811
    monkeypatch,
):
    box = shared_place / "documents"
    box.mkdir()
    (box / "letter.json").write_text("{}")
    (box / "letter").write_text("dear")
    monkeypatch.setenv(dropbox.VARIABLE, str(box))
    drop(box, entry_for("cutlass"))
    said = collect(place)
    assert any("chmod 1777" in each for each in said)
    assert sorted(os.listdir(box)) == ["letter", "letter.json"] and chosen(place) == "marlin"


def test_a_lift_that_would_not_last_says_so(place, shared_place, monkeypatch):  # noqa: F811
    as_user(lambda: drop(place / dropbox.FOLDER, entry_for("cutlass")))
    collect(place)
    (found,) = quarantine_store.read(quarantine_store.place(place))[0]
    assert call("quarantine", "lift", found.id, "--state", place).exit_code == 0
    assert chosen(place) == "cutlass"
    collect(place)
    assert chosen(place) == "cutlass", "what was taken up is not taken up again"


@pytest.mark.parametrize("owner", [0, STRANGER])
def test_a_spool_of_an_earlier_fp4tune_is_read_and_taken_over(place, owner):  # noqa: F811
    """Everyone could write to it, and whoever made it owns it."""
    kept = Path(quarantine_store.place(place))
    kept.mkdir()
    kept.chmod(0o1777)
    entry = quarantine.make("cutlass", quarantine.Reach(3, N, K), by="operator")
    quarantine_store.put(entry, str(kept))
    as_user(lambda: drop(kept, entry_for("marlin", id=entry.id + "x")), OTHER)
    for number in range(50):
        as_user(lambda number=number: (kept / f"0{number}.json").touch())
    os.chown(kept, owner, owner)
    assert chosen(place) == "cudnn"
    (said,) = [each for each in collect(place) if "could be written by others" in each]
    assert "keeps all 2" in said and chosen(place) == "cudnn"
    assert os.stat(kept).st_uid == 0 and stat.S_IMODE(os.stat(kept).st_mode) == 0o755
    assert {q.id for q in quarantine_store.read(str(kept))[0]} == {
        entry.id,
        f"u{OTHER}.{entry.id}x",
    }
