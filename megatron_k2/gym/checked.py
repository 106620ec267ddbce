"""Domains whose verdict is one function of reference and answer, called in a worker process."""

from typing import Any

from megatron_k2.gym.judging import SingleAnswerDomain
from megatron_k2.gym.protocol import Outcome, Task, Verdict, unknown
from megatron_k2.gym.workers import Deadline, Workers


class CheckedDomain(SingleAnswerDomain):
    """A domain over one function of a module.

    The function is called with the reference's entries and ``answer`` by name; it returns an object
    with ``outcome``, ``evidence`` and perhaps ``details``. What it raises, and its death, are
    *unknown* with the reason.

    Args:
        name: of the registry.
        function: ``module:function``.
        num_workers: processes; one a core by default.
        deadline: of one verdict.
        warm_up: arguments of a first call, which pays for imports.
    """

    def __init__(
        self,
        name: str,
        function: str,
        *,
        num_workers: int | None = None,
        deadline: Deadline | None = None,
        warm_up: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._function = function
        calls = ((function, warm_up),) if warm_up else ()
        self._workers = Workers(num_workers, deadline, calls)

    async def _judged(self, task: Task, answer: str) -> Verdict:
        return _verdict(await self._workers.call(self._function, **task.reference, answer=answer))

    async def close(self) -> None:
        """End the processes."""
        await self._workers.close()


def _verdict(found: Any) -> Verdict:
    """What a function returned; anything but the agreed form is its failure."""
    try:
        outcome = Outcome(found["outcome"])
        return Verdict(outcome, str(found["evidence"]), dict(found.get("details", {})))
    except (KeyError, TypeError, ValueError):
        return unknown(f"the verifier returned {repr(found)[:200]}")
