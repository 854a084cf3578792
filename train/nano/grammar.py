"""A sentence grammar of home, travel and shopping commands with named slots: the texts of the demo's speech set.

A template is text with fields: `{room}` draws from VALUES["room"]; `{origin:city}` draws from VALUES["city"] into the
slot `origin`; `{action=add|put}` draws from the words given. Every sentence is lower case without punctuation, as a
transcript is, and every slot's value stands in it word for word.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

VALUES: dict[str, tuple[str, ...]] = {
    "device": ("lights", "lamp", "heater", "fan", "radio", "television", "oven", "alarm", "camera", "speaker"),
    "room": ("kitchen", "bedroom", "living room", "bathroom", "garage", "office", "hallway", "garden", "basement"),
    "color": ("red", "green", "blue", "yellow", "purple", "orange", "white", "pink"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "thirty"),
    "degree": ("sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty one", "twenty two"),
    "hour": ("five", "six", "seven", "eight", "nine", "ten", "eleven"),
    "unit": ("seconds", "minutes", "hours"),
    "item": ("apples", "bananas", "tomatoes", "eggs", "lemons", "onions", "candles", "batteries", "pencils", "towels"),
    "food": ("milk", "bread", "coffee", "rice", "butter", "cheese", "sugar", "honey", "pepper", "chocolate"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "city": ("london", "paris", "berlin", "madrid", "tokyo", "boston", "chicago", "dublin", "vienna", "toronto"),
    "person": ("anna", "robert", "maria", "david", "sarah", "michael", "emma", "peter", "laura", "thomas"),
    "place": ("pharmacy", "bakery", "museum", "hospital", "library", "station", "hotel", "market"),
    "genre": ("jazz", "rock", "classical", "country", "dance", "piano"),
    "time": ("morning", "afternoon", "evening"),
}

TEMPLATES: tuple[str, ...] = (
    "{action=turn on|turn off|switch on|switch off} the {device} in the {room}",
    "{action=turn on|turn off} the {device} at {number:hour} in the {time}",
    "{action=set|change} the {room} lights to {color}",
    "{action=set|keep} the {room} at {number:degree} degrees",
    "{action=set|start|cancel} the timer for {number} {unit}",
    "{action=play|stop} the {genre} music in the {room}",
    "{action=open|close} the {room} window in {number} minutes",
    "{action=wake me} at {number:hour} on {day} {time}",
    "what is the weather in {city} on {day}",
    "{action=book|find|cancel} a flight from {origin:city} to {city} on {day}",
    "{action=book|find} a train to {city} on {day} {time}",
    "{action=reserve|book} a hotel in {city} for {number} nights",
    "{action=find} the nearest {place} in {city}",
    "how far is the {place} from the {origin:place}",
    "{action=meet|visit} {person} in {city} on {day}",
    "{action=call|text} {person} about the {food} on {day}",
    "{action=tell} {person} i will be {number} {unit} late",
    "{action=send} {number} {item} to {person} on {day}",
    "{action=add|put} {number} {item} on the shopping list",
    "{action=add} {food} and {item} to the shopping list",
    "{action=order|buy} {number} {color} {item}",
    "{action=remind me} to buy {food} on {day} {time}",
    "how much {food} is left in the {room}",
)

_FIELD = re.compile(r"\{(\w+)(?::(\w+)|=([^}]+))?\}")


@dataclass(frozen=True)
class Sentence:
    """A text and the slots in it, e.g. ("turn on the lamp in the office", {"action": "turn on", ...})."""

    text: str
    slots: dict[str, str]


def _fields(template: str) -> list[tuple[str, tuple[str, ...]]]:
    """(slot, its possible values) for each field of a template, in order."""
    return [(slot, tuple(words.split("|")) if words else VALUES[name or slot])
            for slot, name, words in _FIELD.findall(template)]


def _fill(template: str, slots: dict[str, str]) -> Sentence | None:
    """None where two slots took the same value (a flight from london to london)."""
    if len(set(slots.values())) < len(slots):
        return None
    return Sentence(_FIELD.sub(lambda field: slots[field[1]], template), slots)


def all_sentences() -> Iterator[Sentence]:
    """Every sentence of the grammar, template by template."""
    for template in TEMPLATES:
        names, values = zip(*_fields(template), strict=True)
        for choice in itertools.product(*values):
            if sentence := _fill(template, dict(zip(names, choice, strict=True))):
                yield sentence


def sample(n: int, rng: random.Random) -> list[Sentence]:
    """`n` distinct sentences, each template as likely as the next; a longer sample begins with the shorter one.

    Raises ValueError naming `n` where it is negative or more than half of what the grammar holds (drawing the last
    ones would take for ever).
    """
    most = sum(1 for _ in all_sentences()) // 2
    if not 0 <= n <= most:
        raise ValueError(f"n: must be in [0, {most}], got {n}")
    found: dict[str, Sentence] = {}
    while len(found) < n:
        template = rng.choice(TEMPLATES)
        sentence = _fill(template, {slot: rng.choice(values) for slot, values in _fields(template)})
        if sentence:
            found.setdefault(sentence.text, sentence)
    return list(found.values())
