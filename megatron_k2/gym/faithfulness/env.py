"""The domain of faithfulness: does each sentence of an answer say what the context says?

``reference``: ``context``; ``needs``, texts of which each must occur in the answer, or it answers
something else; ``is_absent``, where the context does not hold what is asked, and the right answer
says so. As in FACTS (arXiv:2501.03200): an answer that does not serve the request is wrong before
its grounding is looked at, and one sentence without support makes it wrong.

A model decides where there is one (``fidelity/check.py``). Without it the rules decide what they
can, and the rest is *unknown*.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_k2.fidelity.check import Finding, grounded
from megatron_k2.fidelity.sentences import folded
from megatron_k2.fidelity.statements import Statement, Support, statements
from megatron_k2.gym.faithfulness.rules import judged
from megatron_k2.gym.judging import AskedDomain, NotJudged
from megatron_k2.gym.protocol import Task, Verdict, right, unknown, wrong

NAME = "faithfulness"
_ABSTAINS = re.compile(
    r"\b(?:doesn't|don't|didn't|cannot|can't|isn't|aren't|not|no|nothing)\b"
    r"[^.!?]{0,60}\b(?:say|state|mention|tell|give|contain|include|specif|provid|found|find|known|"
    r"information|answer|described|stated|mentioned|given)",
    re.IGNORECASE,
)


class Faithfulness(AskedDomain):
    """Judges sentence by sentence."""

    name = NAME

    async def _judged(self, task: Task, answer: str) -> Verdict:
        facts = task.reference
        if problem := _does_not_serve(facts, answer):
            return wrong(problem)
        said = statements(answer)
        if facts.get("is_absent"):
            said = [each for each in said if not _ABSTAINS.search(each.text)]
        elif not said:
            return wrong("the answer states nothing")
        if self._asker is None:
            return _by_rules(said, facts["context"])
        try:
            text = " ".join(each.text for each in said)
            findings = await grounded(facts["context"], text, self._asker, self._settings)
        except Exception as problem:  # whatever an asker raises: no verdict on the answer
            raise NotJudged(f"the model did not answer: {problem}"[:300]) from None
        return _by_findings(findings)


def _does_not_serve(facts: Mapping[str, Any], answer: str) -> str | None:
    text = " ".join(folded(answer).split())
    if not text:
        return "the answer is empty"
    if facts.get("is_absent") and not _ABSTAINS.search(answer):
        return "the context does not hold what is asked, and the answer does not say so"
    for need in facts.get("needs", ()):
        if folded(need) not in text:
            return f"{need!r} is asked for and not in the answer"
    return None


def _by_rules(said: list[Statement], context: str) -> Verdict:
    found = [(each.text, *judged(each, context)) for each in said]
    rows = [{"statement": text, "supported": is_so, "why": why} for text, is_so, why in found]
    for text, is_so, why in found:
        if is_so is False:
            return wrong(f"{text!r:.160}: {why}", statements=rows)
    for text, is_so, why in found:
        if is_so is None:
            return unknown(f"{text!r:.160}: {why}", statements=rows)
    return right(f"all {len(said)} statements are the context's, by rules", statements=rows)


def _by_findings(findings: tuple[Finding, ...]) -> Verdict:
    rows = [dict(each._asdict()) for each in findings]
    for each in findings:
        if each.label not in (Support.SUPPORTED, None):
            return wrong(each.sentence(), statements=rows)
    for each in findings:
        if each.label is None:
            return unknown(each.sentence(), statements=rows)
    return right(f"all {len(findings)} statements are supported", statements=rows)
