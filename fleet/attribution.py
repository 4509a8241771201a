"""Whose fault: one GPU's, the library build's, or undetermined. Statistics, no input or output.

A *series* is one (environment cohort, regime, data): the same machine code, run on many GPUs. GPU g
made `n` trials (problems) of which `x` failed. Three explanations compete:

gpu      each GPU is bad with probability PI, and a bad one has a failure rate of its own, drawn
         log-uniformly from [LEAST_RATE, 1]; a good one never fails:
         ``product over failing g of PI * m(x, n)``, m the likelihood averaged over the rates
library  with probability OMEGA the build is faulty: every GPU fails, at one common rate, drawn
         log-uniformly too, times a factor ``exp(SIGMA * z)`` of its own, z standard normal
some     with probability KAPPA a share q of the GPUs has something that the fingerprint does not
         say, q uniform over SHARES: a failing GPU is one of them, a clean one may be

PI: a few cores per several thousand machines are found to compute wrongly (Hochschild et al.,
HotOS 2021), so 1e-3 a GPU is generous. OMEGA: one build in a hundred. KAPPA is small because a
fingerprint is made to hold whatever evidence depends on. By Bayes' theorem, an explanation with
posterior odds of at least T against all others together is wrong with probability at most
1/(1+T): T = 99 gives a precision of 0.99 if the priors are right, and ODDS = 500 leaves a factor of
five for where they are not. What no explanation wins is undetermined. A suspect GPU must also have
failed twice: one failure is an anecdote, whatever the odds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import erfc, exp, inf, log, log1p, sqrt
from math import pi as pi_

PI = 1e-3
OMEGA = 1e-2
KAPPA = 1e-5
SIGMA = 1.0
LEAST_RATE = 1e-10
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ODDS = 500.0
"""Posterior odds that an attribution needs."""
LEAST_FAILURES = 2
"""Failing problems that a GPU must show to be suspect."""
LEAST_NODES = 3
"""Nodes that must fail for a library to be suspect: fewer may share a rack or a power supply."""

_MOST_RATE = 1 - 1e-9
_FEW = 40
"""Failing GPUs of an unexplained series that are each compared with the rest."""
_TRIES = 150
_SPAN = -log(LEAST_RATE)
_STEP = 0.5
_GRID = tuple(log(LEAST_RATE) + _STEP * i for i in range(int(_SPAN / _STEP) + 1))

Pair = tuple[int, int]
"""(failures, trials)."""


@dataclass(frozen=True, slots=True)
class Trials:
    """One GPU's trials in a series."""

    device: str
    node: str
    failures: int
    trials: int


@dataclass(frozen=True, slots=True)
class Blame:
    """What a series says of one failing GPU. `own` and `shared` are log-likelihoods of its failures
    as its own fault (without PI) and as part of what others have; they add up over series."""

    device: Trials
    suspect: bool
    odds: float
    own: float
    shared: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """`kind` of a series: ``gpu`` where suspects explain all, ``library``, ``undetermined``, or
    ``none`` where nothing failed. `odds` are the library's; `blames` has every GPU that was taken
    for bad by itself, suspect or not."""

    kind: str
    odds: float
    blames: tuple[Blame, ...]
    rest: tuple[Trials, ...]
    """Failing GPUs that are explained together, or not at all; a few of the latter have blames."""


_tables: dict[Pair, dict[float, float]] = {}
_windows: dict[Pair, list[tuple[float, float]]] = {}
_CLEAN = tuple(i / 4 for i in range(-16, 17))
"""Values of z at which a clean GPU's likelihood, smooth in z, is averaged."""
_CLEAN_WEIGHTS = tuple(0.25 * exp(-z * z / 2) / sqrt(2 * pi_) for z in _CLEAN)


def _likelihood(pair: Pair, log_rate: float) -> float:
    """log of P(x failures in n) at a common rate, averaged over the GPU's own factor; without the
    binomial coefficient, which every explanation has."""
    known = _tables.setdefault(pair, {})
    found = known.get(log_rate)
    if found is None:
        found = known[log_rate] = _averaged_factor(pair, log_rate)
    return found


