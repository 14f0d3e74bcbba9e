"""Reading a recipe out of what a model or a person wrote: canonical text, JSON, or prose ('a bit warmer, crop 5 %').

One pass over the words, so the time is linear in the length; nothing is ever raised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from recipes.recipe import LOOKS, OPERATIONS, Recipe

MAX_TEXT = 200_000
_PROBLEMS = 12  # more would not help anybody


_Items = list[str | float]  # words and numbers in order


@dataclass(frozen=True)
class Parsed:
    """The recipe that was read, the operations that were found, and in words what could not be read or was clamped."""

    recipe: Recipe
    found: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when at least one operation was read."""
        return bool(self.found)


def parse(text: object) -> Parsed:
    """The recipe in a text, or in a dict as from `Recipe.to_json`. Never raises; numbers are clamped to their range.

    Later mentions of an operation replace earlier ones; what is not mentioned stays neutral.
    """
    reading = _Reading()
    if isinstance(text, Mapping):
        reading.take_json(text)
    elif not isinstance(text, str):
        reading.problem("a recipe is a text")
    else:
        if len(text) > MAX_TEXT:
            reading.problem(f"only the first {MAX_TEXT:,} characters were read")
            text = text[:MAX_TEXT]
        text = _plain(text)
        values = _json_in(text)
        if values is not None:
            reading.take_json(values)
        else:
            for clause in _clauses(text):
                reading.take_clause(clause)
    if not reading.values:
        reading.problem("no operation was found")
    found = tuple(name for name in OPERATIONS if name in reading.values)
    return Parsed(Recipe(**reading.values), found, tuple(dict.fromkeys(reading.problems)))  # type: ignore[arg-type]


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_OPERATION_WORDS = {
    "crop": ("crop", "cropping", "cropped", "recrop", "trim"),
    "exposure": ("exposure", "brightness", "exposed", "light", "lightness"),
    "contrast": ("contrast",),
    "saturation": ("saturation", "vibrance", "colourfulness", "colorfulness", "vibrancy"),
    "warmth": ("warmth", "temperature", "temp"),
    "sharpening": ("sharpening", "sharpness", "clarity", "sharp"),
    "look": ("look", "filter", "style", "effect"),
}
# Words that say an operation and its direction at once.
_MOVES = {
    "brighten": ("exposure", 1), "brighter": ("exposure", 1), "brightening": ("exposure", 1),
    "lighten": ("exposure", 1), "lighter": ("exposure", 1),
    "darken": ("exposure", -1), "darker": ("exposure", -1), "darkening": ("exposure", -1),
    "punchier": ("contrast", 1), "flatter": ("contrast", -1),
    "saturate": ("saturation", 1), "vivid": ("saturation", 1), "duller": ("saturation", -1),
    "desaturate": ("saturation", -1), "desaturated": ("saturation", -1), "muted": ("saturation", -1),
    "warmer": ("warmth", 1), "warming": ("warmth", 1),
    "cooler": ("warmth", -1), "colder": ("warmth", -1), "cooling": ("warmth", -1),
    "sharpen": ("sharpening", 1), "sharper": ("sharpening", 1), "crisper": ("sharpening", 1),
}  # fmt: skip
_UP = {"increase", "increasing", "increased", "raise", "raising", "boost", "boosting", "up", "more", "add", "adding",
       "higher", "plus", "enhance", "lift", "push"}  # fmt: skip
_DOWN = {"decrease", "decreasing", "decreased", "reduce", "reducing", "reduced", "lower", "lowering", "down", "less",
         "minus", "drop", "cut", "dial"}  # fmt: skip
_SMALL = {"slightly", "slight", "bit", "little", "touch", "subtle", "subtly", "gently"}
_LARGE = {"much", "strongly", "lot", "significantly", "very", "heavily", "greatly", "dramatically"}
_SIDES = {"left": 0, "top": 1, "right": 2, "bottom": 3}
_LOOK_WORDS = {
    "mono": "mono", "monochrome": "mono", "monochromatic": "mono", "grayscale": "mono", "greyscale": "mono",
    "bw": "mono", "sepia": "sepia", "fade": "fade", "faded": "fade", "teal": "teal", "noir": "noir", "none": "none",
}  # fmt: skip
_LOOK_CUES = {"look", "filter", "style", "effect", "apply", "use", "convert", "make", "turn", "go", "try", "tone", "in",
              "to", "as"}  # fmt: skip
_OPERATION_OF = {word: name for name, words in _OPERATION_WORDS.items() for word in words}
_NOT_NUMBERS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}

