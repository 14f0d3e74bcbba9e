"""Processor of Moondream: image crops, and token ids in the templates of the skills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from .checkpoint import HUB_ARGUMENTS, find_file
from .configuration_moondream import DEFAULT_TEMPLATES, MoondreamConfig
from .image_processing_moondream import MoondreamImageProcessor

RELEASED_TOKENIZER = "moondream/starmie-v1"
END_TOKEN = "<|endoftext|>"
# Marker tokens of the templates: 1 precedes the skill's name, 2 follows it, 3 starts the answer.
MARKER_TOKENS = {1: "<|md_reserved_0|>", 2: "<|md_reserved_1|>", 3: "<|md_reserved_2|>"}
LENGTHS = ("short", "normal", "long")

# One user turn. The <|...|> markers belong to this processor and are not tokens. They are parsed only at the start and
# the end of a prompt, so the same strings in the user's text stay text.
CHAT_TEMPLATE = """\
{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
{{- raise_exception('Moondream answers one user message; there is no conversation.') -}}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- set ns = namespace(images=0, text='') -%}
{%- if content is string -%}
{%- set ns.text = content -%}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- elif part['type'] == 'text' -%}
{%- set ns.text = ns.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if ns.images > 1 -%}
{{- raise_exception('Moondream looks at one image at a time.') -}}
{%- endif -%}
{%- set kind = skill | default('query', true) -%}
{{- '<|image|>' if ns.images else '' -}}
{%- if kind == 'caption' -%}
{{- '<|caption:' + (length | default('normal', true)) + '|>' -}}
{%- else -%}
{{- '<|' + kind + '|>' + ns.text + '<|answer|>' -}}
{%- endif -%}
"""
PROMPT = re.compile(r"(<\|image\|>)?<\|(?:caption:(\w+)|(query|detect|point))\|>(.*?)(?:<\|answer\|>)?\Z", re.DOTALL)


class MoondreamProcessor(ProcessorMixin):
    """Combines image processor, tokenizer and skill templates.

    Args:
        image_processor: The image processor.
        tokenizer: The tokenizer.
        templates: Token ids around the user's text, as in `config.templates`. Default: built from the tokenizer.
        image_token_id: Id of the image placeholder. Default: the first id after the vocabulary.
        chat_template: Jinja chat template. Default: `CHAT_TEMPLATE`.

    Raises:
        ValueError: If the tokenizer does not match the templates.
    """

    image_token = "<|image|>"

    def __init__(
        self,
        image_processor: MoondreamImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        templates: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.templates = build_templates(tokenizer) if templates is None else templates
        check_tokenizer(tokenizer, self.templates)
        self.image_token_id = len(tokenizer) if image_token_id is None else image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_config(cls, config: MoondreamConfig, tokenizer: PreTrainedTokenizerBase) -> MoondreamProcessor:
        """Create the processor of a model: its crop sizes, templates and image placeholder."""
        image_processor = MoondreamImageProcessor.from_config(config)
        return cls(image_processor, tokenizer, templates=config.templates, image_token_id=config.image_token_id)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> MoondreamProcessor:
        """Load a saved processor, or create one from the model's `config.json`.

        The repository of the released weights contains the tokenizer of an older model. In this case the tokenizer is
        loaded from moondream/starmie-v1.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            **kwargs: Hub arguments; `tokenizer`: another folder or repository of the tokenizer; `config`.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        source = kwargs.pop("tokenizer", None)
        if source is None and find_file(pretrained_model_name_or_path, PROCESSOR_NAME, hub) is not None:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if find_file(pretrained_model_name_or_path, CONFIG_NAME, hub) is not None:
                config = MoondreamConfig.from_pretrained(pretrained_model_name_or_path, **hub)
                processor.image_token_id = config.image_token_id
            return processor
        config = kwargs.get("config")
        if not isinstance(config, MoondreamConfig):
            config = MoondreamConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if source is not None:
            return cls.from_config(config, load_tokenizer(source, config.templates))
        try:
            tokenizer = load_tokenizer(pretrained_model_name_or_path, config.templates, **hub)
        except (ValueError, OSError):
            if config.templates != DEFAULT_TEMPLATES:
                raise
            tokenizer = load_tokenizer(
                RELEASED_TOKENIZER, config.templates, **{k: hub[k] for k in hub.keys() - {"revision"}}
            )
        return cls.from_config(config, tokenizer)

    def prompt(self, skill: str = "query", text: str = "", length: str = "normal", image: bool = True) -> str:
        """Format a prompt as a string, as the chat template does."""
        start = self.image_token if image else ""
        return f"{start}<|caption:{length}|>" if skill == "caption" else f"{start}<|{skill}|>{text}<|answer|>"

    def prompt_ids(self, skill: str = "query", text: str = "", length: str = "normal", image: bool = True) -> list[int]:
        """Return the token ids of a prompt: BOS, the image placeholders, and the skill's template around the text.

        Args:
            skill: query, caption, detect or point.
            text: The user's text.
            length: Caption length: short, normal or long.
            image: Whether the prompt includes an image.

        Raises:
            ValueError: If the skill or the length is unknown.
        """
        ids = [self.tokenizer.convert_tokens_to_ids(END_TOKEN)]
        if image:
            ids += [self.image_token_id] * self.image_processor.image_tokens
        return ids + self._template_ids(skill, text, length)

    def _template_ids(self, skill: str, text: str, length: str) -> list[int]:
        if skill not in self.templates:
            raise ValueError(f"Unknown skill {skill!r}. Choose one of {', '.join(self.templates)}.")
        template = self.templates[skill]
        if skill == "caption":
            if length not in template:
                raise ValueError(f"Unknown caption length {length!r}. Choose one of {', '.join(template)}.")
            return list(template[length])
        if skill == "query":
            # The model was trained with two suffix markers after a question.
            return [*template["prefix"], *encode_plain_text(self.tokenizer, text), *template["suffix"] * 2]
        return [*template["prefix"], *encode_plain_text(self.tokenizer, " " + text), *template["suffix"]]

    def prepare(
        self, images: Any = None, skill: str = "query", text: str | Sequence[str] = "", length: str = "normal"
    ) -> BatchFeature:
        """Prepare model inputs for one or several images and texts.

        A single text is combined with every image, and a single image with every text.

        Args:
            images: One image, a list of images, or None for text only.
            skill: query, caption, detect or point.
            text: One text, or one per image.
            length: Caption length: short, normal or long.

        Returns:
            Tensors `input_ids` and `attention_mask` [B, L], padded at the left, `pixel_values` and `image_sizes`.

        Raises:
            ValueError: If the numbers of images and texts do not match.
        """
        texts = [text] if isinstance(text, str) else list(text)
        features = {} if images is None else self.image_processor(images)
        photos = len(features["pixel_values"]) if features else 0
        if photos > 1 and len(texts) == 1:
            texts = texts * photos
        if photos == 1 and len(texts) > 1:
            features = {name: value.expand(len(texts), *value.shape[1:]) for name, value in features.items()}
            photos = len(texts)
        if photos not in (0, len(texts)):
            raise ValueError(f"{photos} photos and {len(texts)} texts do not match.")
        rows = [self.prompt_ids(skill, prompt, length, image=photos > 0) for prompt in texts]
        return BatchFeature({**self._pad(rows), **features})

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Process formatted prompts (from `prompt` or the chat template) and their images, in order.

        Args:
            images: One image or a (nested) list of images.
            text: One formatted prompt or a list.
            padding: Whether to pad at the left and return tensors.
            return_tensors: "pt" implies `padding`.
            **kwargs: `truncation` is rejected, others are ignored.

        Returns:
            `input_ids` and `attention_mask` (lists or tensors), `pixel_values` and `image_sizes` (tensors).

        Raises:
            ValueError: If a prompt is malformed, or images and placeholders do not match.
        """
        if kwargs.get("truncation"):
            raise ValueError("Truncation is not supported, as it would cut the template at the end. Shorten the text.")
        features = self.image_processor(images) if images is not None else {}
        if text is None:
            return BatchFeature(dict(features))
        prompts = [self._parse(prompt) for prompt in ([text] if isinstance(text, str) else text)]
        expected = sum(image for image, _ in prompts)
        received = len(features["pixel_values"]) if features else 0
        if expected != received:
            raise ValueError(f"The prompts refer to {expected} images, but {received} were passed.")
        rows = [ids for _, ids in prompts]
        if padding or return_tensors == "pt":
            return BatchFeature({**self._pad(rows), **features})
        return BatchFeature({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], **features})

    def _parse(self, prompt: str) -> tuple[bool, list[int]]:
        match = PROMPT.match(prompt)
        if match is None:
            raise ValueError(
                "A prompt must be formatted by `processor.prompt(...)` or the chat template, for instance "
                f"{self.prompt('query', 'Is it dark?')!r}; got {prompt[:80]!r}."
            )
        image, length, skill, text = match.groups()
        return bool(image), self.prompt_ids(skill or "caption", text, length or "normal", image=bool(image))

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        pad = self.tokenizer.convert_tokens_to_ids(END_TOKEN)
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def decode_answers(self, ids: Any) -> list[str]:
        """Decode generated ids [B, L] to texts, without special tokens and surrounding space."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]


