"""Contexts of fictional facts, and questions whose answers they hold, or do not."""

import random
from collections.abc import Iterator

from megatron_k2.gym.drawn import DrawnGenerator
from megatron_k2.gym.faithfulness.env import NAME
from megatron_k2.gym.protocol import Task

FORMS = ("lookup", "several", "perhaps")
_PLACES = "Orlen Vasa Hemma Corvan Pell Lisk Karst Dorn Arnby Fell Sirin Odda".split()
_PEOPLE = (
    "Ada Brill", "Tom Hask", "Mina Toth", "Nils Orre", "Elsa Nor", "Karl Wint", "Vera Koll",
    "Hans Mott", "Olga Renz", "Leo Park", "Ruth Ames", "Iva Bern",
)  # fmt: skip
_TRADES = "baker weaver printer clockmaker glazier cooper tanner potter".split()
ASPECTS = {
    "who founded it": ("{place} was founded by {who} in {year}.", ("{who}",)),
    "how many people live there": ("{number} people live in {place}.", ("{number}",)),
    "what its bridge measures": ("The bridge of {place} is {length} metres long.", ("{length}",)),
    "who keeps its archive": ("The archive of {place} is kept by {keeper}.", ("{keeper}",)),
    "which craft it is known for": (
        "{place} is known for its {trade}, {friend}.",
        ("{trade}", "{friend}"),
    ),
    "when its market is held": ("The market of {place} is held on {day}.", ("{day}",)),
}
_DAYS = "Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays".split()


class FaithfulnessGenerator(DrawnGenerator):
    """Three towns in one context; one is asked about.

    Args:
        form: *lookup* (one aspect), *several* (two), *perhaps* (one, which half of the contexts
            leave out: to say always that it is not there is wrong as often).
    """

    domain = NAME

    def _made(self, order: random.Random) -> Task:
        towns = [_town(order, place) for place in order.sample(_PLACES, 3)]
        asked = order.choice(towns)
        number = 2 if self._form == "several" else 1
        aspects = order.sample(sorted(ASPECTS), number)
        is_absent = self._form == "perhaps" and order.random() < 0.5
        left_out = {(asked["place"], aspects[0])} if is_absent else set()
        lines = [
            ASPECTS[aspect][0].format(**town)
            for town in towns
            for aspect in order.sample(sorted(ASPECTS), len(ASPECTS))
            if (town["place"], aspect) not in left_out
        ]
        context = " ".join(lines)
        prompt = (
            "Answer from the text alone, in whole sentences. If the text does not say it, say so."
            f"\n\nText: {context}\n\nOf {asked['place']}: {' and '.join(aspects)}?"
        )
        if is_absent:
            needs, answer = (
                [asked["place"]],
                f"The text does not say of {asked['place']} {aspects[0]}.",
            )
        else:
            needs = list(dict.fromkeys(_needs(asked, aspects)))
            answer = " ".join(ASPECTS[each][0].format(**asked) for each in aspects)
        reference = {"context": context, "needs": needs, "is_absent": is_absent, "oracle": answer}
        return Task(NAME, prompt, reference, source=self.name)

    def oracle(self, task: Task) -> str:
        """The context's own sentences, or that there is none."""
        return str(task.reference["oracle"])


def _needs(town: dict[str, str], aspects: list[str]) -> Iterator[str]:
    yield town["place"]
    for aspect in aspects:
        yield from (need.format(**town) for need in ASPECTS[aspect][1])


def _town(order: random.Random, place: str) -> dict[str, str]:
    who, keeper, friend = order.sample(_PEOPLE, 3)
    return {
        "place": place,
        "who": who,
        "keeper": keeper,
        "friend": friend,
        "year": str(order.randint(1100, 1900)),
        "number": f"{order.randint(2, 90)},{order.randint(100, 999)}",
        "length": str(order.randint(12, 480)),
        "trade": order.choice(_TRADES),
        "day": order.choice(_DAYS),
    }
