"""What leaves the house of a run: a model card, a zip of everything, and an adapter on its way to the Hub."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference.registry import ModelSpec
from training.runs.adapters import check_adapter, format_weights, title
from training.runs.run import Run, RunConfig, RunError

FILES = ("log.txt", "metrics.jsonl", "probes.jsonl", "result.json", "reward.png", "probe.png")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)


def card(run: Run, base: ModelSpec) -> str:
    """The model card (README.md): what it was tuned for, on what, and how it did on photos that it had not seen."""
    config, result = run.config(), run.result()
    return "\n".join([*_front_matter(base), *_summary(run, config, base), *_held_out(result), *_use(base)]) + "\n"


def pack(run: Run, base: ModelSpec, path: Path) -> None:
    """Everything of a run as a zip at `path`. Raises OSError."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README.md", card(run, base))
        archive.writestr("config.json", json.dumps(_portable(run.config(), base), indent=1))
        for file in _kept(run):
            archive.write(file, file.relative_to(run.folder).as_posix())


def push(run: Run, base: ModelSpec, repository: str, token: str, private: bool = True) -> str:
    """Uploads the adapter and its card to a repository of the Hub and returns its address.

    The token is used for this call and kept nowhere. Raises RunError, in whose message it never is.
    """
    repository, token = repository.strip(), token.strip()
    if not is_repo_id(repository):
        raise RunError("Name the repository like owner/name, with letters, digits, '-', '_' and '.' only.")
    if not token:
        raise RunError("A token with write access is needed: huggingface.co/settings/tokens makes one.")
    check_adapter(run.adapter, base)
    with tempfile.TemporaryDirectory(prefix="run-export-") as folder:
        _write_adapter(run, base, Path(folder))
        return _upload(Path(folder), repository, token, private)


def is_repo_id(name: str) -> bool:
    """Whether this may be the name of a repository of the Hub: owner/name."""
    return bool(_REPOSITORY.fullmatch(name))


def _upload(folder: Path, repository: str, token: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="An adapter tuned in the playground")
        return str(made)
    except OfflineModeIsEnabled:
        raise RunError("This machine is set to work without the Hub (HF_HUB_OFFLINE). Download the zip.") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise RunError(_REFUSED.get(code, f"The Hub answered with an error ({code}). Try again later.")) from None
    except Exception as error:
        kind = type(error).__name__
        raise RunError(f"The Hub could not be reached ({kind}). Try again later, or download the zip.") from None


_REFUSED = {
    401: "The Hub does not know this token. Make a new one with write access.",
    403: "This token may not write there. Choose your own name as the owner, and a token with write access.",
    404: "There is no such owner on the Hub, or this token may not see it.",
}


def _write_adapter(run: Run, base: ModelSpec, folder: Path) -> None:
    for name in ADAPTER_FILES:
        (folder / name).write_bytes((run.adapter / name).read_bytes())
    (folder / "README.md").write_text(card(run, base), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(_portable(run.config(), base), indent=1), encoding="utf-8")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if Path(str(config.get("base_model_name_or_path") or "")).is_absolute():
        config["base_model_name_or_path"] = base.name
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _kept(run: Run) -> Iterator[Path]:
    """The files of a run that are of use elsewhere; checkpoints are not."""
    for name in FILES:
        if (run.folder / name).is_file():
            yield run.folder / name
    yield from sorted(run.folder.glob("pair*.png"))
    yield from (run.adapter / name for name in ADAPTER_FILES if (run.adapter / name).is_file())


def _portable(config: RunConfig, base: ModelSpec) -> dict[str, Any]:
    """The config without the paths of this machine."""
    values = config.model_dump()
    values["base"] = config.base if config.base == base.name else f"{base.name}, and an earlier run upon it"
    for key in ("photos", "held_out"):
        if values[key] != "bundled" and not values[key].startswith("hub:"):
            values[key] = "own photos"
    return values


def _front_matter(base: ModelSpec) -> list[str]:
    source = base.source if not Path(base.source).is_absolute() else base.name
    return [
        "---",
        f"base_model: {source}",
        "library_name: peft",
        "pipeline_tag: image-text-to-text",
        "tags: [moondream, grpo, lora, photo-editing]",
        "---",
        "",
    ]


def _summary(run: Run, config: RunConfig, base: ModelSpec) -> list[str]:
    photos = {"bundled": "the photos that come with the playground"}.get(config.photos, "own photos")
    if config.photos.startswith("hub:"):
        photos = f"the Hub dataset `{_plain(config.photos[4:])}`"
    status = run.status()
    return [
        f"# {_plain(title(run))}",
        "",
        f"A PEFT adapter for {_plain(base.title)}. It was tuned with GRPO to write photo-editing recipes whose "
        f"pictures score high in: **{format_weights(config.reward)}**.",
        "",
        f"- Reward function: `{json.dumps(config.reward)}`",
        f"- Photos: {photos}, at most {config.max_photos:,}",
        f"- Steps: {status.step or config.steps:,} of {status.steps or config.steps:,}, with {config.photos_per_step} "
        f"photos and {config.rollouts} answers to each per step",
        f"- Learning rate {config.learning_rate:g}, KL weight {config.beta:g}, rank {config.rank}, seed {config.seed}",
        "",
    ]


def _held_out(result: dict[str, Any] | None) -> list[str]:
    if not result:
        return ["## On photos that it has not seen", "", "Not measured: the run ended before.", ""]
    base, tuned = result.get("base") or {}, result.get("tuned") or {}
    names = [name for name in tuned if isinstance(tuned[name], dict)]
    difference = result.get("difference") or {}
    verdict = "better than its base" if result.get("wins") else "not shown to be better than its base"
    return [
        "## On photos that it has not seen",
        "",
        f"{result.get('held_out')} photos, means with 95 % intervals.",
        "",
        "| | base | tuned |",
        "|---|---|---|",
        *(f"| {name} | {_interval(base.get(name))} | {_interval(tuned.get(name))} |" for name in names),
        "",
        f"Difference of the total, photo by photo: {_interval(difference)}. It is {verdict}.",
        *(["", f"Warning: {_plain(str(result['alarm']))}"] if result.get("alarm") else []),
        "",
        "A reward measures what it measures and no more: sharper is not better, and more colour is not more true.",
        "",
    ]


def _use(base: ModelSpec) -> list[str]:
    return [
        "## Use",
        "",
        f"With the model classes of the playground's repository and the weights of {_plain(base.title)}:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'tuned = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
    ]


def _interval(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("mean"), (int, float)):
        return "–"
    low, high = value.get("low"), value.get("high")
    span = f" ({low:.3f} to {high:.3f})" if isinstance(low, (int, float)) and isinstance(high, (int, float)) else ""
    return f"{value['mean']:.3f}{span}"


def _plain(text: str) -> str:
    """Text that no Markdown or HTML comes out of."""
    return re.sub(r"([\\`*_{}\[\]<>#|!$&])", r"\\\1", " ".join(text.split()))