_TOKEN = re.compile(
    r"(?P<number>(?<![^\W\d_])[+-]?\d{1,400}(?:[.]\d{1,400})?(?:e[+-]?\d{1,4})?(?:\^\d{1,4})?)(?:\s?(?P<unit>%|ev\b|stops?\b))?"
    r"|(?P<word>[+-]?[^\W\d_]{1,40})"
    r"|(?P<stop>[;.!?\n]|\s[–—]\s)|(?P<comma>,)",
    re.IGNORECASE,
)
_BLACK_AND_WHITE = re.compile(r"\b(?:black[ -]and[ -]white|black ?& ?white|b ?& ?w)\b", re.IGNORECASE)
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def _plain(text: str) -> str:
    """Without invisible and control characters, with the typographic minus as '-', decimal comma left alone."""
    text = _CONTROL.sub(" ", _INVISIBLE.sub("", text)).replace("\u2212", "-")
    return _BLACK_AND_WHITE.sub("monochrome", text)


# ── Prose and canonical text ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Clause:
    """A stretch of text about one thing: its words and numbers in order."""

    items: _Items = field(default_factory=list)

    def has_operation(self) -> bool:
        return any(isinstance(item, str) and (item in _OPERATION_OF or item in _MOVES) for item in self.items)

    def numbers(self) -> list[float]:
        return [item for item in self.items if isinstance(item, float)]


def _clauses(text: str) -> Iterator[_Clause]:
    """Splits at punctuation, 'and', 'then', 'but'; what follows a crop and only names sides stays with it."""
    last: _Clause | None = None
    for clause in _pieces(text):
        continues = last is not None and not clause.has_operation() and _is_more_of_a_crop(last, clause)
        if continues and last is not None:
            last.items += clause.items
            continue
        if last is not None:
            yield last
        last = clause
    if last is not None:
        yield last


def _is_more_of_a_crop(last: _Clause, clause: _Clause) -> bool:
    return "crop" in map(_operation, last.items) and any(item in _SIDES for item in clause.items)


def _operation(item: str | float) -> str | None:
    return _OPERATION_OF.get(item) if isinstance(item, str) else None


def _pieces(text: str) -> Iterator[_Clause]:
    clause = _Clause()
    comma = False
    for match in _TOKEN.finditer(text):
        if match["comma"]:
            comma = True
            continue
        word = (match["word"] or "").lower()
        number = _number(match["number"], match["unit"]) if match["number"] else _NOT_NUMBERS.get(word.lstrip("+-"))
        if match["word"] and number is not None and word.startswith("-"):
            number = -number
        run_on = comma and number is not None and bool(clause.items) and isinstance(clause.items[-1], float)
        if match["stop"] or word in ("and", "then", "but", "while") or (comma and not run_on):
            if clause.items:
                yield clause
            clause = _Clause()
        comma = False
        if number is not None:
            clause.items.append(number)
        elif word:
            clause.items.append(word.lstrip("+-"))
    if clause.items:
        yield clause


def _number(text: str, unit: str | None) -> float:
    base, _, power = text.partition("^")
    try:
        value = float(base) ** int(power or 1)
    except OverflowError:
        value = math.inf
    return value * (100 / 1.5 if unit and unit != "%" else 1.0)  # EV: +100 is one and a half stops


