"""The daemon's configuration file: values that fit, or a sentence for each that does not."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from daemons import DOCS, TOKEN, asked, documented, mistakes
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fp4tune import cli
from fp4tune.autotune.levels import LEVELS
from fp4tune.autotune.verdict.profiles import PROFILES
from fp4tune.daemon import config as configuring
from fp4tune.daemon.config import DaemonConfig
from fp4tune.errors import Refused


def test_a_configuration_is_read_to_the_last_key(tmp_path):
    path = tmp_path / "daemon.toml"
    path.write_text(
        'gpus = ["0", "cpu"]\nstate = "/s"\n[probe]\nshapes = ["128,256"]\nlevel = "quick"\n'
        '[limits]\nhost_gib = 8\n[http]\nlisten = "unix:/run/x.sock"\n[environment]\nA = "1"\n'
    )
    found = configuring.load(path)
    assert found.gpus == ("0", "cpu") and found.layers() == (asked(128),)
    assert found.limits.host_gib == 8.0 and found.environ["A"] == "1"
    assert configuring.load(None) == DaemonConfig()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour = 1", "colour: there is no such key; there are state, gpus"),
        ("[probe]\nshape = ['1,1']", "probe.shape: there is no such key"),
        ("[probe]\ntp = true", "probe.tp: it is a whole number, not True"),
        ("[probe]\nlevel = 'slow'", "probe.level: 'slow' is not one of quick, standard, soak"),
        ("[probe]\nshapes = ['12']", "probe: "),
        ("[limits]\nhost_gib = -1", "limits.host_gib: it must be more than 0, not -1"),
        ("[watch]\nseconds = inf", "watch.seconds: it must be finite"),
        ("probe = 1", "probe: it is a table, [probe]"),
        ("gpus = ['all', '0']", "gpus: 'all' stands alone"),
        ("gpus = ['first']", "gpus: 'first' is not an index, a UUID"),
        ("[http]\nlisten = '0.0.0.0:80'", "http.listen: '0.0.0.0:80': it listens on"),
        ("[http]\nlisten = 'unix:x'", "http.listen: 'x' is not an absolute path"),
        ("[http]\ntoken_file = '/nowhere'", "http.token_file: /nowhere: No such file"),
        ("[environment]\n'A B' = '1'", "environment: 'A B' is not the name of a variable"),
        ("= 3", "this is not TOML"),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path, text, sentence):
    (said,) = mistakes(tmp_path, text)
    assert said.startswith(sentence)


def test_every_mistake_is_said_at_once(tmp_path):
    said = mistakes(tmp_path, "a = 1\n[probe]\nb = 2\nlevel = 'x'\n")
    assert [line.partition(":")[0] for line in said] == ["a", "probe.b", "probe.level"]


def test_words_are_those_of_the_prober():
    assert set(configuring.LEVELS) == set(LEVELS)
    assert set(configuring.PROFILES) == set(PROFILES)


def test_the_check_is_a_command_with_an_exit_code(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[probe]\npresets = ["qwen3-0.6b"]\n')
    bad.write_text("[probe]\nlevels = 1\n")
    done = CliRunner().invoke(cli.app, ["daemon", "--config", str(good), "--check", "--json"])
    assert done.exit_code == 0
    assert set(json.loads(done.stdout)) == {f.name for f in fields(DaemonConfig)}
    done = CliRunner().invoke(cli.app, ["daemon", "--config", str(bad), "--check"])
    assert done.exit_code == 2 and "probe.levels" in done.stderr
    assert "Traceback" not in done.output
    done = CliRunner().invoke(cli.app, ["daemon", "--config", str(tmp_path / "no"), "--check"])
    assert done.exit_code == 2 and "No such file" in done.stderr


def test_a_token_must_be_long_and_not_for_everyone(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    assert configuring.token(str(path)) == TOKEN
    path.chmod(0o644)
    with pytest.raises(Refused, match="everyone may read it"):
        configuring.token(str(path))
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(Refused, match="at least 16"):
        configuring.token(str(path))


def test_every_key_of_the_configuration_is_described_and_no_other():
    keys = set()
    for field in fields(DaemonConfig):
        table = getattr(DaemonConfig(), field.name)
        inside = fields(table) if is_dataclass(table) else ()
        keys |= {f"{field.name}.{f.name}" for f in inside} or {field.name}
    assert documented("key") == keys


def test_the_example_is_good_and_the_one_on_the_page():
    example = DOCS.parent / "examples" / "daemon.toml"
    configuring.load(example)
    assert f"```toml\n{example.read_text(encoding='utf-8')}```" in DOCS.read_text(encoding="utf-8")


@settings(max_examples=40)
@given(drawn=st.data())
def test_a_configuration_of_any_kind_is_said_in_sentences(drawn, tmp_path_factory):
    """Whatever a file holds: values that fit, or a sentence for each that does not."""
    values = st.one_of(
        st.booleans(), st.integers(-5, 5), st.floats(-2, 2), st.text("ab:.0/", max_size=6),
        st.lists(st.one_of(st.integers(0, 3), st.text("a1", max_size=2)), max_size=2),
        st.dictionaries(st.sampled_from(["a", "b c"]), st.one_of(st.integers(), st.text("x"))),
        st.just(float("nan")),
    )  # fmt: skip
    tables = [field.name for field in fields(DaemonConfig)]
    key = drawn.draw(st.sampled_from([*tables, "unknown"]))
    inner = getattr(DaemonConfig(), key, None)
    if is_dataclass(inner):
        name = drawn.draw(st.sampled_from([*(field.name for field in fields(inner)), "unknown"]))
        document, where = {key: {name: drawn.draw(values)}}, f"{key}.{name}"
    else:
        document, where = {key: drawn.draw(values)}, key
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(toml(document))
    try:
        configuring.load(Path(path))
    except Refused as refused:
        for line in str(refused).splitlines():
            said = line.removeprefix(f"{path}: ")
            assert said.startswith((f"{where}: ", f"{key}: ", f"{where}.")), said
            assert "pydantic" not in said and "Input should" not in said


def toml(document: dict) -> str:
    """A document of one level or two as TOML."""

    def value(one) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f'"{k}" = {value(v)}' for k, v in one.items()) + "}"
        if isinstance(one, list):
            return "[" + ", ".join(map(value, one)) + "]"
        return "nan" if one != one else json.dumps(one)

    return "\n".join(f"{key} = {value(one)}" for key, one in document.items())
