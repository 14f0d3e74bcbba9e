"""Photos and words become what Moondream reads: crops, and token ids in the templates of its skills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from .checkpoint import HUB_ARGUMENTS, find
from .configuration_moondream import DEFAULT_TEMPLATES, MoondreamConfig
from .image_processing_moondream import MoondreamImageProcessor

STARMIE = "moondream/starmie-v1"
END = "<|endoftext|>"
# The marks of the templates: 1 opens the skill's name, 2 separates it, 3 asks for the answer.
MARKS = {1: "<|md_reserved_0|>", 2: "<|md_reserved_1|>", 3: "<|md_reserved_2|>"}
LENGTHS = ("short", "normal", "long")

# One user turn. The words in <|...|> are this processor's own marks and no tokens: they count at the very start and
# the very end of a prompt only, so whatever a user types between them stays text.
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
    """Image processor, tokenizer and skill templates in one.

    `templates`: the ids around the user's words as in the model's `config.templates`; None makes them from the
    tokenizer's own words. `image_token_id`: the placeholder, None for the first id beyond the tokenizer's.
    Raises ValueError when the tokenizer does not have the templates' ids.
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
        self.templates = make_templates(tokenizer) if templates is None else templates
        check_tokenizer(tokenizer, self.templates)
        self.image_token_id = len(tokenizer) if image_token_id is None else image_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_config(cls, config: MoondreamConfig, tokenizer: PreTrainedTokenizerBase) -> MoondreamProcessor:
        """The processor that fits a model: its crop sizes, its templates, its image placeholder."""
        image_processor = MoondreamImageProcessor.from_config(config)
        return cls(image_processor, tokenizer, templates=config.templates, image_token_id=config.image_token_id)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> MoondreamProcessor:
        """From a folder or Hub repository: a saved processor, or else what the model's `config.json` says.

        `tokenizer` names another folder or repository for the tokenizer. The released weights are known to carry a
        tokenizer of an older model, so theirs is fetched from moondream/starmie-v1 unless the folder has the right one.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        source = kwargs.pop("tokenizer", None)
        if source is None and find(pretrained_model_name_or_path, PROCESSOR_NAME, hub) is not None:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if find(pretrained_model_name_or_path, CONFIG_NAME, hub) is not None:
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
            tokenizer = load_tokenizer(STARMIE, config.templates, **{k: hub[k] for k in hub.keys() - {"revision"}})
        return cls.from_config(config, tokenizer)

    def prompt(self, skill: str = "query", text: str = "", length: str = "normal", image: bool = True) -> str:
        """The written form of a prompt, as the chat template gives it."""
        start = self.image_token if image else ""
        return f"{start}<|caption:{length}|>" if skill == "caption" else f"{start}<|{skill}|>{text}<|answer|>"

    def prompt_ids(self, skill: str = "query", text: str = "", length: str = "normal", image: bool = True) -> list[int]:
        """The ids of a prompt: BOS, the image placeholders, the skill's template around the user's words.

        `skill`: query, caption, detect or point; `length` (short, normal, long) is for caption alone.
        Raises ValueError for an unknown skill or length.
        """
        ids = [self.tokenizer.convert_tokens_to_ids(END)]
        if image:
            ids += [self.image_token_id] * self.image_processor.image_tokens
        return ids + self._template_ids(skill, text, length)

    def _template_ids(self, skill: str, text: str, length: str) -> list[int]:
        if skill not in self.templates:
            raise ValueError(f"There is no skill {skill!r}: choose one of {', '.join(self.templates)}.")
        template = self.templates[skill]
        if skill == "caption":
            if length not in template:
                raise ValueError(f"There is no caption length {length!r}: choose one of {', '.join(template)}.")
            return list(template[length])
        if skill == "query":
            # The model has seen the closing mark twice after a question.
            return [*template["prefix"], *plain_ids(self.tokenizer, text), *template["suffix"] * 2]
        return [*template["prefix"], *plain_ids(self.tokenizer, " " + text), *template["suffix"]]

    def prepare(
        self, images: Any = None, skill: str = "query", text: str | Sequence[str] = "", length: str = "normal"
    ) -> BatchFeature:
        """Model inputs for one photo or several, with the same or each its own words; padded at the left, as tensors.

        `images` None asks without a photo. One text goes with every photo, and one photo with every text.
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
            raise ValueError(f"{photos} photos and {len(texts)} texts do not go together.")
        rows = [self.prompt_ids(skill, words, length, image=photos > 0) for words in texts]
        return BatchFeature({**self._padded(rows), **features})

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts in their written form (`prompt`, or the chat template's output) with their images, in order.

        Gives `input_ids` and `attention_mask` (lists, or tensors padded at the left when `padding` or
        `return_tensors="pt"`), and `pixel_values`, `image_sizes` (always tensors). Raises ValueError when a prompt
        has no such form or when images and placeholders do not match.
        """
        if kwargs.get("truncation"):
            raise ValueError("Prompts are not truncated: the template at the end must stay. Shorten the text.")
        features = self.image_processor(images) if images is not None else {}
        if text is None:
            return BatchFeature(dict(features))
        prompts = [self._parse(prompt) for prompt in ([text] if isinstance(text, str) else text)]
        wanted = sum(image for image, _ in prompts)
        given = len(features["pixel_values"]) if features else 0
        if wanted != given:
            raise ValueError(f"The prompts ask for {wanted} images, {given} are given.")
        rows = [ids for _, ids in prompts]
        if padding or return_tensors == "pt":
            return BatchFeature({**self._padded(rows), **features})
        return BatchFeature({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], **features})

    def _parse(self, prompt: str) -> tuple[bool, list[int]]:
        match = PROMPT.match(prompt)
        if match is None:
            raise ValueError(
                "A prompt is written by `processor.prompt(...)` or the chat template, for instance "
                f"{self.prompt('query', 'Is it dark?')!r}; got {prompt[:80]!r}."
            )
        image, length, skill, text = match.groups()
        return bool(image), self.prompt_ids(skill or "caption", text, length or "normal", image=bool(image))

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        pad = self.tokenizer.convert_tokens_to_ids(END)
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def decode_answers(self, ids: Any) -> list[str]:
        """The texts of generated ids [B, L], without marks and without surrounding space."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a user's text, in which no control token can occur, however it is spelt."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not set(tokenizer.added_tokens_decoder).intersection(ids):
        return ids
    # A control token that the tokenizer does not count as special: its spelling is broken up.
    halves = re.split(r"(?<=<)(?=\|)", text)
    return [i for half in halves for i in tokenizer.encode(half, add_special_tokens=False, split_special_tokens=True)]


def load_tokenizer(
    source: Any = STARMIE, templates: dict[str, Any] | None = None, **hub: Any
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or Hub repository (default: the released model's), checked against `templates`.

    Raises OSError when it cannot be had, ValueError when its ids are not the templates' (None: the released model's).
    """
    file = find(source, "tokenizer.json", hub)
    if file is None:
        raise OSError(
            f"There is no tokenizer.json in {source}. For Moondream 2 run `hf download {STARMIE}` on a machine with "
            "network, or name a folder that holds its tokenizer.json."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token=END, eos_token=END, pad_token=END, padding_side="left"
    )
    check_tokenizer(tokenizer, DEFAULT_TEMPLATES if templates is None else templates)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, templates: dict[str, Any]) -> None:
    """Raises ValueError unless the tokenizer has the end mark, the templates' marks and their skill names.

    The wrong tokenizer would not fail: it gives fluent nonsense.
    """
    vocabulary = tokenizer.get_vocab()
    expected = {END: 0, **{text: number for number, text in MARKS.items()}}
    found = {text: vocabulary.get(text) for text in expected}
    wrong = [f"{text} is {found[text]} and not {number}" for text, number in expected.items() if found[text] != number]
    for word, around in (("query", templates["query"]["prefix"]), ("caption", templates["caption"]["normal"])):
        name = around[1 : around.index(2)]
        got = tokenizer.encode(word, add_special_tokens=False)
        if got != name:
            wrong.append(f"{word!r} is {got} and not {name}")
    if wrong:
        raise ValueError(
            f"This is not the tokenizer of these weights: {'; '.join(wrong)}. Moondream 2 of 2025-06-21 needs "
            f"{STARMIE}; the tokenizer.json in its own repository belongs to an older model."
        )


def make_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The skill templates in a tokenizer's own ids: mark 1, the skill's name, mark 2, the user's words, mark 3."""

    def name(word: str) -> list[int]:
        return tokenizer.encode(word, add_special_tokens=False)

    around = {skill: {"prefix": [1, *name(skill), 2], "suffix": [3]} for skill in ("query", "detect", "point")}
    return {"caption": {length: [1, *name("caption"), 2, *name(length), 3] for length in LENGTHS}, **around}
