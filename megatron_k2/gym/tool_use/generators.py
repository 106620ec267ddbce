"""Requests about a week, with the state they lead to worked out beside the tools, not by them."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from megatron_k2.chat.call_ids import call_id
from megatron_k2.chat.template import CANONICAL, generation_prompt, turn
from megatron_k2.gym.drawn import DrawnGenerator
from megatron_k2.gym.protocol import Task
from megatron_k2.gym.tool_use.calendar import CLOSES, DAYS, OPENS, State, clock
from megatron_k2.gym.tool_use.calls import tool_specs
from megatron_k2.gym.tool_use.env import NAME
from megatron_k2.records.messages import Message, ToolCall

FIRST = tuple("Ana Ben Chi Dov Eva Femi Gus Hana Ines Jun".split())
LAST = tuple("Abe Bauer Cruz Diaz Eko Fox Gray Hahn Ito Juarez".split())
NUM_PEOPLE = 6
WORDS = ("budget", "design", "launch", "hiring", "safety", "press", "garden", "archive", "harvest")
KINDS = ("review", "lunch", "interview", "rehearsal", "check-in", "walk")
SLOT = 60
"""Minutes between beginnings; every event fits into one."""

type Call = tuple[str, dict[str, Any]]
type Form = Callable[[random.Random, State], tuple[str, State, list[Call]]]
"""Draws a request; gives its text, the goal, and calls that reach it."""


def people_of(order: random.Random) -> list[str]:
    """Names, no first name twice."""
    firsts, lasts = order.sample(FIRST, NUM_PEOPLE), order.sample(LAST, NUM_PEOPLE)
    return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


def week(order: random.Random) -> State:
    """A state of a dozen events, no title twice, at least one on each day."""
    slots = [(day, start) for day in DAYS for start in range(OPENS, CLOSES, SLOT)]
    taken = [(day, order.choice([s for d, s in slots if d == day])) for day in DAYS]
    taken += order.sample([slot for slot in slots if slot not in taken], 7)
    titles = order.sample([f"{word} {kind}" for word in WORDS for kind in KINDS], len(taken))
    names = order.sample(range(100, 1000), len(taken))
    people = people_of(order)
    events = {
        f"e{name}": {
            "title": title,
            "day": day,
            "start": start,
            "minutes": order.choice((30, 45, 60)),
            "people": sorted(order.sample(people, order.randint(1, 3))),
        }
        for name, title, (day, start) in zip(names, titles, taken, strict=True)
    }
    return {"events": events, "notices": []}


def _free(order: random.Random, state: State, number: int) -> list[tuple[str, int]]:
    taken = {(event["day"], event["start"]) for event in state["events"].values()}
    slots = [(day, start) for day in DAYS for start in range(OPENS, CLOSES, SLOT)]
    return order.sample([slot for slot in slots if slot not in taken], number)


def _notice(event: dict[str, Any], person: str) -> dict[str, Any]:
    return {"person": person, **{name: event[name] for name in ("title", "day", "start")}}


def _book(order: random.Random, state: State) -> tuple[str, State, list[Call]]:
    ((day, start),) = _free(order, state, 1)
    people = sorted(people_of(order)[:2])
    minutes = order.choice((30, 45, 60))
    title = f"{order.choice(WORDS)} workshop"
    goal = copy.deepcopy(state)
    event = {"title": title, "day": day, "start": start, "minutes": minutes, "people": people}
    goal["events"]["new"] = event
    goal["notices"] = [_notice(event, people[0])]
    asked = (
        f"Book '{title}' with {people[0]} and {people[1]} on {day} at {clock(start)} for {minutes} "
        f"minutes, and send {people[0]} a notice of it."
    )
    calls: list[Call] = [
        ("create_event", {**event, "start": clock(start)}),
        ("send_notice", {"event_id": "new1", "person": people[0]}),
    ]
    return asked, goal, calls


def _move(order: random.Random, state: State) -> tuple[str, State, list[Call]]:
    name = order.choice(list(state["events"]))
    ((day, start),) = _free(order, state, 1)
    goal = copy.deepcopy(state)
    event = goal["events"][name]
    was = event["day"]
    event |= {"day": day, "start": start}
    goal["notices"] = [_notice(event, person) for person in event["people"]]
    asked = (
        f"Move '{event['title']}', which is on {was}, to {day} at {clock(start)}. Send each of its "
        "people a notice of the new time, once."
    )
    calls: list[Call] = [
        ("list_events", {"day": was}),
        ("move_event", {"event_id": name, "day": day, "start": clock(start)}),
        *(("send_notice", {"event_id": name, "person": person}) for person in event["people"]),
    ]
    return asked, goal, calls


def _swap(order: random.Random, state: State) -> tuple[str, State, list[Call]]:
    first, second = order.sample(list(state["events"]), 2)
    ((day, start),) = _free(order, state, 1)
    goal = copy.deepcopy(state)
    one, other = goal["events"][first], goal["events"][second]
    places = [(one["day"], one["start"]), (other["day"], other["start"])]
    (other["day"], other["start"]), (one["day"], one["start"]) = places
    asked = (
        f"'{one['title']}' ({other['day']}) and '{other['title']}' ({one['day']}) should change "
        "places: each takes the day and the start of the other. Tell nobody."
    )
    targets = [(second, day, start), (first, *places[1]), (second, *places[0])]
    calls: list[Call] = [
        ("move_event", {"event_id": name, "day": to, "start": clock(at)})
        for name, to, at in targets
    ]
    return asked, goal, calls


def _clear(order: random.Random, state: State) -> tuple[str, State, list[Call]]:
    name = order.choice(list(state["events"]))
    person, since = order.choice(state["events"][name]["people"]), state["events"][name]["day"]
    days = DAYS[DAYS.index(since) :]
    goal = copy.deepcopy(state)
    gone = [
        name
        for name, each in state["events"].items()
        if person in each["people"] and each["day"] in days
    ]
    goal["notices"] = [_notice(goal["events"].pop(name), person) for name in gone]
    asked = (
        f"{person} is away from {since} on, until the end of this week. Cancel every event of "
        f"those days that {person} is in, after sending {person}, and nobody else, one notice of "
        "each."
    )
    calls: list[Call] = []
    for name in gone:
        calls.append(("send_notice", {"event_id": name, "person": person}))
        calls.append(("cancel_event", {"event_id": name}))
    return asked, goal, calls


FORMS: dict[str, Form] = {"book": _book, "move": _move, "swap": _swap, "clear": _clear}


def as_calls(calls: list[Call]) -> tuple[ToolCall, ...]:
    """With K2's ids, counted from 0."""
    return tuple(
        ToolCall(call_id(name, number), name, json.dumps(arguments))
        for number, (name, arguments) in enumerate(calls)
    )


def as_text(message: Message) -> str:
    """A turn as K2 writes it, after its header."""
    pieces = turn(message, CANONICAL)[len(generation_prompt()) :]
    return "".join(piece.text for piece in pieces)


class ToolUseGenerator(DrawnGenerator):
    """One form of request; each draws another week."""

    domain = NAME

    def _made(self, order: random.Random) -> Task:
        state = week(order)
        asked, goal, calls = FORMS[self._form](order, state)
        reference = {"state": state, "goal": goal, "solution": [list(call) for call in calls]}
        return Task(NAME, asked, reference, tools=tool_specs(), source=self.name)

    def oracle(self, task: Task) -> str:
        """The calls that the request was made with, as one turn."""
        calls = as_calls([(name, arguments) for name, arguments in task.reference["solution"]])
        return as_text(Message("assistant", tool_calls=calls))