def _averaged_factor(pair: Pair, log_rate: float) -> float:
    x, n = pair
    if x == 0:
        total = 0.0
        for z, weight in zip(_CLEAN, _CLEAN_WEIGHTS, strict=True):
            rate = min(exp(log_rate + SIGMA * z), _MOST_RATE)
            total += weight * exp(n * log1p(-rate))
        return log(max(total, 1e-300))
    if pair not in _windows:
        _windows[pair] = _window(pair)
    scale = -log(SIGMA * sqrt(2 * pi_))
    terms = [at + scale - ((u - log_rate) / SIGMA) ** 2 / 2 for u, at in _windows[pair]]
    # What a factor would push above a rate of 1 stays at 1.
    beyond = erfc(-log_rate / SIGMA / sqrt(2)) / 2
    if beyond > 0:
        terms.append(log(beyond) + x * log(_MOST_RATE) + (n - x) * log1p(-_MOST_RATE))
    return _log_sum(terms)


def _window(pair: Pair) -> list[tuple[float, float]]:
    """Where the likelihood of a GPU's own log rate u is: (u, log likelihood + log width) each."""
    x, n = pair
    rate = min(x / n, _MOST_RATE)
    width = max(sqrt((1 - rate) / x), 1 / x)
    low, high = log(rate) - 6 * width, min(log(rate) + 5 * width, log(_MOST_RATE))
    step = (high - low) / 24
    points = (low + step * i for i in range(25))
    return [(u, x * u + (n - x) * log1p(-exp(u)) + log(step)) for u in points]


def _log_sum(terms: Sequence[float]) -> float:
    top = max(terms, default=-inf)
    return -inf if top == -inf else top + log(sum(exp(t - top) for t in terms))


def _averaged(function: Callable[[float], float]) -> float:
    """log of the mean of ``exp(function)`` over log rates; finer around the peak as it narrows."""
    points = {at: function(at) for at in _GRID}
    width = _STEP
    while width > 1e-3:
        peak = max(points, key=lambda at: points[at])
        near = [points.get(peak - width), points.get(peak + width)]
        if all(v is None or v > points[peak] - 1.0 for v in near):
            break
        # The neighbourhood again with a quarter of the spacing.
        width /= 4
        window = [peak + width * i for i in range(-8, 9)]
        points = {at: function(at) for at in window if at <= 0.0}
    return _log_sum(list(points.values())) + log(width / _SPAN)


def _own(pair: Pair) -> float:
    return _averaged(lambda at: _likelihood(pair, at))


def _library(counts: Mapping[Pair, int]) -> float:
    items = list(counts.items())
    return _averaged(lambda at: sum(c * _likelihood(p, at) for p, c in items if c))


def _log_some(counts: Mapping[Pair, int]) -> float:
    failing = [(p, c) for p, c in counts.items() if c and p[0]]
    clean = [(p, c) for p, c in counts.items() if c and not p[0]]
    number = sum(c for _, c in failing)
    together: dict[float, float] = {}

    def at_share(share: float) -> float:
        def function(at: float) -> float:
            if at not in together:
                together[at] = sum(c * _likelihood(p, at) for p, c in failing)
            total = number * log(share) + together[at]
            for pair, count in clean:
                total += count * log(1 - share + share * exp(_likelihood(pair, at)))
            return total

        return _averaged(function)

    return _log_sum([at_share(share) for share in SHARES]) - log(len(SHARES))


def _log_shared(counts: Mapping[Pair, int]) -> float:
    """log of P(these counts), by a fault that GPUs share; 0 where nothing failed."""
    if not any(c and p[0] for p, c in counts.items()):
        return 0.0
    return _log_sum([log(OMEGA) + _library(counts), log(KAPPA) + _log_some(counts)])


