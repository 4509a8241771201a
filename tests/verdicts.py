"""Verdicts as tests ask for them: by a profile, with the excuses of our own data."""

from __future__ import annotations

from fp4tune.autotune.plan import EXCUSES
from fp4tune.autotune.verdict import rules


def decide(evidence, profile, bounds=None, aims=None, left_out=(), doubts=None):
    """`rules.decide` under `profile`."""
    return rules.decide(
        evidence, rules.Rules(profile, aims or {}, left_out, EXCUSES), bounds, doubts
    )
