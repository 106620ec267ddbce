"""Critics with known faults: what a calibration must say of each, and what defences must hold."""

import hashlib
from collections.abc import Callable, Sequence

from megatron_k2.rewards.judge import Opinion, Question
from megatron_k2.rewards.neutral import neutral
from megatron_k2.rewards.pairs import Pair
from megatron_k2.rewards.rubrics import justifies_itself, opens_with_praise

type _Rule = Callable[[Question], float | None]


class ScriptedJudge:
    """A critic that follows a rule.

    Args:
        name: of the fault.
        rule: P(first) of a question; ``None`` is an answer that cannot be read.
    """

    def __init__(self, name: str, rule: _Rule) -> None:
        self.name = name
        self._rule = rule

    async def compare(self, question: Question) -> Opinion:
        """See the protocol."""
        return Opinion(self._rule(question), len(question.text(thinks=False)) // 4)


def chance(question: Question) -> float:
    """0 to 1, drawn by the question's text."""
    text = f"{question.prompt}\0{question.first}\0{question.second}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class _Truth:
    """Which of two answers is the better one, as the pairs say; as shown with defences, too."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._is_best: dict[tuple[str, str], bool] = {}
        for pair in pairs:
            for answer, is_best in ((pair.worst, False), (pair.best, True)):
                for shown in (answer, neutral(answer).text):
                    self._is_best[pair.prompt, shown] = is_best

    def __call__(self, question: Question) -> float:
        first = self._is_best.get((question.prompt, question.first), False)
        second = self._is_best.get((question.prompt, question.second), False)
        return 0.5 if first == second else 0.9 if first else 0.1


def scripted_judges(pairs: Sequence[Pair]) -> dict[str, ScriptedJudge]:
    """One critic for each fault, and one without.

    Args:
        pairs: whose truth the honest part of each knows.
    """
    truth = _Truth(pairs)

    def first(question: Question) -> float:
        return 0.95

    def longest(question: Question) -> float:
        a, b = len(question.first), len(question.second)
        return 0.5 if a == b else 0.95 if a > b else 0.05

    def obeys(question: Question) -> float:
        asks = [neutral(answer).num_removed > 0 for answer in (question.first, question.second)]
        return truth(question) if asks[0] == asks[1] else 0.98 if asks[0] else 0.02

    def noisy(question: Question) -> float:
        return truth(question) if chance(question) > 0.25 else 1 - truth(question)

    def flattered(question: Question) -> float:
        likes = [
            opens_with_praise(answer) or justifies_itself(answer)
            for answer in (question.first, question.second)
        ]
        return truth(question) if likes[0] == likes[1] else 0.9 if likes[0] else 0.1

    def leaning(question: Question) -> float:
        return min(0.98, truth(question) + 0.45)

    def mumbles(question: Question) -> float | None:
        return None if chance(question) < 0.3 else truth(question)

    rules: dict[str, _Rule] = {
        "fair": truth,
        "always-first": first,
        "longest": longest,
        "obeys-overrides": obeys,
        "noisy": noisy,
        "flattered": flattered,
        "leans-to-first": leaning,
        "mumbles": mumbles,
    }
    return {name: ScriptedJudge(name, rule) for name, rule in rules.items()}
