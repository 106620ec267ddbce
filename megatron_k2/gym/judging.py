"""What domains of a single answer share: reasons, seconds, the environment of one turn."""

import time
from abc import ABC, abstractmethod

from megatron_k2.errors import UserError
from megatron_k2.fidelity.check import Settings
from megatron_k2.fidelity.statements import Asker
from megatron_k2.gym.protocol import Domain, Environment, SingleTurn, Task, Verdict, unknown


class NotJudged(Exception):  # noqa: N818 - what happened, not a mistake of the caller
    """Nothing is known of the answer; the message says why."""


class SingleAnswerDomain(Domain, ABC):
    """A domain that says its verdict in ``_judged``; whatever that raises is *unknown*."""

    @abstractmethod
    async def _judged(self, task: Task, answer: str) -> Verdict:
        """The verdict, its seconds left out.

        Raises:
            NotJudged: the verifier failed, and not the answer.
            UserError: the task cannot be used.
        """

    async def judge(self, task: Task, answer: str) -> Verdict:
        """Verify a single answer."""
        began = time.monotonic()
        try:
            verdict = await self._judged(task, answer)
        except (NotJudged, UserError) as problem:
            verdict = unknown(str(problem))
        except (AttributeError, KeyError, TypeError, SyntaxError) as problem:
            verdict = unknown(f"the reference cannot be read: {type(problem).__name__} {problem}")
        except OSError as problem:
            verdict = unknown(f"the verifier did not start: {problem}")
        seconds = round(time.monotonic() - began, 4)
        return Verdict(verdict.outcome, verdict.evidence, verdict.details, seconds)

    def environment(self) -> Environment:
        """One question, one answer."""
        return SingleTurn(self)

    async def close(self) -> None:
        """End what waits between verdicts: here nothing does."""


class AskedDomain(SingleAnswerDomain):
    """A domain that a model judges where there is one, and rules as far as they go without.

    Args:
        asker: a model that the user runs; ``None``: the rules alone.
        settings: how it is asked.
    """

    def __init__(self, asker: Asker | None = None, settings: Settings | None = None) -> None:
        self._asker, self._settings = asker, settings or Settings()

    async def close(self) -> None:
        """End the model's connections."""
        if self._asker is not None:
            await self._asker.close()
