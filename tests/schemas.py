"""What commands print with --json, held against docs/schemas.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FILE = Path(__file__).resolve().parents[1] / "docs" / "schemas.json"
GROUPS = ("fleet", "quarantine")


@functools.cache
def definitions() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))["$defs"]


@functools.cache
def validator(name: str) -> Draft202012Validator:
    schema = {"$ref": f"#/$defs/{name}", "$defs": definitions()}
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def command_of(arguments: Sequence[str]) -> str:
    """The name under which a call's schema is kept."""
    name, *rest = arguments
    return f"{name} {rest[0]}" if name in GROUPS else name


def hold(name: str, document: Any) -> None:
    """Assert that a document is what its schema says."""
    errors = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in validator(name).iter_errors(document)
    ]
    assert not errors, f"{name} --json: {errors[:5]}"
