"""What one GPU's driver says, asked again and again without waiting: one that never answers hangs
the process that asks, and that alone."""

from __future__ import annotations

import os
from typing import Any

from ..machine import driver
from ..machine.hardware import of_answer

SLOW, FAST = 2.0, 0.4
"""Seconds between two looks at a GPU: as a rule, and while it is probed."""
FACTS_EVERY = 30.0
"""Seconds between two full looks at what the GPU is."""


class Sentinel:
    """A conversation about one GPU. `heard` is when the driver last answered (`time.monotonic`),
    `spoke` whether it ever did to this one."""

    def __init__(self, uuid: str, now: float, heard: float | None = None) -> None:
        self.uuid = uuid
        self.began = now
        self.heard = now if heard is None else heard
        self.spoke = False
        self.interval = SLOW
        self._conversation = driver.Conversation()
        self._waiting = 0
        """How many answers are still to come."""
        self._asked = -SLOW
        self._next_facts = now
        self._facts: dict[str, Any] = {}

    @property
    def alive(self) -> bool:
        return self._conversation.alive

    def listen(self, now: float) -> list[dict[str, Any]]:
        """The looks that came in, each with the GPU's `facts`, or an `error`; then ask again where
        it is time. Never waits."""
        found: list[dict[str, Any]] = []
        for reply in self._conversation.receive():
            self._waiting -= 1
            self.heard, self.spoke = now, True
            answer = reply.get("answer")
            if answer is None:
                found.append({"error": str(reply.get("error"))})
                self.stop()  # lost, reset or replaced: the next one loads the library anew
            elif "events" in answer:
                if answer["events"]:
                    self._next_facts = now
                found.append({**answer, "facts": self._facts})
            else:
                self._facts = of_answer(answer, os.environ)
        if self._waiting <= 0 and now >= self._asked + self.interval:
            self._waiting = 1
            self._asked = now
            if now >= self._next_facts:
                self._waiting = 2
                self._next_facts = now + FACTS_EVERY
                self._conversation.send("facts", self.uuid)  # before the look that goes with them
            self._conversation.send("look", self.uuid)
        return found

    def stop(self) -> None:
        """End it, without waiting for a process that may not end."""
        self._conversation.close()


def listing() -> dict[str, Any]:
    """``gpus``: uuid, name and arch of each GPU of the node in NVML's order; ``reason`` where there
    is none, or the driver cannot be asked. ``silent``: whether it did not answer at all."""
    try:
        found = [
            {"uuid": gpu["uuid"], "name": gpu["name"], "arch": f"sm{gpu['sm']}"}
            for gpu in driver.ask_once("gpus")
        ]
    except driver.DriverSilent as error:
        return {"gpus": [], "reason": str(error), "silent": True}
    except driver.NvmlError as error:
        return {"gpus": [], "reason": f"no NVIDIA driver answers ({error})", "silent": False}
    return {"gpus": found, "reason": None if found else "this machine has no GPU", "silent": False}
