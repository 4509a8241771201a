"""A weight's layout is chosen once for all m, by expected time, of those that are safe at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune.choice import layouts, traffic
from fp4tune.autotune.choice.rank import choices
from fp4tune.autotune.publication import publish as publication
from fp4tune.autotune.publication import published
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.cache import publish, reader
from fp4tune.cache.measured import NOISE
from fp4tune.cache.rows import BucketKey, Candidate, Environment
from fp4tune.probes.problem import Problem
from fp4tune.report import documents

RANGES = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8))
ENVIRONMENT = Environment("e" * 64, "any", "sm90", {"distributions": {}, "code": "ab"})


def candidates(times, profile="strict", activation="bf16", n=256, **verdicts):
    """One candidate a bucket and backend: `times` is backend -> (layout, microseconds by m_hi)."""
    found = []
    for backend, (layout, by_m) in times.items():
        for lo, hi in RANGES:
            if hi and hi not in by_m:
                continue
            found.append(
                Candidate(
                    "sm90", "H200", profile,
                    BucketKey("nvfp4", activation, "bf16", 1, lo, hi, n, 512),
                    backend, "default", layout, verdicts.get(f"{backend}_{hi}", "safe"),
                    median_us=by_m.get(hi), lo_us=by_m.get(hi), hi_us=by_m.get(hi),
                    launches=9, problems=9, fingerprint=ENVIRONMENT.fingerprint,
                )
            )  # fmt: skip
    return choices(found, None)[1]


def flat(us):
    return dict.fromkeys((1, 2, 4, 8), us)


TWO = {
    "early": ("left", {1: 10.0, 2: 10.0, 4: 100.0, 8: 100.0}),
    "late": ("right", {1: 100.0, 2: 100.0, 4: 10.0, 8: 10.0}),
    "torch-dequant": ("plain", flat(500.0)),
}


@pytest.mark.parametrize(("weights", "layout"), [({1: 9, 8: 1}, "left"), ({1: 1, 8: 9}, "right")])
def test_the_distribution_of_m_decides(weights, layout):
    found = layouts.compare(candidates(TWO), traffic.traffic_of("mine", weights))
    assert found.layout == layout
    assert found.covered == pytest.approx(1)
    assert found.layer_us == pytest.approx(0.9 * 10 + 0.1 * 100)
    assert found.row().expected_us == found.layer_us


def test_a_layout_stands_with_the_best_safe_candidate_of_each_bucket():
    times = {**TWO, "also-left": ("left", {1: 50.0, 2: 50.0, 4: 20.0, 8: 20.0})}
    found = layouts.compare(
        candidates(times, early_1="unsafe"), traffic.traffic_of("t", {1: 1, 4: 1})
    )
    (left,) = [fit for fit in found.fits if fit.layout == "left"]
    assert [(p.m_hi, p.backend, p.median_us) for p in left.parts] == [
        (1, "also-left", 50.0),
        (4, "also-left", 20.0),
    ]
    assert left.expected_us == pytest.approx(35)


def test_a_layout_with_nothing_safe_at_some_m_does_not_compete_even_without_traffic_there():
    found = layouts.compare(candidates(TWO, early_8="unsafe"), traffic.traffic_of("t", {1: 1}))
    assert found.layout == "right"
    (left,) = [fit for fit in found.fits if fit.layout == "left"]
    assert left.holes == ((5, 8),) and left.expected_us is None


def test_an_m_beyond_what_was_probed_counts_for_nothing_and_is_told():
    found = layouts.compare(candidates(TWO), traffic.traffic_of("t", {1: 1, 4096: 3}))
    assert found.covered == pytest.approx(0.25)
    assert found.layer_us == pytest.approx(10)
    nothing = layouts.compare(candidates(TWO), traffic.traffic_of("t", {4096: 1}))
    assert nothing.layout is None and "no m of the traffic" in nothing.reason


def test_a_reference_line_is_no_layout():
    rows = candidates({**TWO, "resident": ("dense", flat(1.0))})
    why = ("a reference line, never chosen",)
    rows = [
        replace(c, verdict="inconclusive", reasons=why) if c.backend == "resident" else c
        for c in rows
    ]
    found = layouts.compare(rows, traffic.traffic_of("t", {1: 1}))
    assert "dense" not in {fit.layout for fit in found.fits}


def test_within_the_noise_the_name_decides_and_what_stands_needs_3_per_cent():
    t = traffic.traffic_of("t", {1: 1})
    near = {"x": ("zeta", flat(100.0)), "y": ("alpha", flat(101.0))}
    assert layouts.compare(candidates(near), t).layout == "alpha"
    assert layouts.compare(candidates(near), t, stands="zeta").layout == "zeta"
    better = {"x": ("zeta", flat(96.9)), "y": ("alpha", flat(100.0))}
    assert layouts.compare(candidates(better), t, stands="alpha").layout == "zeta"
    kept = {"x": ("zeta", flat(97.1)), "y": ("alpha", flat(100.0))}
    assert layouts.compare(candidates(kept), t, stands="alpha").layout == "alpha"
    gone = layouts.compare(candidates(kept, y_2="unsafe"), t, stands="alpha")
    assert gone.layout == "zeta"


times = st.fixed_dictionaries(
    {name: st.floats(1, 50) for name in ("alpha", "beta", "gamma", "torch-dequant")}
)


@given(times, st.randoms(), st.sampled_from(["decode", "mixed"]))
def test_every_rank_chooses_the_same_and_never_more_than_the_noise_slower(each, random, name):
    rows = candidates({b: (f"of-{b}", flat(us)) for b, us in each.items()})
    found = layouts.compare(rows, traffic.BUILTIN[name])
    random.shuffle(rows)
    assert layouts.compare(rows, traffic.BUILTIN[name]) == found
    fastest = min(fit.expected_us for fit in found.fits)
    assert found.layer_us <= fastest * (1 + NOISE) * (1 + 1e-9)
    assert all(fit.lo_us <= fit.expected_us * (1 + 1e-9) for fit in found.fits)


def compared(activation, us, profile="sglang", quantiser=None, **verdicts):
    rows = candidates({"one": ("only", flat(us))}, profile, activation, **verdicts)
    return layouts.compare(rows, traffic.traffic_of("t", {1: 1, 8: 1}), None, quantiser)


def test_w4a4_is_not_compared_while_its_quantiser_has_no_time():
    wide, narrow = compared("bf16", 100.0), compared("fp4", 1.0)
    assert narrow.layout == "only" and narrow.layer_us is None
    assert narrow.row().expected_us is None
    crossing = layouts.across(wide, narrow, PROFILES["sglang"])
    assert crossing.activation is None and layouts.NO_QUANTISER in crossing.reason


def test_with_a_quantiser_time_the_faster_layer_wins_where_the_profile_crosses():
    wide = compared("bf16", 100.0)
    fast = compared("fp4", 50.0, quantiser={1: 10.0, 8: 20.0})
    assert fast.layer_us == pytest.approx(65)
    assert layouts.across(wide, fast, PROFILES["vllm"]).activation == "fp4"
    slow = compared("fp4", 50.0, quantiser={1: 60.0, 8: 60.0})
    assert layouts.across(wide, slow, PROFILES["vllm"]).activation == "bf16"
    strict = layouts.across(wide, fast, PROFILES["strict"])
    assert strict.activation is None and "accuracy" in strict.reason
    part = compared("fp4", 50.0, quantiser={1: 10.0})
    assert layouts.across(wide, part, PROFILES["vllm"]).activation is None


# -- traffic


@given(st.dictionaries(st.integers(1, 65536), st.floats(0, 1e300), min_size=1))
def test_shares_add_up_and_survive_the_store(weights):
    if not any(weights.values()):
        with pytest.raises(ValueError, match="no weight is above 0"):
            traffic.traffic_of("t", weights)
        return
    found = traffic.traffic_of("t", weights)
    assert sum(share for _, share in found.weights) == pytest.approx(1)
    document = json.loads(json.dumps(found.json()))
    again = layouts.traffics_of({"traffic": {"strict": document}})["strict"]
    assert again.name == "t"
    assert dict(again.weights) == pytest.approx(dict(found.weights))


def test_a_file_is_json_or_toml(tmp_path):
    one, two = tmp_path / "chat.json", tmp_path / "chat.toml"
    one.write_text('{"weights": {"1": 30, "512": 10}}')
    two.write_text('name = "night"\n[weights]\n1 = 3\n512 = 1\n')
    assert traffic.find(str(one)).weights == ((1, 0.75), (512, 0.25))
    assert traffic.find(str(one)).name == "chat"
    assert traffic.find(str(two)).name == "night"
    assert traffic.find(str(two)).weights == traffic.find(str(one)).weights
    assert traffic.find("decode") is traffic.BUILTIN["decode"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"weights": {"0": 1}}', "not one from 1"),
        ('{"weights": {"1.5": 1}}', "not one from 1"),
        ('{"weights": {"1": -1}}', "negative or not finite"),
        ('{"weights": {"1": Infinity}}', "negative or not finite"),
        ('{"weights": {"1": true}}', "is not a number"),
        ('{"weights": {"1": "2"}}', "is not a number"),
        ('{"weights": {"1": 1, "1": 2}}', "twice"),
        ('{"weights": {"1": 1, "01": 2}}', "twice"),
        ('{"weights": {}}', "one m or more"),
        ('{"weights": [1]}', "one m or more"),
        ('{"weight": {"1": 1}}', "'weight' is not a key"),
        ("[]", "no JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, says):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        traffic.find(str(path))
    assert "\n" not in str(error.value)
    done = CliRunner().invoke(cli.app, ["probe", "--gpu", "none", "--traffic", str(path)])
    assert done.exit_code == 2 and "Traceback" not in done.output


# -- published


def put(place, times=TWO, weights=None, **verdicts):
    """Publish as a probe does, under a traffic where one is given."""
    rows = candidates(times, **verdicts)
    stands = published.usable(place)
    meta = {k: v for k, v in stands.meta.items() if k not in publish.RESERVED}
    if weights:
        meta["traffic"] = {"strict": traffic.traffic_of("mine", weights).json()}
    fresh = replace(stands, meta=meta)
    return publication.republish(place, fresh, rows, [ENVIRONMENT])


def test_the_reader_tells_the_layout_and_the_best_inside_it(tmp_path):
    put(tmp_path, weights={1: 1, 8: 9})
    choices_ = reader.open(tmp_path)
    assert choices_.layout(256, 512) == "right"
    assert choices_.layout(257, 512) is None
    assert choices_.choose(1, 256, 512).backend == "early"
    inside = choices_.choose(1, 256, 512, layout=choices_.layout(256, 512))
    assert (inside.backend, inside.status) == ("late", "safe")


def test_a_traffic_stays_until_another_is_given(tmp_path):
    put(tmp_path, weights={1: 1, 8: 9})
    put(tmp_path)
    assert reader.open(tmp_path).layout(256, 512) == "right"
    put(tmp_path, weights={1: 1})
    assert reader.open(tmp_path).layout(256, 512) == "left"


def test_a_layout_that_stands_is_not_replaced_for_2_per_cent(tmp_path):
    put(tmp_path, {"x": ("zeta", flat(90.0)), "y": ("alpha", flat(100.0))})
    assert reader.open(tmp_path).layout(256, 512) == "zeta"
    put(tmp_path, {"x": ("zeta", flat(102.5)), "y": ("alpha", flat(100.0))})
    assert reader.open(tmp_path).layout(256, 512) == "zeta"
    put(tmp_path, {"x": ("zeta", flat(102.5)), "y": ("alpha", flat(99.0))})
    assert reader.open(tmp_path).layout(256, 512) == "alpha"


def test_choose_layer_and_show_tell_what_is_published(tmp_path):
    put(tmp_path, weights={1: 1, 8: 9}, early_8="unsafe")
    run = CliRunner().invoke
    words = run(cli.app, ["choose", "1", "256", "512", "--layer", "--state", str(tmp_path)])
    assert words.exit_code == 0, words.output
    assert "laid out as right, weighed by the traffic mine" in words.output
    assert "left: nothing safe at m=5 to 8" in words.output
    args = ["choose", "1", "256", "512", "--layer", "--json", "--state", str(tmp_path)]
    layer = json.loads(run(cli.app, args).stdout)["layer"]
    assert (layer["layout"], layer["traffic"], layer["crossing"]) == ("right", "mine", None)
    assert [fit["layout"] for fit in layer["fits"]] == ["right", "plain", "left"]
    shown = json.loads(run(cli.app, ["show", "--json", "--state", str(tmp_path)]).stdout)
    assert [(x["n"], x["k"], x["layout"]) for x in shown["layers"]] == [(256, 512, "right")]


def test_what_was_published_without_layouts_is_not_called_chosen(tmp_path):
    rows = candidates(TWO)
    chosen, placed = choices(rows, None)
    publish.publish(tmp_path, chosen, placed, [ENVIRONMENT])
    document = documents.layer(tmp_path, Problem("nvfp4", 1, 256, 512, "bf16", "bf16"))
    assert document["layout"] is None and "published" in document["reason"]


def test_the_page_has_every_traffic_and_an_example_that_loads(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    for name in traffic.BUILTIN:
        assert f"| `{name}` |" in page
    (example,) = re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "chat.json").write_text(example)
    assert traffic.find(str(tmp_path / "chat.json")).name == "chat"
    assert {PROFILES[name].traffic for name in PROFILES} == {"mixed"}
