"""The domain of instructions whose checker is a program: run in the sandbox, the answer its data.

``reference``: ``checker``, a program with ``check(answer) -> bool``, and ``topic`` as in the domain
of instructions. The answer must hold as it stands and without what it says of itself, and must say
something on its topic.
"""

from megatron_k2.gym.coding.env import OverPrograms
from megatron_k2.gym.coding.plain import encode
from megatron_k2.gym.instructions.check import off_task
from megatron_k2.gym.instructions.claims import claims_in, without_claims
from megatron_k2.gym.judging import NotJudged
from megatron_k2.gym.protocol import Task, Verdict, right, wrong

NAME = "coded_instructions"
ENTRY = "check"


class CodedInstructions(OverPrograms):
    """Runs checkers."""

    name = NAME

    async def _judged(self, task: Task, answer: str) -> Verdict:
        claims, own = claims_in(answer), without_claims(answer)
        if why := off_task(own, task.reference["topic"]):
            return wrong(why, claims=claims)
        held = await self.held(task.reference["checker"], [answer, own])
        if any(each is None for each in held):
            raise NotJudged("the checker gave no truth value")
        if all(held):
            return right("the checker holds", claims=claims)
        return wrong("the checker does not hold", claims=claims, is_false_claim=bool(claims))

    async def held(self, checker: str, answers: list[str]) -> list[bool | None]:
        """What a checker says of each answer; ``None`` where it raised, or gave no truth value."""
        said = await self._programs.values(checker, ENTRY, [encode([each]) for each in answers])
        values = [each.get("value") for each in said]
        return [value if isinstance(value, bool) else None for value in values]
