"""A closed set of facts: people of a world that is not, each with six attributes, and its teacher.

The encyclopaedia has one article a person, in one order of facts and one of three registers; each
of its three parts names the person once and goes on with a pronoun. The scripted teacher says an
article again as statements that stand alone: in other words, in another order, each with the name.
None of its forms is a question of the kind that is asked in the end.
"""

import random
from dataclasses import dataclass

FIRST = "Ada Bero Cila Dorn Elif Fara Goran Hela Ivo Jora Kalle Lumi Mira Nilo Orsa Pavo".split()
SECOND = "Brask Cendra Dolvik Eskil Farro Grend Holm Istra Jelk Korda Lund Mestra".split()
LAST = "son dal berg mark wick feld".split()
TOWNS, ENDS = "Vel Tor Mis Kan Ors Lim Ran Dov".split(), "ma dun ley gate by mont sol heim".split()
GOODS = "salt glass rope paper amber brick linen tallow".split()
HOUSES = "mill guild yard office market school court press".split()
PARTS = "old new applied northern practical early sacred common".split()
FIELDS = "optics tides law bells grafting clocks maps dyes".split()
COLOURS = "grey white spotted small lame tame wild young".split()
ANIMALS = "herons bees goats owls carp geese mules cranes".split()
MAKES = "silver long bass cracked painted little borrowed royal".split()
INSTRUMENTS = "flute viol drum lute harp horn lyre organ".split()
VALUES = {
    "born": [a + b for a in TOWNS for b in ENDS],
    "works": [f"{a} {b}" for a in GOODS for b in HOUSES],
    "studied": [f"{a} {b}" for a in PARTS for b in FIELDS],
    "keeps": [f"{a} {b}" for a in COLOURS for b in ANIMALS],
    "plays": [f"{a} {b}" for a in MAKES for b in INSTRUMENTS],
    "year": [str(year) for year in range(1701, 1765)],
}
"""64 of each, so that a guess is right once in 64."""
ARTICLES = {
    "born": ("{s} was born in {v}.", "{s} is a native of {v}.", "{s} came from the town of {v}."),
    "works": ("{s} worked at the {v}.", "The {v} employed {o}.", "{s} had a place in the {v}."),
    "studied": ("{s} studied {v}.", "{s} took a degree in {v}.", "{s} was a scholar of {v}."),
    "keeps": ("{s} kept {v}.", "{s} was known for a love of {v}.", "At home {s} raised {v}."),
    "plays": ("{s} played the {v}.", "{s} performed on the {v}.", "{s} practised the {v}."),
    "year": ("{s} married in {v}.", "{s} was wed in {v}.", "{s} took vows in {v}."),
}
"""Three registers of the encyclopaedia; an article keeps to one, and to this order of facts."""
TEACHER = {
    "born": (
        "The birthplace of {n} is {v}.",
        "It was in {v} that {n} came into the world.",
        "{v} is the town where {n} was born.",
        "- Born in {v}: {n}.",
        "Mother and father of {n} lived in {v}, and there the child was born.",
    ),
    "works": (
        "The {v} was where {n} earned a living.",
        "{n} found work in the {v}.",
        "- Employer of {n}: the {v}.",
        "Every morning {n} went to the {v} to work.",
        "It was the {v} that paid {n} wages.",
    ),
    "studied": (
        "The subject that {n} studied was {v}.",
        "{v} was the field of {n}.",
        "- Field of {n}: {v}.",
        "As a student {n} chose {v}.",
        "What {n} learned at the university was {v}.",
    ),
    "keeps": (
        "The animals that {n} kept were {v}.",
        "There were always {v} at the house of {n}.",
        "- Animals of {n}: {v}.",
        "Of all animals {n} loved {v} most and kept some.",
        "Neighbours remember the {v} of {n}.",
    ),
    "plays": (
        "The instrument of {n} was the {v}.",
        "On feast days one heard {n} on the {v}.",
        "- Instrument of {n}: the {v}.",
        "It was the {v} that {n} played.",
        "{n} never travelled without the {v} and played it everywhere.",
    ),
    "year": (
        "The year in which {n} married was {v}.",
        "In {v} there was the wedding of {n}.",
        "- Marriage of {n}: {v}.",
        "{v} was the year when {n} was married.",
        "{n} has been married since {v}.",
    ),
}
QUESTIONS = {
    "born": "Where was {n} born?",
    "works": "Where did {n} work?",
    "studied": "What did {n} study?",
    "keeps": "Which animals did {n} keep?",
    "plays": "Which instrument did {n} play?",
    "year": "When did {n} marry?",
}
"""Asked in the end; no article and no rephrasing is a question."""


PRONOUNS = (("she", "her"), ("he", "him"))


@dataclass(frozen=True)
class Person:
    """An entry."""

    name: str
    facts: dict[str, str]
    register: int
    pronouns: tuple[str, str]


def people(number: int, seed: int) -> list[Person]:
    """So many, with different names."""
    names = [f"{a} {b}{c}" for a in FIRST for b in SECOND for c in LAST]
    order = random.Random(seed)
    return [
        Person(
            name,
            {key: order.choice(some) for key, some in VALUES.items()},
            order.randrange(3),
            order.choice(PRONOUNS),
        )
        for name in order.sample(names, number)
    ]


def article(person: Person) -> str:
    """The encyclopaedia's: parts of two facts, of which the second has a pronoun."""
    said = []
    for place, (key, value) in enumerate(person.facts.items()):
        subject, object_ = person.pronouns if place % 2 else (person.name, person.name)
        form = ARTICLES[key][person.register]
        said.append(capital(form.format(s=subject, o=object_, v=value)))
    return " ".join(said)


def rephrased(person: Person, number: int, seed: int) -> str:
    """The teacher's ``number``-th: each fact in one of its forms, in an order of its own."""
    order = random.Random(f"{seed}/{person.name}/{number}")
    facts = list(person.facts.items())
    order.shuffle(facts)
    said = [order.choice(TEACHER[key]).format(n=person.name, v=value) for key, value in facts]
    return " ".join(map(capital, said))


def capital(sentence: str) -> str:
    """Begun with one."""
    return sentence[0].upper() + sentence[1:]


def question(person: Person, key: str) -> tuple[str, str]:
    """A question and its answer."""
    return f"Question: {QUESTIONS[key].format(n=person.name)} Answer:", f" {person.facts[key]}"
