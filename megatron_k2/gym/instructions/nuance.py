"""The domain of instructions that no program can check whole: code first, then a model by points.

``reference``: ``constraints`` and ``topic`` as in the domain of instructions, and ``points``,
sentences that must hold of the answer ("It speaks to a child."). What code refuses is wrong
whatever a model says; what it passes is *unknown* without a model. The model reads the answer
without what it says of itself (``claims``), so that a claim of compliance is not judged as
compliance.
"""

from megatron_k2.gym.instructions.check import check
from megatron_k2.gym.instructions.claims import without_claims
from megatron_k2.gym.judging import AskedDomain
from megatron_k2.gym.points import first_that_fails
from megatron_k2.gym.protocol import Task, Verdict, right, unknown, wrong

NAME = "nuance"


class Nuance(AskedDomain):
    """Judges by code and by votes."""

    name = NAME

    async def _judged(self, task: Task, answer: str) -> Verdict:
        facts = task.reference
        checked = check(facts["constraints"], facts["topic"], answer)
        if checked["outcome"] != "right":
            return wrong(checked["evidence"], **checked["details"])
        if self._asker is None:
            return unknown("code finds nothing wrong; the points are for a model to judge")
        own, number = without_claims(answer), self._settings.num_votes
        failed = await first_that_fails(self._asker, task.prompt, own, facts["points"], number)
        return failed or right(f"constraints and {len(facts['points'])} points hold")