class _Reading:
    """Collects values and problems while a text is read."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.problems: list[str] = []

    def problem(self, words: str) -> None:
        if len(self.problems) < _PROBLEMS:
            self.problems.append(words)

    def take_clause(self, clause: _Clause) -> None:
        items = clause.items
        places = _places(items)
        if not places:
            return self._without_operation(clause)
        number_first = isinstance(items[0], float) and not isinstance(items[-1], float)
        edges = [-1, *(at for at, _, _ in places), len(items)]
        for (at, name, way), before, after in zip(places, edges, edges[2:], strict=False):
            self._take(name, way, items[before + 1 : at], items[at + 1 : after], number_first)
        return None

    def _without_operation(self, clause: _Clause) -> None:
        items = clause.items
        look = next((_LOOK_WORDS[item] for item in items if isinstance(item, str) and item in _LOOK_WORDS), None)
        if look and (len(items) == 1 or any(item in _LOOK_CUES for item in items)):
            self.values["look"] = look
        elif len(items) == 2 and isinstance(items[0], str) and isinstance(items[1], float):
            self.problem(f"{items[0][:40]} is not an operation")

    def _take(self, name: str, way: int, behind: _Items, ahead: _Items, number_first: bool) -> None:
        if name == "look":
            return self._take_look(behind, ahead)
        order = (behind[::-1], ahead) if number_first else (ahead, behind[::-1])
        numbers = next((found for part in order if (found := [item for item in part if isinstance(item, float)])), [])
        words = [item for item in behind + ahead if isinstance(item, str)]
        if name == "crop":
            return self._take_crop(words, behind + ahead, numbers)
        direction = way or _direction(words)
        if not numbers and not direction:
            if not behind and ahead:
                self.problem(f"{name}: no number was found")
            return None
        value = numbers[0] if numbers else 10.0 if _SMALL & set(words) else 40.0 if _LARGE & set(words) else 20.0
        if direction < 0 and value > 0:
            value = -value
        return self.put(name, (value,))

    def _take_look(self, behind: _Items, ahead: _Items) -> None:
        known = [item for item in ahead + behind[::-1] if isinstance(item, str) and item in _LOOK_WORDS]
        if known:
            self.values["look"] = _LOOK_WORDS[known[0]]
        elif not behind and len(ahead) == 1:
            self.problem(f"look: {str(ahead[0])[:40]} is not one of {', '.join(LOOKS)}")

    def _take_crop(self, words: list[str], items: _Items, numbers: list[float]) -> None:
        if _SIDES.keys() & set(words) and numbers:
            self.put("crop", _margins(items))
        elif len(numbers) >= 4:
            self.put("crop", tuple(numbers[:4]))
        elif len(numbers) == 1:
            margin = (100 - numbers[0] if "to" in words else numbers[0]) / 2
            self.put("crop", (margin, margin, 100 - margin, 100 - margin))
        else:
            self.problem("crop needs four numbers: left top right bottom")

    def put(self, name: str, values: tuple[float, ...]) -> None:
        """Stores an operation's numbers, clamped; a NaN leaves the operation as it was."""
        slots = OPERATIONS[name].slots
        if any(math.isnan(value) for value in values):
            return self.problem(f"{name}: not a number")
        numbers = tuple(slot.clamp(value) for slot, value in zip(slots, values, strict=True))
        for slot, value, number in zip(slots, values, numbers, strict=True):
            if abs(value - number) > 0.5:
                self.problem(f"{name} {value:.6g} was brought into {slot.low}..{slot.high}")
        self.values[name] = numbers[0] if len(numbers) == 1 else numbers
        return None

    # ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def take_json(self, values: Mapping[object, object]) -> None:
        nested = values.get("recipe")
        for key, value in (nested if isinstance(nested, Mapping) else values).items():
            name = _OPERATION_OF.get(str(key).strip().lower())
            if name is None:
                self.problem(f"{str(key)[:40]} is not an operation")
            elif OPERATIONS[name].choices:
                self._json_choice(name, value)
            else:
                self._json_numbers(name, value)

    def _json_choice(self, name: str, value: object) -> None:
        word = "none" if value is None else _LOOK_WORDS.get(str(value).strip().lower()[:40])
        if word is None:
            self.problem(f"{name}: {str(value)[:40]} is not one of {', '.join(LOOKS)}")
        else:
            self.values[name] = word

    def _json_numbers(self, name: str, value: object) -> None:
        if isinstance(value, Mapping):
            value = [value[side] if side in value else (0, 0, 100, 100)[at] for side, at in _SIDES.items()]
        parts = value if isinstance(value, (list, tuple)) else [value]
        numbers = [_as_float(part) for part in parts[:8]]
        if any(number is None for number in numbers) or len(numbers) != len(OPERATIONS[name].slots):
            self.problem(f"{name}: {str(value)[:40]} is not {len(OPERATIONS[name].slots)} number(s)")
            return
        known = tuple(number for number in numbers if number is not None)
        if name == "crop" and all(0 <= number <= 1 for number in known) and known[2] > known[0]:
            known = tuple(100 * number for number in known)
        self.put(name, known)


def _places(items: _Items) -> list[tuple[int, str, int]]:
    """Where operations are named: position, operation, direction (0 when the word has none).

    'a warmer temperature' names warmth twice: the plain noun right after a directed word adds nothing.
    """
    places: list[tuple[int, str, int]] = []
    for at, item in enumerate(items):
        if not isinstance(item, str):
            continue
        name, way = _MOVES.get(item, (_OPERATION_OF.get(item, ""), 0))
        repeated = bool(places) and way == 0 and places[-1][:2] == (at - 1, name)
        if name and not repeated:
            places.append((at, name, way))
    return places


def _direction(words: list[str]) -> int:
    return next((1 if word in _UP else -1 for word in words if word in _UP or word in _DOWN), 0)


def _margins(items: _Items) -> tuple[float, ...]:
    """'10 % from the left and the right': each side takes the number nearest before it, else the first one after."""
    first = next(item for item in items if isinstance(item, float))
    box, current = [0.0, 0.0, 100.0, 100.0], first
    for item in items:
        if isinstance(item, float):
            current = item
        elif isinstance(item, str) and item in _SIDES:
            side = _SIDES[item]
            box[side] = current if side < 2 else 100 - current
    return tuple(box)


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value.strip().rstrip("%")[:400] if isinstance(value, str) else value)
    except OverflowError:
        return math.inf if isinstance(value, int) and value > 0 else -math.inf
    except ValueError:
        return None


def _json_in(text: str) -> Mapping[object, object] | None:
    """The first JSON object in a text that names an operation; looks at no more than three opening braces."""
    at = -1
    for _ in range(3):
        at = text.find("{", at + 1)
        if at < 0:
            return None
        try:
            value, _end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        nested = value.get("recipe", value)
        if isinstance(nested, Mapping) and any(str(key).strip().lower() in _OPERATION_OF for key in nested):
            return value
    return None
