"""Export a model with its classes: `python -m inference.moondream export MODEL FOLDER`.

The folder loads with transformers alone: `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from inference.availability import WEIGHTS, model_folder
from inference.registry import MODELS

CODE = Path(__file__).resolve().parent
CONFIGS = ("config.json", "processor_config.json")
FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"),
    *WEIGHTS,
)
MODULES = (
    "checkpoint",
    "configuration_moondream",
    "generation_moondream",
    "image_processing_moondream",
    "modeling_moondream",
    "processing_moondream",
)
# File, key of an object in it or "" for the whole, and its `auto_map`, by which transformers finds the classes.
AUTO_MAPS = (
    (
        "config.json",
        "",
        {
            "AutoConfig": "configuration_moondream.MoondreamConfig",
            "AutoModelForImageTextToText": "modeling_moondream.MoondreamForConditionalGeneration",
        },
    ),
    ("processor_config.json", "", {"AutoProcessor": "processing_moondream.MoondreamProcessor"}),
    (
        "processor_config.json",
        "image_processor",
        {"AutoImageProcessor": "image_processing_moondream.MoondreamImageProcessor"},
    ),
)


def export(source: Path, target: Path) -> None:
    """Copy a model with its classes to a new folder.

    Args:
        source: Folder with weights, config, processor and tokenizer.
        target: The folder to create.

    Raises:
        OSError: The folder exists, or a file cannot be read or written.
    """
    configs = {name: json.loads((source / name).read_text(encoding="utf-8")) for name in CONFIGS}
    target.mkdir(parents=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for shard in source.glob("model-*.safetensors"):
        shutil.copyfile(shard, target / shard.name)
    for module in MODULES:
        shutil.copyfile(CODE / f"{module}.py", target / f"{module}.py")
    for name, content in configs.items():
        for file, key, auto_map in AUTO_MAPS:
            if file == name:
                (content[key] if key else content)["auto_map"] = auto_map
        (target / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def main() -> None:
    """Parse the arguments and export."""
    parser = argparse.ArgumentParser(prog="python -m inference.moondream", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="copy a model with its classes to a folder")
    command.add_argument("model", help="name of a local model, or a folder")
    command.add_argument("folder", type=Path, help="the folder to create")
    arguments = parser.parse_args()
    spec = MODELS.get(arguments.model)
    source = model_folder(spec) if spec is not None else Path(arguments.model)
    try:
        if source is None:
            sys.exit(f"The files of {arguments.model} are not on this machine.")
        export(source, arguments.folder)
    except OSError as error:
        sys.exit(f"{arguments.model} could not be exported: {error}.")


if __name__ == "__main__":
    main()