def rounded(count: int) -> int:
    """`count` to two digits: GPUs this alike are counted together."""
    if count < 100:
        return count
    scale = 10 ** (len(str(count)) - 2)
    return (count + scale // 2) // scale * scale


def attribute(failing: Sequence[Trials], clean: Mapping[int, int], pi: float = PI) -> Attribution:
    """Explain one series: its failing GPUs, and how many GPUs without failure made how many trials.
    `pi` is the share of GPUs that may be bad when a build is judged: more than PI where the fleet
    at hand has shown more.

    The GPUs that stand out most are taken for bad by themselves, as many as is likeliest, and the
    rest for sharing something. Then each such GPU must win by ODDS, and so must what explains the
    rest.
    """
    if not failing:
        return Attribution("none", 0.0, (), ())
    counts: dict[Pair, int] = {}
    for trials, number in clean.items():
        key = 0, rounded(trials)
        counts[key] = counts.get(key, 0) + number
    pair = {d.device: (rounded(d.failures), rounded(max(d.trials, d.failures))) for d in failing}
    for each in pair.values():
        counts[each] = counts.get(each, 0) + 1
    # Those with the highest rate first: they stand out of a common one.
    order = sorted(failing, key=lambda d: (-d.failures / max(1, d.trials), -d.failures, d.device))
    own = {key: _own(key) for key in set(pair.values())}
    taken = _standing_out([pair[d.device] for d in order], own, counts)
    alone, rest = order[:taken], tuple(order[taken:])
    for device in alone:
        counts[pair[device.device]] -= 1
    blames = _blames(alone, pair, own, counts)
    if not rest:
        kind = "gpu" if all(b.suspect for b in blames) else "undetermined"
        return Attribution(kind, 0.0, blames, ())
    library = log(OMEGA) + _library(counts)
    each_own = sum(log(pi) + own[pair[d.device]] for d in rest)
    odds = _exp(library - _log_sum([log(KAPPA) + _log_some(counts), each_own]))
    if odds >= ODDS and len({d.node for d in rest}) >= LEAST_NODES:
        return Attribution("library", odds, blames, rest)
    if len(rest) <= _FEW:
        # Told with their likelihoods each, for other series to add theirs.
        for key in {pair[d.device]: None for d in rest}:
            counts[key] -= 1
            alike = [d for d in rest if pair[d.device] == key]
            blames += _blames(alike, pair, own, counts)
            counts[key] += 1
    return Attribution("undetermined", odds, blames, rest)


def _standing_out(order: Sequence[Pair], own: Mapping[Pair, float], counts: dict[Pair, int]) -> int:
    """How many of the failing GPUs, taken in this order, are likeliest bad each by itself.

    Every number is tried and not one GPU after the other: two that always fail hide each other.
    """
    left = dict(counts)
    best, likeliest, cost = 0, log(OMEGA) + _library(left), 0.0
    at = tries = 0
    while at < len(order) and tries < _TRIES:
        key = order[at]
        while at < len(order) and order[at] == key:
            left[key] -= 1
            cost += log(PI) + own[key]
            at += 1
        tries += 1
        found = cost + (log(OMEGA) + _library(left) if at < len(order) else 0.0)
        if found > likeliest:
            best, likeliest = at, found
    if best > SHARES[0] * sum(counts.values()):
        # So many failing are no row of coincidences: what some of them share must lose, too.
        together = _log_shared(counts)
        for key in order[:best]:
            counts[key] -= 1
        alone = sum(log(PI) + own[key] for key in order[:best]) + _log_shared(counts)
        for key in order[:best]:
            counts[key] += 1
        if _exp(alone - together) < ODDS:
            return 0
    return best


def _blames(
    devices: Sequence[Trials],
    pair: Mapping[str, Pair],
    own: Mapping[Pair, float],
    counts: Mapping[Pair, int],
) -> tuple[Blame, ...]:
    if not devices:
        return ()
    base = _log_shared(counts)
    shared: dict[Pair, float] = {}
    out = []
    for device in devices:
        key = pair[device.device]
        if key not in shared:
            shared[key] = _log_shared({**counts, key: counts.get(key, 0) + 1}) - base
        odds = _exp(log(PI) + own[key] - shared[key])
        suspect = odds >= ODDS and device.failures >= LEAST_FAILURES
        out.append(Blame(device, suspect, odds, own[key], shared[key]))
    return tuple(out)


def combine(blames: Sequence[Blame]) -> float:
    """Posterior odds that one GPU is bad, from all series in which it stood out. It need be bad
    only once to explain them all, and so need a library, whose OMEGA is in each `shared`."""
    again = (len(blames) - 1) * log(OMEGA)
    return _exp(log(PI) + sum(b.own - b.shared for b in blames) + again)


def _exp(value: float) -> float:
    return exp(min(value, 700.0))
