"""The world: one person's week, changed by tools that check what they are asked for.

A state is JSON: ``events`` by id, and ``notices`` that were sent and cannot be taken back. A notice
carries the event's time at that moment, so the order of calls shows in the state.
"""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
OPENS, CLOSES = 8 * 60, 18 * 60
"""Minutes of a day between which events lie."""

State = dict[str, Any]


class Refused(Exception):  # noqa: N818 - an answer of the world
    """A tool will not do it; the message is what the caller is told. Nothing has changed."""


def clock(minutes: int) -> str:
    """Minutes of the day as ``HH:MM``."""
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def minutes_of(text: str) -> int:
    """The inverse, for text that the schema let through."""
    hours, minutes = text.split(":")
    return 60 * int(hours) + int(minutes)


def list_events(state: State, day: str) -> Any:
    """Events of a day, by time."""
    found = [(name, each) for name, each in state["events"].items() if each["day"] == day]
    return [_shown(name, each) for name, each in sorted(found, key=lambda pair: pair[1]["start"])]


def create_event(
    state: State, title: str, day: str, start: str, minutes: int, people: list[str]
) -> Any:
    """A new event; its id is the next that is free."""
    event = {
        "title": title,
        "day": day,
        "start": minutes_of(start),
        "minutes": int(minutes),
        "people": sorted(people),
    }
    _check_free(state, event, "")
    number = 1
    while (name := f"new{number}") in state["events"]:
        number += 1
    state["events"][name] = event
    return _shown(name, event)


def move_event(state: State, event_id: str, day: str, start: str) -> Any:
    """Another time for an event."""
    event = {**_event(state, event_id), "day": day, "start": minutes_of(start)}
    _check_free(state, event, event_id)
    state["events"][event_id] = event
    return _shown(event_id, event)


def cancel_event(state: State, event_id: str) -> Any:
    """An event taken out of the calendar."""
    _event(state, event_id)
    del state["events"][event_id]
    return {"cancelled": event_id}


def send_notice(state: State, event_id: str, person: str) -> Any:
    """A notice of an event as it stands now, to one of its people."""
    event = _event(state, event_id)
    if person not in event["people"]:
        raise Refused(f"{person} is not in {event_id}; its people: {', '.join(event['people'])}")
    notice = {"person": person, **{name: event[name] for name in ("title", "day", "start")}}
    state["notices"].append(notice)
    return {"sent": {**notice, "start": clock(notice["start"])}}


def _event(state: State, event_id: str) -> dict[str, Any]:
    if event_id not in state["events"]:
        raise Refused(f"no event {event_id!r}; list_events names those of a day")
    return state["events"][event_id]


def _check_free(state: State, event: Mapping[str, Any], itself: str) -> None:
    begin, end = event["start"], event["start"] + event["minutes"]
    if begin < OPENS or end > CLOSES:
        raise Refused(f"events lie between {clock(OPENS)} and {clock(CLOSES)}")
    for name, other in state["events"].items():
        is_apart = other["start"] >= end or other["start"] + other["minutes"] <= begin
        if name != itself and other["day"] == event["day"] and not is_apart:
            raise Refused(f"{event['day']} {clock(begin)} is taken by {name} ({other['title']})")


def _shown(name: str, event: Mapping[str, Any]) -> dict[str, Any]:
    return {"event_id": name, **event, "start": clock(event["start"])}


def same_form(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """A state without what does not matter: ids of events, the order of either list."""
    lists = {"events": list(state["events"].values()), "notices": list(state["notices"])}
    return {
        name: sorted(json.dumps(each, sort_keys=True) for each in items)
        for name, items in lists.items()
    }


_DAY = {"type": "string", "enum": list(DAYS)}
_START = {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$", "description": "HH:MM"}
_ID = {"type": "string", "description": "as list_events gives it"}
_PEOPLE = {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True}
_TITLE = {"type": "string", "minLength": 1, "maxLength": 80}
_MINUTES = {"type": "integer", "minimum": 15, "maximum": 240}

TOOLS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "list_events": (list_events, "Events of a day, with their ids.", {"day": _DAY}),
    "create_event": (
        create_event,
        "Put an event at a free time.",
        {"title": _TITLE, "day": _DAY, "start": _START, "minutes": _MINUTES, "people": _PEOPLE},
    ),
    "move_event": (
        move_event,
        "Give an event another, free time.",
        {"event_id": _ID, "day": _DAY, "start": _START},
    ),
    "cancel_event": (cancel_event, "Take an event out.", {"event_id": _ID}),
    "send_notice": (
        send_notice,
        "Tell one of its people an event as it stands now; it cannot be taken back.",
        {"event_id": _ID, "person": {"type": "string"}},
    ),
}
"""Function, description, properties, all of them required."""


def changed(state: State, name: str, arguments: dict[str, Any]) -> tuple[State, Any]:
    """The state after a call whose arguments fit the schema, and what the call returns.

    Raises:
        Refused: the world will not do it.
    """
    after = copy.deepcopy(state)
    return after, TOOLS[name][0](after, **arguments)
