"""Export of runs: model cards, zip archives, and pushing adapters to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from inference.types import ModelSpec
from training.runs.adapters import check_adapter, format_weights, run_title
from training.runs.run import Run, RunConfig, RunError

RUN_FILES = ("log.txt", "metrics.jsonl", "probes.jsonl", "alarms.json", "result.json", "reward.png", "probe.png")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_REPO_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
_HTTP_ERRORS = {
    401: "Hugging Face does not recognize this token. Create a new one with write access.",
    403: "This token may not write there. Use your own name as the owner, and a token with write access.",
    404: "The Hub has no such owner, or this token may not see it.",
}


def model_card(run: Run, base: ModelSpec) -> str:
    """Write the model card (README.md) of a run: rewards, data, settings, and results on held-out photos.

    Args:
        run: The run.
        base: Its base model.

    Returns:
        Markdown with YAML front matter. Names and messages are escaped.
    """
    config, status = run.config(), run.status()
    if config.photos.startswith("hub:"):
        photos = f"the Hub dataset `{_escape_markdown(config.photos[4:])}`"
    else:
        photos = "the photos bundled with the playground" if config.photos == "bundled" else "own photos"
    return f"""---
base_model: {base.name if Path(base.source).is_absolute() else base.source}
library_name: peft
pipeline_tag: image-text-to-text
tags: [moondream, grpo, lora, photo-editing]
---

# {_escape_markdown(run_title(run))}

A PEFT adapter for {_escape_markdown(base.title)}, fine-tuned with GRPO to write photo-editing recipes. \
It was rewarded for: **{format_weights(config.reward)}**.

- Reward function: `{json.dumps(config.reward)}`
- Photos: {photos}, at most {config.max_photos:,}
- Steps: {status.step or config.steps:,} of {status.steps or config.steps:,}, with {config.photos_per_step} photos and \
{config.rollouts} rollouts per photo
- Learning rate {config.learning_rate:g}, KL weight {config.beta:g}, rank {config.rank}, seed {config.seed}

## Results on held-out photos

{_results(run.result(), run.alarms())}

## Use

With the model classes of the playground's repository and the weights of {_escape_markdown(base.title)}:

```python
from peft import PeftModel

tuned = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def _results(result: dict[str, Any] | None, alarms: list[dict[str, Any]]) -> str:
    """Write the section of a model card on the results, from the content of result.json and the run's alarms."""
    if not result:
        return "Not measured: the run ended early."
    base, tuned = result.get("base") or {}, result.get("tuned") or {}
    lines = [
        f"Means over {result.get('held_out')} photos with 95 % intervals.",
        "",
        "| | base | tuned |",
        "|---|---|---|",
    ]
    for name, value in tuned.items():
        if isinstance(value, dict):
            lines.append(f"| {name} | {_format_interval(base.get(name))} | {_format_interval(value)} |")
    verdict = "better than its base" if result.get("wins") else "not shown to be better than its base"
    difference = _format_interval(result.get("difference") or {})
    lines += ["", f"Paired difference of the total: {difference}. The tuned model is {verdict}."]
    for alarm in alarms:
        lines += ["", f"**Alarm: {_escape_markdown(str(alarm['title']))}.** {_escape_markdown(str(alarm['message']))}"]
    if result.get("alarm") and not alarms:
        lines += ["", f"Warning: {_escape_markdown(str(result['alarm']))}"]
    lines += ["", "A higher reward is not a better picture: sharper is not always better, nor are stronger colours."]
    return "\n".join(lines)


def write_zip(run: Run, base: ModelSpec, path: Path) -> None:
    """Write a run's model card, config, logs, results and adapter as a zip file. Raises OSError.

    Args:
        run: The run.
        base: Its base model.
        path: The zip file to write.
    """
    files = [run.folder / name for name in RUN_FILES]
    files += [*sorted(run.folder.glob("pair*.png")), *sorted(run.folder.glob("alarm-*.jpg"))]
    files += [run.adapter / name for name in ADAPTER_FILES]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README.md", model_card(run, base))
        archive.writestr("config.json", json.dumps(_portable_config(run.config(), base), indent=1))
        for file in files:
            if file.is_file():
                archive.write(file, file.relative_to(run.folder).as_posix())


def push_to_hub(run: Run, base: ModelSpec, repo_id: str, token: str, private: bool = True) -> str:
    """Upload a run's adapter and model card to the Hub.

    Args:
        run: The run.
        base: Its base model.
        repo_id: Repository, as owner/name; created if it does not exist.
        token: Hugging Face token with write access. It is never stored and never part of a message.
        private: Whether a new repository is private.

    Returns:
        The repository's URL.

    Raises:
        RunError: If the arguments are invalid, the adapter cannot be used, or the upload fails.
    """
    repo_id, token = repo_id.strip(), token.strip()
    if not is_repo_id(repo_id):
        raise RunError("Name the repository as owner/name, with letters, digits, '-', '_' and '.' only.")
    if not token:
        raise RunError("A token with write access is needed. Create one at huggingface.co/settings/tokens.")
    check_adapter(run.adapter, base)
    with tempfile.TemporaryDirectory(prefix="run-export-") as name:
        folder = Path(name)
        for file in ADAPTER_FILES:
            (folder / file).write_bytes((run.adapter / file).read_bytes())
        (folder / "README.md").write_text(model_card(run, base), encoding="utf-8")
        (folder / "run.json").write_text(json.dumps(_portable_config(run.config(), base), indent=1), encoding="utf-8")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if Path(str(config.get("base_model_name_or_path") or "")).is_absolute():
            config["base_model_name_or_path"] = base.name
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        return _upload(folder, repo_id, token, private)


def is_repo_id(name: str) -> bool:
    """Whether `name` is a valid id of a Hub repository, as owner/name."""
    return bool(_REPO_ID.fullmatch(name))


def _upload(folder: Path, repo_id: str, token: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="An adapter tuned in the playground")
        return str(url)
    except OfflineModeIsEnabled:
        raise RunError("The Hub is disabled on this machine (HF_HUB_OFFLINE). Download the zip file.") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise RunError(_HTTP_ERRORS.get(code, f"The Hub returned an error ({code}). Try again later.")) from None
    except Exception as error:
        kind = type(error).__name__
        raise RunError(f"The Hub could not be reached ({kind}). Try again later, or download the zip file.") from None


def _portable_config(config: RunConfig, base: ModelSpec) -> dict[str, Any]:
    """Return the config without local paths."""
    values = config.model_dump()
    values["base"] = config.base if config.base == base.name else f"{base.name}, and an earlier run upon it"
    for key in ("photos", "held_out"):
        if values[key] != "bundled" and not values[key].startswith("hub:"):
            values[key] = "own photos"
    return values


def _format_interval(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("mean"), (int, float)):
        return "–"
    low, high = value.get("low"), value.get("high")
    known = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})" if known else f"{value['mean']:.3f}"


def _escape_markdown(text: str) -> str:
    """Collapse whitespace and escape characters that are special in Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|!$&])", r"\\\1", " ".join(text.split()))
