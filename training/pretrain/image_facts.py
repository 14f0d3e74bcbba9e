"""Image facts measured from pixels: attributes, colours and areas, and the captions and answers that state them."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from recipes import shrink

FACT_SIDE = 256  # px: long side at which photos are measured, so that facts do not depend on their size
AREA_GRID = 16  # cells per side of the grid on which areas are located


@dataclass(frozen=True)
class Attribute:
    """A measured property and the words for its ranges.

    Attributes:
        name: Name of the attribute.
        unit: What is measured.
        classes: (word, low, high) of each range.
        tolerance: Margin on both sides of a range within which its word still counts as true.
        sentence: Template of a statement.
        questions: Questions about the attribute.
    """

    name: str
    unit: str
    classes: tuple[tuple[str, float, float], ...]
    tolerance: float
    sentence: str
    questions: tuple[str, ...]

    def classify(self, value: float) -> str:
        """Return the word for a measured value."""
        return next(word for word, low, high in self.classes if low <= value < high)

    def is_true(self, word: str, value: float) -> bool:
        """Return whether `word` is true of a measured value, within the tolerance."""
        return any(word == w and low - self.tolerance <= value < high + self.tolerance for w, low, high in self.classes)


INF = float("inf")
ATTRIBUTES: dict[str, Attribute] = {
    a.name: a
    for a in (
        Attribute(
            "brightness",
            "mean L*",
            (("dark", -INF, 40.0), ("medium", 40.0, 60.0), ("bright", 60.0, INF)),
            4.0,
            "The brightness is {}.",
            ("How bright is this photo?", "Is this photo bright or dark?", "brightness?", "Is it well exposed?"),
        ),
        Attribute(
            "contrast",
            "standard deviation of L*",
            (("low", -INF, 15.0), ("medium", 15.0, 25.0), ("high", 25.0, INF)),
            2.5,
            "The contrast is {}.",
            ("How is the contrast?", "Does it have much contrast?", "contrast?", "Is the contrast high or low?"),
        ),
        Attribute(
            "colours",
            "mean chroma",
            (("grey", -INF, 5.0), ("muted", 5.0, 17.0), ("vivid", 17.0, INF)),
            2.5,
            "The colours are {}.",
            ("Are the colours vivid?", "How strong are the colours?", "Are the colours muted or vivid?", "colours?"),
        ),
        Attribute(
            "warmth",
            "mean b*",
            (("cool", -INF, -3.0), ("neutral", -3.0, 7.0), ("warm", 7.0, INF)),
            2.5,
            "The light is {}.",
            ("Is it warm or cool?", "Are the colours warm or cool?", "How warm is the light?", "warmth?"),
        ),
        Attribute(
            "sharpness",
            "1 - blur (Crete et al. 2007)",
            (("soft", -INF, 0.60), ("fair", 0.60, 0.68), ("sharp", 0.68, INF)),
            0.04,
            "The sharpness is {}.",
            ("Is this photo sharp?", "How sharp is it?", "Is it blurred?", "sharpness?"),
        ),
        Attribute(
            "orientation",
            "width / height",
            (("portrait", -INF, 0.9), ("square", 0.9, 1.11), ("landscape", 1.11, INF)),
            0.02,
            "It is a {} picture.",
            ("Is it portrait or landscape?", "What is the orientation?", "orientation?", "Which way is it held?"),
        ),
    )
}
SUBJECT_QUESTIONS = ("Where is the subject?", "Where is the main subject?", "subject?", "Where should I look?")
COLOUR_QUESTIONS = ("What are the main colours?", "Which colours does it have?", "main colour?", "What colour is it?")
UNKNOWN_ANSWER = "I am a small demonstration model and cannot tell."
UNKNOWN_QUESTIONS = (
    "Who is in this photo?", "How many people are there?", "What is the man doing?", "Is there a dog?", "What is this?",
    "Where was it taken?", "What does the sign say?", "Is it raining?", "What time is it?", "What animal is it?",
    "Read the text.", "How old is she?", "Which city is this?", "What is the weather like?", "Is anyone smiling?",
    "What kind of car is it?", "What food is on the table?", "Tell me a story.", "Is it day or night?", "Hello",
)  # fmt: skip
COLOUR_NAMES = (
    "black", "white", "grey", "red", "brown", "orange", "yellow", "green", "teal", "blue", "purple",
)  # fmt: skip
AREAS = ("brightest area", "darkest area", "most colourful area", "sharpest area", "main subject")
UNKNOWN_OBJECTS = (
    "dog", "cat", "car", "person", "face", "tree", "sign", "bird", "boat", "table", "cup", "phone", "horse", "house",
)  # fmt: skip
COLUMNS, ROWS = ("left", "centre", "right"), ("top", "middle", "bottom")
CELL_TOLERANCE = 0.06  # as a share of a side


@dataclass(frozen=True)
class Area:
    """The area of a photo where a measured map is highest. Coordinates 0..1, x to the right, y down.

    Attributes:
        box: x_min, y_min, x_max, y_max.
        point: x and y of the centre of gravity inside the box.
        level: float [AREA_GRID, AREA_GRID], the map less its threshold; positive cells belong to the area.
    """

    box: tuple[float, float, float, float]
    point: tuple[float, float]
    level: np.ndarray


@dataclass(frozen=True)
class ImageFacts:
    """The facts of a photo, from `measure`.

    Attributes:
        values: Measured value by attribute name.
        shares: Share of the pixels, 0..1, by colour name.
        subject: x and y of the main subject, 0..1.
    """

    values: dict[str, float]
    shares: dict[str, float]
    subject: tuple[float, float]

    def main_colours(self) -> list[str]:
        """Return the most frequent colour, and the second one if it covers at least 18 % of the photo."""
        ranked = sorted(self.shares, key=lambda name: -self.shares[name])
        return ranked[: 2 if self.shares[ranked[1]] >= 0.18 else 1]

    def colour_is_true(self, name: str, main: bool) -> bool:
        """Return whether a colour may be stated: as main colour at 0.7 of the largest share, else at 10 %."""
        share = self.shares.get(name, 0.0)
        return share >= 0.7 * max(self.shares.values()) if main else share >= 0.10

    def subject_cell(self) -> tuple[str, str]:
        """Return row and column of the subject on a grid of thirds."""
        x, y = self.subject
        return ROWS[min(int(y * 3), 2)], COLUMNS[min(int(x * 3), 2)]

    def subject_cell_is_true(self, row: str, column: str) -> bool:
        """Return whether the subject lies in a cell of the grid of thirds, within `CELL_TOLERANCE`."""
        x, y = self.subject
        inside = [
            index / 3 - CELL_TOLERANCE <= v <= (index + 1) / 3 + CELL_TOLERANCE
            for index, v in ((COLUMNS.index(column), x), (ROWS.index(row), y))
        ]
        return all(inside)


def to_lab(photo: np.ndarray) -> np.ndarray:
    """Convert an RGB uint8 photo to CIELAB, float32 [H, W, 3]: L* 0..100, a* and b* about -127..127."""
    return cv2.cvtColor(np.ascontiguousarray(photo, np.float32) / 255.0, cv2.COLOR_RGB2LAB)


def sharpness(luma: np.ndarray) -> float:
    """Return 1 - the no-reference blur metric of Crete et al. (2007), "The blur effect", of a luminance [H, W].

    It measures how much of the differences between neighbours a further 9-tap box blur removes, 0..1.
    """
    worst = 0.0
    for kernel, axis in (((9, 1), 1), ((1, 9), 0)):
        soft = cv2.blur(luma, kernel)
        before, after = np.abs(np.diff(luma, axis=axis)), np.abs(np.diff(soft, axis=axis))
        total = float(before.sum())
        lost = float(np.maximum(before - after, 0).sum())
        worst = max(worst, (total - lost) / total if total > 1e-6 else 1.0)
    return 1.0 - worst


def colour_shares(image: np.ndarray) -> dict[str, float]:
    """Return the share of the pixels of each of `COLOUR_NAMES` in a CIELAB image [H, W, 3]."""
    light, a, b = (image[..., i] for i in range(3))
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    edges = (
        (45, "red"),
        (80, "orange"),
        (105, "yellow"),
        (185, "green"),
        (235, "teal"),
        (305, "blue"),
        (340, "purple"),
    )
    index = np.full(light.shape, COLOUR_NAMES.index("red"))
    low = 0
    for high, name in edges:
        index[(hue >= low) & (hue < high)] = COLOUR_NAMES.index(name)
        low = high
    index[(index == COLOUR_NAMES.index("orange")) & (light < 58)] = COLOUR_NAMES.index("brown")
    neutral = chroma < 9
    index[neutral] = COLOUR_NAMES.index("grey")
    index[neutral & (light > 78)] = COLOUR_NAMES.index("white")
    index[(light < 22) & (chroma < 16)] = COLOUR_NAMES.index("black")
    counts = np.bincount(index.ravel(), minlength=len(COLOUR_NAMES)) / index.size
    return dict(zip(COLOUR_NAMES, counts.tolist(), strict=True))


def saliency(image: np.ndarray) -> np.ndarray:
    """Return the saliency [H, W] of a CIELAB image [H, W, 3]: distance from the mean colour with a centre prior.

    Achanta et al. (2009), "Frequency-tuned salient region detection", times a Gaussian with a sigma of 0.35 sides.
    """
    soft = cv2.GaussianBlur(image, (0, 0), max(image.shape[:2]) * 0.02)
    distance = np.linalg.norm(soft - image.reshape(-1, 3).mean(0), axis=-1)
    height, width = distance.shape
    y = (np.arange(height) + 0.5) / height - 0.5
    x = (np.arange(width) + 0.5) / width - 0.5
    return distance * np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 0.35**2)).astype(np.float32)


def best_rectangle(level: np.ndarray) -> tuple[int, int, int, int]:
    """Find the rectangle with the largest sum in a grid [G, G] (prefix sums over all pairs of rows).

    Returns:
        Left, top, right, bottom in cells, right and bottom exclusive.
    """
    rows = np.vstack([np.zeros((1, level.shape[1])), np.cumsum(level, axis=0)])
    tops, bottoms = np.triu_indices(len(rows), 1)
    columns = np.cumsum(np.pad(rows[bottoms] - rows[tops], ((0, 0), (1, 0))), axis=1)
    gains = columns[:, 1:] - np.minimum.accumulate(columns, axis=1)[:, :-1]
    pair, right = (int(index) for index in np.unravel_index(gains.argmax(), gains.shape))
    left = int(columns[pair, : right + 1].argmin())
    return left, int(tops[pair]), right + 1, int(bottoms[pair])


def locate_area(heat: np.ndarray) -> Area:
    """Locate the rectangle of a heat map [H, W] with the largest sum above its mean + 0.6 standard deviations."""
    grid = cv2.resize(heat.astype(np.float32), (AREA_GRID, AREA_GRID), interpolation=cv2.INTER_AREA)
    grid = cv2.GaussianBlur(grid, (0, 0), 1.0, borderType=cv2.BORDER_REPLICATE)
    level = grid - (grid.mean() + 0.6 * grid.std())
    left, top, right, bottom = best_rectangle(level)
    inside = np.maximum(level[top:bottom, left:right], 1e-6)
    y = float((inside.sum(1) * (np.arange(top, bottom) + 0.5)).sum() / inside.sum()) / AREA_GRID
    x = float((inside.sum(0) * (np.arange(left, right) + 0.5)).sum() / inside.sum()) / AREA_GRID
    box = (left / AREA_GRID, top / AREA_GRID, right / AREA_GRID, bottom / AREA_GRID)
    return Area(box, (x, y), level)


def areas(photo: np.ndarray, names: tuple[str, ...] = AREAS) -> dict[str, Area]:
    """Locate areas of an RGB uint8 photo [H, W, 3] by name."""
    image = to_lab(shrink(photo, FACT_SIDE))
    light = image[..., 0]
    heat = {
        "brightest area": lambda: light,
        "darkest area": lambda: -light,
        "most colourful area": lambda: np.hypot(image[..., 1], image[..., 2]),
        "sharpest area": lambda: np.sqrt(
            cv2.GaussianBlur(np.abs(cv2.Laplacian(light, cv2.CV_32F)), (0, 0), FACT_SIDE * 0.03)
        ),
        "main subject": lambda: saliency(image),
    }
    return {name: locate_area(heat[name]()) for name in names}


def measure(photo: np.ndarray, subject: Area | None = None) -> ImageFacts:
    """Measure the facts of a photo.

    Args:
        photo: uint8 [H, W, 3] RGB.
        subject: The area of the main subject, if already located.
    """
    small = shrink(photo, FACT_SIDE)
    image = to_lab(small)
    light = image[..., 0]
    values = {
        "brightness": float(light.mean()),
        "contrast": float(light.std()),
        "colours": float(np.hypot(image[..., 1], image[..., 2]).mean()),
        "warmth": float(image[..., 2].mean()),
        "sharpness": sharpness(light),
        "orientation": photo.shape[1] / photo.shape[0],
    }
    return ImageFacts(values, colour_shares(image), (subject or locate_area(saliency(image))).point)


def colour_sentence(facts: ImageFacts) -> str:
    """Return a statement such as "It is mostly blue, with grey."."""
    colours = facts.main_colours()
    return f"It is mostly {colours[0]}" + (f", with {colours[1]}." if len(colours) > 1 else ".")


def subject_sentence(facts: ImageFacts) -> str:
    """Return a statement such as "The subject is at the middle left."."""
    return "The subject is at the {} {}.".format(*facts.subject_cell())


def caption(facts: ImageFacts, length: str) -> str:
    """Compose a caption of facts; `length` is short, normal or long."""
    words = {name: attribute.classify(facts.values[name]) for name, attribute in ATTRIBUTES.items()}
    if length == "short":
        return f"A {words['brightness']}, {words['warmth']} {words['orientation']} picture."
    sentences = [ATTRIBUTES[name].sentence.format(words[name]) for name in ("orientation", "brightness", "warmth")]
    sentences.append(colour_sentence(facts))
    if length == "long":
        sentences += [ATTRIBUTES[name].sentence.format(words[name]) for name in ("contrast", "colours", "sharpness")]
        sentences.append(subject_sentence(facts))
    return " ".join(sentences)


def question_and_answer(facts: ImageFacts, rng: np.random.Generator) -> tuple[str, str]:
    """Draw a question and its true answer, or a question that the model must decline."""
    kind = rng.integers(len(ATTRIBUTES) + 3)
    if kind < len(ATTRIBUTES):
        attribute = list(ATTRIBUTES.values())[kind]
        answer = attribute.sentence.format(attribute.classify(facts.values[attribute.name]))
        return str(rng.choice(attribute.questions)), answer
    if kind == len(ATTRIBUTES):
        return str(rng.choice(COLOUR_QUESTIONS)), colour_sentence(facts)
    if kind == len(ATTRIBUTES) + 1:
        return str(rng.choice(SUBJECT_QUESTIONS)), subject_sentence(facts)
    return str(rng.choice(UNKNOWN_QUESTIONS)), UNKNOWN_ANSWER


def check_statements(text: str, facts: ImageFacts) -> list[tuple[str, bool]]:
    """Extract the facts that a text in this module's wording states.

    Returns:
        (fact, whether it is true) of each statement, for example ("brightness: dark", True).
    """
    statements: list[tuple[str, bool]] = []
    words = text.replace(",", " ").replace(".", " ").split()
    for sentence in text.split("."):
        tokens = sentence.replace(",", " ").split()
        for name, attribute in ATTRIBUTES.items():
            stem = attribute.sentence.split("{}")[0].strip()
            if sentence.strip().startswith(stem):
                word = sentence.strip()[len(stem) :].split()[0] if sentence.strip()[len(stem) :].split() else ""
                if any(word == w for w, _, _ in attribute.classes):
                    statements.append((f"{name}: {word}", attribute.is_true(word, facts.values[name])))
        if tokens[:3] == ["It", "is", "mostly"]:
            names = [w for w in tokens[3:] if w in COLOUR_NAMES]
            statements += [(f"colour: {n}", facts.colour_is_true(n, main=i == 0)) for i, n in enumerate(names)]
        if tokens[:5] == ["The", "subject", "is", "at", "the"] and len(tokens) == 7:
            row, column = tokens[5], tokens[6]
            if row in ROWS and column in COLUMNS:
                statements.append((f"subject: {row} {column}", facts.subject_cell_is_true(row, column)))
    if words[:1] == ["A"] and words[-1:] == ["picture"] and len(words) == 5:
        for name, word in zip(("brightness", "warmth", "orientation"), words[1:4], strict=True):
            statements.append((f"{name}: {word}", ATTRIBUTES[name].is_true(word, facts.values[name])))
    return statements
