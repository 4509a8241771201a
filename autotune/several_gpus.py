"""The probes of several devices at once: all GPUs of a node, in the time of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock

from ..cache.ledger import Ledger
from .agreement import Agreement, paired
from .plan import Plan, Report
from .probe import probe
from .runner import Progress, Stopped


def probe_all(
    plans: Sequence[Plan],
    ledger: Ledger,
    state_dir: Path,
    progress: Mapping[str, Progress],
) -> tuple[list[Report], dict[str, Exception]]:
    """Run every plan at once; what they found, and by device label what ended those that failed.

    `progress` is by device label. A device that cannot be probed does not stop the others; alone
    it raises, as `probe.probe` does.
    """
    if len(plans) == 1:
        (plan,) = plans
        return [probe(plan, ledger, state_dir, progress[plan.target.label])], {}
    stop = Event()
    models = {plan.target.label: plan.target.name for plan in plans}
    agreement = Agreement(Lock(), partners=paired(models))

    def one(plan: Plan) -> Report:
        tell = progress[plan.target.label]

        def told(who: str, text: str) -> None:
            if stop.is_set():
                raise Stopped
            tell(who, text)

        try:
            return probe(plan, ledger, state_dir, told, agreement)
        finally:
            if partner := agreement.partners.get(plan.target.label):
                partner.leave()

    reports: list[Report] = []
    failed: dict[str, Exception] = {}
    with ThreadPoolExecutor(len(plans)) as pool:
        futures = {pool.submit(one, plan): plan for plan in plans}
        try:
            wait(futures)
        except BaseException:
            stop.set()
            raise
        for future, plan in futures.items():
            error = future.exception()
            if error is None:
                reports.append(future.result())
            elif isinstance(error, Exception):
                failed[plan.target.label] = error
            else:
                raise error
    if not reports:
        raise next(iter(failed.values()))
    return reports, failed
