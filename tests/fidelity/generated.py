"""Pairs generated from ``schemas.jsonl``: sentences with slots, each said in two or three forms.

Half of the schemas are fitted to, no form of the other half is: *unseen*. ``denied``: forms that
say the contrary; ``turned``: the other order of events, or the other bound.
"""

import json
import random
from pathlib import Path

from tests.fidelity.pairs import STYLES, Pair, styled

SCHEMAS = [
    json.loads(line)
    for line in Path(__file__).with_name("schemas.jsonl").read_text("utf-8").splitlines()
]
FILLS = {
    "person": "Alda Brun,Ivo Kestrel,Mara Lind,Tomas Orel,Vera Santo,Jon Ferrow,Lena Quist,Piet Ab",
    "place": "Karsten,Molina,Oberau,Tarsk,Velden,Lorca,Pennick,Sundby",
    "thing": "mill,ferry,furnace,tower,organ,press,crane,lantern",
}
FACTS, PASSAGES_OF_A_HALF = 4, 40


def generated(half: str, seed: int = 0) -> list[Pair]:
    """Faithful rewrites in each style, and one of each kind that its facts allow."""
    random_ = random.Random(f"{half} {seed}")
    schemas = [schema for schema in SCHEMAS if schema["half"] == half]
    return [
        pair for number in range(PASSAGES_OF_A_HALF) for pair in _passage(schemas, number, random_)
    ]


def _passage(schemas: list[dict], number: int, random_: random.Random) -> list[Pair]:
    *chosen, other = random_.sample(schemas, FACTS + 1)
    facts = [(schema, _filled(schema, random_)) for schema in (*chosen, other)]
    extra = facts.pop()
    source = " ".join(schema["forms"][0].format(**slots) for schema, slots in facts)
    forms = [random_.randrange(1, len(schema["forms"])) for schema, _ in facts]
    good = [s["forms"][form].format(**slots) for (s, slots), form in zip(facts, forms, strict=True)]
    found = [("faithful", styled(style, good, number)) for style in STYLES]
    for place, (schema, slots) in enumerate(facts):
        for kind, said in _wrong(schema, slots, forms[place], random_):
            bad = [*good[:place], said, *good[place + 1 :]]
            found.append((kind, styled(random_.choice(STYLES), bad, number)))
    found.append(("omission", styled(random_.choice(STYLES), good[1:], number)))
    added = [*good, extra[0]["forms"][1].format(**extra[1])]
    found.append(("addition", styled(random_.choice(STYLES), added, number)))
    return [Pair("generated", source, text, kind, "test") for kind, text in found]


def _filled(schema: dict, random_: random.Random) -> dict[str, str]:
    kinds = dict(each.split("=") for each in schema["slots"].split())
    free = {kind: iter(random_.sample(fill.split(","), 8)) for kind, fill in FILLS.items()}
    free["year"] = iter(str(random_.randrange(1500, 1990)) for _ in range(8))
    free["number"] = iter(map(str, random_.sample(range(14, 900), 8)))
    return {slot: next(free[kind]) for slot, kind in kinds.items()}


def _wrong(schema: dict, slots: dict[str, str], form: int, random_: random.Random):
    """(kind, the sentence) for one kind that a schema allows, drawn."""
    text = schema["forms"][form]
    numbers = [slot for slot in slots if slot in "nmy"]
    other = _filled(schema, random_)
    made = {"negation": random_.choice(schema["denied"]).format(**slots)}
    made["entity"] = text.format(**slots | {"a": other["a"]})
    if schema.get("roles"):
        made["roles"] = text.format(**slots | {"a": slots["b"], "b": slots["a"]})
    if numbers:
        made["number"] = text.format(**slots | {numbers[0]: other[numbers[0]]})
    if len(numbers) > 1:
        made["swapped_numbers"] = text.format(**slots | {"n": slots["m"], "m": slots["n"]})
    if "turned" in schema:
        made["order"] = random_.choice(schema["turned"]).format(**slots)
    if made["entity"] == text.format(**slots):
        del made["entity"]
    kind = random_.choice(list(made))
    yield kind, made[kind]
