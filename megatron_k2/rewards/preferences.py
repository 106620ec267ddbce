"""A critic's training data: pairs of known truth as dialogues whose answer is one letter.

The report bootstraps the critic from preference data in fine-tuning; its mix is not stated. Each
pair is asked in both orders, with the very text that ``judge`` asks at run time, so that the critic
learns the letters and not the place.
"""

from collections.abc import Iterator, Sequence

from megatron_k2.records.messages import ChatSample, Message
from megatron_k2.rewards.judge import LETTERS, SYSTEM, Question
from megatron_k2.rewards.neutral import neutral
from megatron_k2.rewards.pairs import Pair
from megatron_k2.rewards.rubrics import DEFAULT, Rubric


def samples(
    pairs: Sequence[Pair], rubrics: tuple[Rubric, ...] = DEFAULT, *, source: str = "critic"
) -> Iterator[ChatSample]:
    """Two samples a pair, as the critic will see it; pairs that look the same then are left out."""
    for pair in pairs:
        shown = [neutral(answer).text for answer in (pair.a, pair.b)]
        if shown[0] == shown[1]:
            continue
        asked = Question(pair.prompt, shown[0], shown[1], rubrics)
        is_a = pair.better == "a"
        for question, letter in ((asked, LETTERS[not is_a]), (asked.swapped(), LETTERS[is_a])):
            messages = (
                Message("system", SYSTEM),
                Message("user", question.text(thinks=False)),
                Message("assistant", letter),
            )
            yield ChatSample(messages, source=source)