def encode_plain_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a user's text so that it can never contain a control token."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not set(tokenizer.added_tokens_decoder).intersection(ids):
        return ids
    # A control token that the tokenizer does not mark as special: split its spelling.
    halves = re.split(r"(?<=<)(?=\|)", text)
    return [i for half in halves for i in tokenizer.encode(half, add_special_tokens=False, split_special_tokens=True)]


def load_tokenizer(
    source: Any = RELEASED_TOKENIZER, templates: dict[str, Any] | None = None, **hub: Any
) -> PreTrainedTokenizerFast:
    """Load a tokenizer and check it against the templates.

    Args:
        source: Folder or Hub repository. Default: the released model's tokenizer.
        templates: Templates to check. Default: the released model's.
        **hub: Arguments of the Hub, see `HUB_ARGUMENTS`.

    Raises:
        OSError: If tokenizer.json cannot be found.
        ValueError: If the token ids do not match the templates.
    """
    file = find_file(source, "tokenizer.json", hub)
    if file is None:
        raise OSError(
            f"There is no tokenizer.json in {source}. For Moondream 2 run `hf download {RELEASED_TOKENIZER}` on a "
            "machine with network, or specify a folder with its tokenizer.json."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN, padding_side="left"
    )
    check_tokenizer(tokenizer, DEFAULT_TEMPLATES if templates is None else templates)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, templates: dict[str, Any]) -> None:
    """Check that a tokenizer has the end token, the markers and the skill names at the templates' ids.

    A wrong tokenizer would not fail later: the model would generate fluent nonsense.

    Raises:
        ValueError: If an id differs.
    """
    vocabulary = tokenizer.get_vocab()
    expected = {END_TOKEN: 0, **{text: number for number, text in MARKER_TOKENS.items()}}
    actual = {text: vocabulary.get(text) for text in expected}
    problems = [f"{text} is {actual[text]} and not {id_}" for text, id_ in expected.items() if actual[text] != id_]
    for skill, template in (("query", templates["query"]["prefix"]), ("caption", templates["caption"]["normal"])):
        expected_ids = template[1 : template.index(2)]
        ids = tokenizer.encode(skill, add_special_tokens=False)
        if ids != expected_ids:
            problems.append(f"{skill!r} is {ids} and not {expected_ids}")
    if problems:
        raise ValueError(
            f"This is not the tokenizer of these weights: {'; '.join(problems)}. Moondream 2 of 2025-06-21 needs "
            f"{RELEASED_TOKENIZER}; the tokenizer.json in its own repository belongs to an older model."
        )


def build_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Build the skill templates from a tokenizer: marker 1, the skill's name, marker 2, the user's text, marker 3."""

    def encode(name: str) -> list[int]:
        return tokenizer.encode(name, add_special_tokens=False)

    captions = {length: [1, *encode("caption"), 2, *encode(length), 3] for length in LENGTHS}
    prompts = {skill: {"prefix": [1, *encode(skill), 2], "suffix": [3]} for skill in ("query", "detect", "point")}
    return {"caption": captions, **prompts}
