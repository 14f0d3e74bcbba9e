"""`python -m training.pretrain.seeds MODEL OTHER [OTHER ...]`: add the spread over seeds to a model card.

Each folder is the output of `python -m training.pretrain` with another `--seed`. Their figures are summarised as mean
and sample standard deviation in the README.md of the first; repeating the command replaces the section.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

LEVELS = ("exposure", "contrast", "saturation", "warmth", "sharpening")
HEADING = "## Spread over seeds"
# Name, keys in quality.json, and format of each figure.
ROWS = (
    ("CIELAB error lowered by", ("recipe", "error_lowered_by"), "{:.1%}"),
    ("cases lowered", ("recipe", "share_lowered"), "{:.1%}"),
    *((f"correlation of {level}", ("levels", level), "{:.2f}") for level in LEVELS),
    ("stated facts that are true", ("facts", "true"), "{:.1%}"),
    ("point: inside the area", ("regions", "hit"), "{:.1%}"),
    ("detect: mean IoU", ("regions", "iou"), "{:.3f}"),
    ("undamaged photos: mean CIELAB change", ("undamaged", "change"), "{:.2f}"),
    ("undamaged photos left alone", ("undamaged", "share_untouched"), "{:.1%}"),
)


def spread_section(figures: Sequence[dict]) -> str:
    """Return the section of the model card: this model, and mean and standard deviation of all.

    Args:
        figures: The `quality.json` of each model, two or more, the model of the card first.
    """
    lines = [
        HEADING,
        "",
        f"The same command with {len(figures)} seeds, on the same photos:",
        "",
        "| figure | this model | mean | standard deviation |",
        "|---|---|---|---|",
    ]
    for name, (section, key), form in ROWS:
        values = [model[section][key] for model in figures]
        cells = (values[0], statistics.mean(values), statistics.stdev(values))
        lines.append(f"| {name} | " + " | ".join(form.format(value) for value in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the section into the first model's card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    args = parser.parse_args()
    card = args.model / "README.md"
    try:
        folders = [args.model, *args.others]
        figures = [json.loads((folder / "quality.json").read_text(encoding="utf-8")) for folder in folders]
        text = card.read_text(encoding="utf-8").split(f"\n{HEADING}")[0].rstrip("\n")
    except OSError as error:
        sys.exit(str(error))
    card.write_text(f"{text}\n\n{spread_section(figures)}", encoding="utf-8")
    print(spread_section(figures))


if __name__ == "__main__":
    main()
