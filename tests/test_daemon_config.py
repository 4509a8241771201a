"""The daemon's configuration file: values that fit, or a sentence for each that does not."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fp4tune.daemon import config as configuring
from fp4tune.daemon.config import DaemonConfig
from fp4tune.errors import Refused


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
