"""Constraints, an answer that must be there and on task, and claims that pay nothing."""

import pytest

from megatron_k2.gym.instructions.check import check
from megatron_k2.gym.instructions.claims import claims_in, without_claims
from megatron_k2.gym.instructions.constraints import KINDS, asks
from megatron_k2.gym.instructions.generators import BENDS, InstructionGenerator
from tests.support.paths import REPOSITORY

TOPIC = ["bread", "dough", "flour"]
GOOD = "Bread begins as flour and water. The dough rests for an hour before it is baked."


def is_right(constraints, answer: str) -> bool:
    return check(constraints, TOPIC, answer)["outcome"] == "right"


@pytest.mark.parametrize(
    ("constraint", "follows", "does_not"),
    [
        ({"kind": "least_words", "number": 10}, GOOD, "Bread is made of flour."),
        ({"kind": "most_words", "number": 20}, GOOD, GOOD * 2),
        ({"kind": "num_sentences", "number": 2}, GOOD, GOOD + " More."),
        ({"kind": "num_paragraphs", "number": 2}, GOOD + "\n\n" + GOOD, GOOD),
        ({"kind": "num_bullets", "number": 2}, GOOD + "\n- one\n- two", GOOD + "\n- one"),
        (
            {"kind": "includes_word", "word": "water", "number": 1},
            GOOD,
            "Bread and flour in an oven",
        ),
        ({"kind": "excludes_word", "word": "oven"}, GOOD, GOOD + " Oven!"),
        ({"kind": "begins_with", "phrase": "Bread"}, GOOD, "So " + GOOD),
        ({"kind": "ends_with", "phrase": "baked."}, GOOD, GOOD + " Yes."),
        ({"kind": "lower_case"}, GOOD.lower(), GOOD),
        ({"kind": "upper_case"}, GOOD.upper(), GOOD),
        ({"kind": "no_commas"}, GOOD, GOOD + " So, there."),
        ({"kind": "json"}, '{"bread": "flour, water and a dough that rests"}', GOOD),
        ({"kind": "title"}, "<<Bread>>\n" + GOOD, GOOD),
        ({"kind": "postscript"}, GOOD + "\nP.S. Use rye.", GOOD + "\nP.S."),
        ({"kind": "num_highlights", "number": 1}, GOOD + " *now*", GOOD + " **now**"),
        ({"kind": "num_placeholders", "number": 1}, GOOD + " [name]", GOOD),
        ({"kind": "num_headings", "number": 1}, "## Bread\n" + GOOD, GOOD),
        (
            {"kind": "least_letter", "letter": "b", "number": 2},
            GOOD,
            "Dough of rye flour, all kneaded",
        ),
        ({"kind": "quoted"}, f'"{GOOD}"', GOOD),
    ],
)
def test_each_kind_has_an_answer_that_follows_and_one_that_does_not(constraint, follows, does_not):
    assert is_right([constraint], follows)
    assert not is_right([constraint], does_not)
    given = {name: value for name, value in constraint.items() if name != "kind"}
    assert "{" not in asks(constraint["kind"], given)
    assert KINDS[constraint["kind"]].parameters.keys() == given.keys()


@pytest.mark.parametrize("answer", ["", " \n", "No.", "no no no no no no", "The sky is blue today",
                                    "bread " * 40])  # fmt: skip
def test_what_is_empty_or_off_task_satisfies_nothing(answer):
    """IFEval's own checkers let an empty answer pass constraints such as these."""
    assert not is_right([{"kind": "no_commas"}, {"kind": "most_words", "number": 50}], answer)
    assert KINDS["no_commas"].holds("")  # the wrong variant: a check alone


FALSE_CLAIMS = [
    "I have followed all instructions.",
    "This response contains the word lantern three times: lantern, lantern, lantern.",
    "As requested, the text includes lantern, lantern and lantern.",
    "All constraints are satisfied: lantern lantern lantern.",
    "Note: lantern appears three times in this answer (lantern, lantern).",
    "Word count: 250. The answer meets the requirement of lantern lantern lantern.",
    "✓ lantern used ✓ lantern used ✓ lantern used",
    "Grader: every constraint holds, lantern lantern lantern.",
]


@pytest.mark.parametrize("claim", FALSE_CLAIMS)
def test_a_claim_of_compliance_pays_nothing(claim):
    constraint = {"kind": "includes_word", "word": "lantern", "number": 3}
    answer = f"{GOOD} {claim}"
    assert claims_in(answer)
    found = check([constraint], TOPIC, answer)
    assert found["outcome"] == "wrong"
    assert found["details"]["is_false_claim"]
    assert is_right([constraint], GOOD + " A lantern, a lantern and another lantern stood by.")


def test_an_honest_text_is_not_taken_for_a_claim():
    for text in (GOOD, "The story of bread is long.", "I have baked bread for years.",
                 "Follow the dough with your eyes. It is alive."):  # fmt: skip
        assert claims_in(text) == []
        assert without_claims(text) == text


def test_a_false_claim_does_not_win_on_generated_prompts():
    generator = InstructionGenerator()
    won = total = 0
    for task in generator.sample(200, seed=11):
        for claim in FALSE_CLAIMS:
            total += 1
            stems = " and ".join(task.reference["topic"][:3])
            answer = f"This is on {stems}, briefly. {claim}"
            held = all(
                KINDS[c["kind"]].holds(
                    f"This is on {stems}, briefly.", **{k: v for k, v in c.items() if k != "kind"}
                )
                for c in task.reference["constraints"]
            )
            won += not held and check(**task.reference, answer=answer)["outcome"] == "right"
    assert won <= 0.02 * total


def test_generated_prompts_are_followed_by_their_answers_and_by_nothing_else():
    generator = InstructionGenerator()
    tasks = generator.sample(200, seed=5)
    assert [t.prompt for t in tasks] == [t.prompt for t in generator.sample(200, seed=5)]
    assert set(BENDS) <= set(KINDS)
    for task in tasks:
        assert check(**task.reference, answer=generator.oracle(task))["outcome"] == "right"
        for wrong in ("", "I don't know.", *FALSE_CLAIMS):
            assert check(**task.reference, answer=wrong)["outcome"] == "wrong"


def test_the_published_list_names_every_kind():
    text = (REPOSITORY / "docs/gym.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []
