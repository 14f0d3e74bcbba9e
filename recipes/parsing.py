"""Parse recipes from canonical text, JSON, or prose such as 'a bit warmer, crop 5 %'.

The parser makes one pass over the tokens, so its time is linear in the length of the text. It never raises.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recipes.grammar import LOOKS, OPERATIONS
from recipes.recipe import Recipe

MAX_TEXT = 200_000  # characters
_MAX_PROBLEMS = 12

_Tokens = list[str | float]  # lower-case words and numbers, in order


@dataclass(frozen=True)
class Parsed:
    """The result of `parse`.

    Attributes:
        recipe: The parsed recipe; operations that were not mentioned are neutral.
        operations: Names of the operations that were found.
        problems: Messages about everything that was clamped or could not be parsed.
    """

    recipe: Recipe
    operations: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether at least one operation was found."""
        return bool(self.operations)


def parse(source: object) -> Parsed:
    """Parse a recipe from text, or from a mapping as `Recipe.to_json` returns it. Never raises.

    Numbers are clamped to their range. A later mention of an operation replaces an earlier one.
    """
    parser = _Parser()
    if isinstance(source, Mapping):
        parser.read_json(source)
    elif not isinstance(source, str):
        parser.add_problem("a recipe must be text or a JSON object")
    else:
        if len(source) > MAX_TEXT:
            parser.add_problem(f"only the first {MAX_TEXT:,} characters were read")
        text = _normalize(source[:MAX_TEXT])
        values = _find_json(text)
        if values is not None:
            parser.read_json(values)
        else:
            for clause in _split_clauses(text):
                parser.read_clause(clause)
    if not parser.values:
        parser.add_problem("no operation was found")
    operations = tuple(name for name in OPERATIONS if name in parser.values)
    return Parsed(Recipe(**parser.values), operations, tuple(dict.fromkeys(parser.problems)))  # type: ignore[arg-type]


# ── Vocabulary ────────────────────────────────────────────────────────────────────────────────────────────────────────

_OPERATION_WORDS = {
    "crop": ("crop", "cropping", "cropped", "recrop", "trim"),
    "exposure": ("exposure", "brightness", "exposed", "light", "lightness"),
    "contrast": ("contrast",),
    "saturation": ("saturation", "vibrance", "colourfulness", "colorfulness", "vibrancy"),
    "warmth": ("warmth", "temperature", "temp"),
    "sharpening": ("sharpening", "sharpness", "clarity", "sharp"),
    "look": ("look", "filter", "style", "effect"),
}
# Words that name an operation and its direction.
_DIRECTED_WORDS = {
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


def _normalize(text: str) -> str:
    """Remove invisible and control characters, and turn the typographic minus into '-'."""
    text = _CONTROL.sub(" ", _INVISIBLE.sub("", text)).replace("\u2212", "-")
    return _BLACK_AND_WHITE.sub("monochrome", text)


# ── Prose and canonical text ─────────────────────────────────────────────────────────────────────────────────────────


def _split_clauses(text: str) -> Iterator[_Tokens]:
    """Split text into clauses about one thing each.

    A clause that names only sides belongs to a preceding crop: 'crop 10 % from the left, and 5 % from the top'.
    """
    previous: _Tokens | None = None
    for clause in _split_at_punctuation(text):
        names_operation = any(isinstance(t, str) and (t in _OPERATION_OF or t in _DIRECTED_WORDS) for t in clause)
        names_side = any(token in _SIDES for token in clause)
        after_crop = any(isinstance(token, str) and _OPERATION_OF.get(token) == "crop" for token in previous or ())
        if previous is not None and after_crop and names_side and not names_operation:
            previous += clause
            continue
        if previous is not None:
            yield previous
        previous = clause
    if previous is not None:
        yield previous


def _split_at_punctuation(text: str) -> Iterator[_Tokens]:
    """Split text into tokens, and these at punctuation and at 'and', 'then', 'but', 'while'.

    A comma between two numbers does not split.
    """
    clause: _Tokens = []
    comma = False
    for match in _TOKEN.finditer(text):
        if match["comma"]:
            comma = True
            continue
        word = (match["word"] or "").lower()
        number = _number(match["number"], match["unit"]) if match["number"] else _NOT_NUMBERS.get(word.lstrip("+-"))
        if match["word"] and number is not None and word.startswith("-"):
            number = -number
        continues_numbers = comma and number is not None and bool(clause) and isinstance(clause[-1], float)
        if match["stop"] or word in ("and", "then", "but", "while") or (comma and not continues_numbers):
            if clause:
                yield clause
            clause = []
        comma = False
        if number is not None:
            clause.append(number)
        elif word:
            clause.append(word.lstrip("+-"))
    if clause:
        yield clause


def _number(text: str, unit: str | None) -> float:
    base, _, power = text.partition("^")
    try:
        value = float(base) ** int(power or 1)
    except OverflowError:
        value = math.inf
    return value * (100 / 1.5 if unit and unit != "%" else 1.0)  # stops (EV): +100 is 1.5 stops


class _Parser:
    """Collects operation values and problems while text or JSON is read."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.problems: list[str] = []

    def add_problem(self, message: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(message)

    def read_clause(self, tokens: _Tokens) -> None:
        mentions = _find_operations(tokens)
        if not mentions:
            return self._read_look_only(tokens)
        number_first = isinstance(tokens[0], float) and not isinstance(tokens[-1], float)
        edges = [-1, *(index for index, _, _ in mentions), len(tokens)]
        for (index, name, direction), start, end in zip(mentions, edges, edges[2:], strict=False):
            self._read_operation(name, direction, tokens[start + 1 : index], tokens[index + 1 : end], number_first)
        return None

    def _read_look_only(self, tokens: _Tokens) -> None:
        """Read a clause that names no operation, such as 'in black and white'."""
        look = next((_LOOK_WORDS[token] for token in tokens if isinstance(token, str) and token in _LOOK_WORDS), None)
        if look and (len(tokens) == 1 or any(token in _LOOK_CUES for token in tokens)):
            self.values["look"] = look
        elif len(tokens) == 2 and isinstance(tokens[0], str) and isinstance(tokens[1], float):
            self.add_problem(f"{tokens[0][:40]} is not an operation")

    def _read_operation(self, name: str, direction: int, before: _Tokens, after: _Tokens, number_first: bool) -> None:
        """Read one mentioned operation from the tokens before and after its name."""
        if name == "look":
            return self._read_look(before, after)
        search_order = (before[::-1], after) if number_first else (after, before[::-1])
        numbers = next(
            (numbers for part in search_order if (numbers := [token for token in part if isinstance(token, float)])), []
        )
        words = [token for token in before + after if isinstance(token, str)]
        if name == "crop":
            return self._read_crop(words, before + after, numbers)
        if not direction:
            direction = next((1 if word in _UP else -1 for word in words if word in _UP or word in _DOWN), 0)
        if not numbers and not direction:
            if not before and after:
                self.add_problem(f"{name}: no number was found")
            return None
        value = numbers[0] if numbers else 10.0 if _SMALL & set(words) else 40.0 if _LARGE & set(words) else 20.0
        if direction < 0 and value > 0:
            value = -value
        return self.store(name, (value,))

    def _read_look(self, before: _Tokens, after: _Tokens) -> None:
        looks = [token for token in after + before[::-1] if isinstance(token, str) and token in _LOOK_WORDS]
        if looks:
            self.values["look"] = _LOOK_WORDS[looks[0]]
        elif not before and len(after) == 1:
            self.add_problem(f"look: {str(after[0])[:40]} is not one of {', '.join(LOOKS)}")

    def _read_crop(self, words: list[str], tokens: _Tokens, numbers: list[float]) -> None:
        if _SIDES.keys() & set(words) and numbers:
            self.store("crop", _crop_from_sides(tokens))
        elif len(numbers) >= 4:
            self.store("crop", tuple(numbers[:4]))
        elif len(numbers) == 1:
            margin = (100 - numbers[0] if "to" in words else numbers[0]) / 2
            self.store("crop", (margin, margin, 100 - margin, 100 - margin))
        else:
            self.add_problem("crop needs four numbers: left top right bottom")

    def store(self, name: str, values: tuple[float, ...]) -> None:
        """Store an operation's numbers, clamped. NaN leaves the operation unchanged."""
        slots = OPERATIONS[name].slots
        if any(math.isnan(value) for value in values):
            return self.add_problem(f"{name}: not a number")
        numbers = tuple(slot.clamp(value) for slot, value in zip(slots, values, strict=True))
        for slot, value, number in zip(slots, values, numbers, strict=True):
            if abs(value - number) > 0.5:
                self.add_problem(f"{name} {value:.6g} was clamped to {slot.low}..{slot.high}")
        self.values[name] = numbers[0] if len(numbers) == 1 else numbers
        return None

    # ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read_json(self, values: Mapping[object, object]) -> None:
        nested = values.get("recipe")
        for key, value in (nested if isinstance(nested, Mapping) else values).items():
            name = _OPERATION_OF.get(str(key).strip().lower())
            if name is None:
                self.add_problem(f"{str(key)[:40]} is not an operation")
            elif OPERATIONS[name].choices:
                word = "none" if value is None else _LOOK_WORDS.get(str(value).strip().lower()[:40])
                if word is None:
                    self.add_problem(f"{name}: {str(value)[:40]} is not one of {', '.join(LOOKS)}")
                else:
                    self.values[name] = word
            else:
                self._read_json_numbers(name, value)

    def _read_json_numbers(self, name: str, value: object) -> None:
        if isinstance(value, Mapping):
            value = [value[side] if side in value else (0, 0, 100, 100)[index] for side, index in _SIDES.items()]
        parts = value if isinstance(value, (list, tuple)) else [value]
        numbers = tuple(number for part in parts[:8] if (number := _as_float(part)) is not None)
        if not len(numbers) == len(parts[:8]) == len(OPERATIONS[name].slots):
            self.add_problem(f"{name}: {str(value)[:40]} is not {len(OPERATIONS[name].slots)} number(s)")
            return
        if name == "crop" and all(0 <= number <= 1 for number in numbers) and numbers[2] > numbers[0]:
            numbers = tuple(100 * number for number in numbers)
        self.store(name, numbers)


def _find_operations(tokens: _Tokens) -> list[tuple[int, str, int]]:
    """Find the tokens that name an operation: index, operation, direction (0 if the word has none).

    'a warmer temperature' names warmth twice: a plain noun right after a directed word is skipped.
    """
    mentions: list[tuple[int, str, int]] = []
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            continue
        name, direction = _DIRECTED_WORDS.get(token, (_OPERATION_OF.get(token, ""), 0))
        repeated = bool(mentions) and direction == 0 and mentions[-1][:2] == (index - 1, name)
        if name and not repeated:
            mentions.append((index, name, direction))
    return mentions


def _crop_from_sides(tokens: _Tokens) -> tuple[float, ...]:
    """Return the crop of '10 % from the left and the right': each side takes the number before it, else the first."""
    current = next(token for token in tokens if isinstance(token, float))
    box = [0.0, 0.0, 100.0, 100.0]
    for token in tokens:
        if isinstance(token, float):
            current = token
        elif token in _SIDES:
            side = _SIDES[token]
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


def _find_json(text: str) -> Mapping[object, object] | None:
    """Return the first JSON object that names an operation, trying at most three opening braces."""
    start = -1
    for _ in range(3):
        start = text.find("{", start + 1)
        if start < 0:
            return None
        try:
            value, _end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        nested = value.get("recipe", value)
        if isinstance(nested, Mapping) and any(str(key).strip().lower() in _OPERATION_OF for key in nested):
            return value
    return None
