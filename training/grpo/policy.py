"""The policy that TRL trains: Moondream with grammar-constrained generation and log-probabilities.

It encodes each photo once per run and computes a prompt once for all completions of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature

from inference.local.constraint import RecipeConstraint
from inference.moondream import (
    MoondreamForConditionalGeneration,
    MoondreamImageProcessor,
    MoondreamProcessor,
    register_key_mapping,
)
from inference.moondream.processing_moondream import load_tokenizer
from recipes import grammar_segments

LORA_TARGET_MODULES = r".*\.text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"  # the text model's linear layers
MAX_CACHED_IMAGES = 512  # features take 3 MB per image for Moondream 2, 50 kB for moondream-tiny
ENCODING_BATCH_SIZE = 8


@dataclass
class CompletionScores:
    """Scores of completion tokens under the grammar and the temperature.

    Attributes:
        log_probs: Log-probability of each token, in nats, [B, K].
        entropy: Entropy of each token's distribution, in nats, [B, K].
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor


class ImageFeatureCache:
    """An LRU cache of image features, keyed by the pixels. It assumes that the vision encoder is frozen.

    Args:
        encode: Computes features [N, T, D] from crops, uint8 [N, max_crops+1, 3, S, S], and tilings [N, 2].
        limit: Maximum number of cached images.
    """

    def __init__(
        self, encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], limit: int = MAX_CACHED_IMAGES
    ) -> None:
        self.encode, self.limit = encode, limit
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Return the features [N, T, D] of a batch; encode only images that are not cached."""
        keys = [image_fingerprint(pixels, tiling) for pixels, tiling in zip(pixel_values, image_sizes, strict=True)]
        features = {key: self._features[key] for key in keys if key in self._features}
        missing = list(dict.fromkeys(key for key in keys if key not in features))
        for start in range(0, len(missing), ENCODING_BATCH_SIZE):
            batch = missing[start : start + ENCODING_BATCH_SIZE]
            rows = [keys.index(key) for key in batch]
            features |= dict(zip(batch, self.encode(pixel_values[rows], image_sizes[rows]), strict=True))
        for key in keys:
            self._features[key] = features[key]
            self._features.move_to_end(key)
        while len(self._features) > self.limit:
            self._features.popitem(last=False)
        return torch.stack([features[key] for key in keys])


def image_fingerprint(pixels: torch.Tensor, tiling: torch.Tensor) -> bytes:
    """Return a 16-byte hash of an image: all pixels of its overview crop, its tiling and the sum of all pixels."""
    total = int(pixels.sum(dtype=torch.int64))
    overview = pixels[0].contiguous().cpu().numpy().tobytes()
    return hashlib.blake2b(overview + repr((tiling.tolist(), total)).encode(), digest_size=16).digest()


class CachingImageProcessor(MoondreamImageProcessor):
    """An image processor with an LRU cache, keyed by the pixels because the trainer passes copies of the images."""

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Preprocess images as `MoondreamImageProcessor.preprocess`; reuse the crops of images seen before."""
        cache: OrderedDict[bytes, BatchFeature] = self.__dict__.setdefault("_crops", OrderedDict())
        photos = [image for item in images for image in (item if isinstance(item, (list, tuple)) else [item])]
        if not all(isinstance(photo, Image.Image) for photo in photos):
            return super().preprocess(images, **kwargs)
        keys = [xxhash.xxh3_128_digest(repr((photo.mode, photo.size)).encode() + photo.tobytes()) for photo in photos]
        for key, photo in zip(keys, photos, strict=True):
            if key not in cache:
                cache[key] = super().preprocess([photo], **kwargs)
            cache.move_to_end(key)
        outputs = [cache[key] for key in keys]
        while len(cache) > MAX_CACHED_IMAGES:
            cache.popitem(last=False)
        names = ("pixel_values", "image_sizes")
        return BatchFeature({name: torch.cat([output[name] for output in outputs]) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings to save, without the cache."""
        return {name: value for name, value in super().to_dict().items() if name != "_crops"}


class Policy(MoondreamForConditionalGeneration):
    """Moondream as a policy for TRL's GRPO trainer; call `prepare` before use.

    With `fused_lm_head=True`, `forward` returns the `CompletionScores` that the trainer asks for.
    """

    constraint: RecipeConstraint | None = None
    temperature: float = 1.0
    share_prompts: bool = True
    image_cache: ImageFeatureCache | None = None

    def prepare(self, constraint: RecipeConstraint, temperature: float = 1.0) -> None:
        """Set the grammar and the sampling temperature, cache image features, and freeze vision and region heads."""
        self.constraint, self.temperature = constraint, temperature
        self.image_cache = ImageFeatureCache(self.model.get_image_features)
        self.model.vision.requires_grad_(False)
        self.model.region.requires_grad_(False)

    def image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Return the features [N, T, D] of a batch of images, from the cache if there is one."""
        encode = self.image_cache or self.model.get_image_features
        return encode(pixel_values, image_sizes)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample rollouts, or decode greedily, under the grammar constraint and with the LoRA adapters merged."""
        if self.constraint is not None and "logits_processor" not in kwargs:
            length = kwargs["input_ids"].shape[1]
            kwargs["logits_processor"] = [self.constraint.processor(length)]
        with self.merged_adapters():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def merged_adapters(self) -> Iterator[None]:
        """Merge float32 adapters into their base weights within the context, which makes generation faster.

        Afterwards the base weights are restored bit by bit.
        """
        lora_layers: list[Any] = [module for module in self.modules() if isinstance(module, LoraLayer)]
        layers = [layer for layer in lora_layers if not layer.disable_adapters and not layer.merged]
        layers = [layer for layer in layers if layer.get_base_layer().weight.dtype == torch.float32]
        originals = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        try:
            for layer in layers:
                layer.merge()
            yield
        finally:
            for layer, weight in zip(layers, originals, strict=True):
                layer.merged_adapters.clear()
                layer.get_base_layer().weight.data.copy_(weight)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model as `MoondreamForConditionalGeneration.forward`.

        With `fused_lm_head`, return the `CompletionScores` of `labels`, [B, L], which are -100 outside the completions.
        Completions begin at the same column in all rows.
        """
        if pixel_values is not None and image_features is None and image_sizes is not None:
            image_features = self.image_features(pixel_values, image_sizes)
            pixel_values = image_sizes = None
        if fused_lm_head:
            if input_ids is None or attention_mask is None or labels is None or image_features is None:
                raise ValueError("Log-probabilities need input_ids, attention_mask, labels and a photo per row.")
            return self.score(input_ids, attention_mask, labels, image_features)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            token_type_ids=token_type_ids,
            labels=labels,
            **kwargs,
        )

    def score(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, features: torch.Tensor
    ) -> CompletionScores:
        """Compute log-probabilities and entropies of completions.

        Args:
            input_ids: Prompts and completions, [B, L].
            attention_mask: 1 for real tokens, [B, L].
            labels: -100 outside the completions, [B, L].
            features: Image features, [B, T, D].

        Returns:
            Scores of the completion tokens, [B, K]; 0 at padding.
        """
        mask = labels != -100
        start = int(mask.any(0).int().argmax())
        completions, mask = input_ids[:, start:], mask[:, start:]
        hidden_states = self._hidden_states_shared if self.share_prompts else self._hidden_states
        logits = self.lm_head(hidden_states(input_ids, attention_mask, start, features)).float()
        if self.constraint is not None:
            logits = self.constraint.apply(logits, completions)
        log_probs = (logits / self.temperature).log_softmax(-1)
        token_log_probs = log_probs.gather(-1, completions[..., None]).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return CompletionScores(token_log_probs * mask, entropy * mask)

    def _hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, start: int, features: torch.Tensor
    ) -> torch.Tensor:
        """Return the states [B, K, D] that predict the completion tokens, computed row by row."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, image_features=features, use_cache=False
        )
        return outputs.last_hidden_state[:, start - 1 : -1]

    def _hidden_states_shared(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, start: int, features: torch.Tensor
    ) -> torch.Tensor:
        """Return the same as `_hidden_states`, with each distinct prompt computed once.

        The completions of a prompt are concatenated behind it; each attends to the prompt and to itself only.
        """
        first_rows, groups = _group_rows(input_ids[:, :start], attention_mask[:, :start], features)
        slots = [groups[:row].count(groups[row]) for row in range(len(groups))]
        completions, length = max(slots) + 1, input_ids.shape[1] - start - 1
        prompts, mask = input_ids[first_rows, :start], attention_mask[first_rows, :start].bool()
        prompt_embeds = self.model.embed(prompts, features[first_rows])
        embeds = self.get_input_embeddings()(input_ids[:, start:-1]).to(prompt_embeds.dtype)
        completion_embeds = embeds.new_zeros(len(first_rows), completions, length, embeds.shape[-1]).index_put(
            (torch.tensor(groups), torch.tensor(slots)), embeds
        )
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        completion_positions = positions[:, -1:] + 1 + torch.arange(length, device=mask.device).repeat(completions)
        outputs = self.model.text(
            inputs_embeds=torch.cat([prompt_embeds, completion_embeds.flatten(1, 2)], 1),
            attention_mask=self._shared_attention_mask(prompts, mask, completions, length),
            position_ids=torch.cat([positions, completion_positions], 1),
        )
        hidden = outputs.last_hidden_state
        first_states = hidden[groups, start - 1][:, None]
        other_states = hidden[:, start:].unflatten(1, (completions, length))[groups, slots]
        return torch.cat([first_states, other_states], 1)

    def _shared_attention_mask(
        self, prompts: torch.Tensor, mask: torch.Tensor, completions: int, length: int
    ) -> torch.Tensor:
        """Return the attention mask, bool [U, 1, T, T] with T = P + completions * length.

        Padding attends to itself, so that no softmax is empty.
        """
        prompt_length, device = prompts.shape[1], prompts.device
        owner = torch.cat([torch.zeros(prompt_length), torch.arange(completions).repeat_interleave(length) + 1])
        owner = owner.to(device)
        order = torch.arange(len(owner), device=device)
        causal = order[:, None] >= order[None]
        own = ((owner[:, None] == owner[None]) | (owner == 0)[None]) & causal
        attention = own[None].repeat(len(prompts), 1, 1)
        prefix = self.model.prefix_mask(prompts, mask.long())
        attention[:, :prompt_length, :prompt_length] |= prefix[:, :, None] & prefix[:, None]
        attention[:, :, :prompt_length] &= mask[:, None]
        return (attention | torch.eye(len(owner), dtype=torch.bool, device=device))[:, None]


register_key_mapping(Policy)


def _group_rows(prompts: torch.Tensor, masks: torch.Tensor, features: torch.Tensor) -> tuple[list[int], list[int]]:
    """Group rows with equal prompt and photo. Returns the first row of each group, and the group of each row."""
    first_rows: list[int] = []
    groups: list[int] = []
    for row in range(len(prompts)):
        for group in reversed(range(len(first_rows))):  # rows of a group are usually adjacent
            if all(torch.equal(part[row], part[first_rows[group]]) for part in (prompts, masks, features)):
                break
        else:
            first_rows.append(row)
            group = len(first_rows) - 1
        groups.append(group)
    return first_rows, groups


def load_with_processor(
    model_folder: Path | str, tokenizer_folder: Path | str, dtype: torch.dtype, temperature: float = 1.0
) -> tuple[Policy, MoondreamProcessor]:
    """Load a policy, prepared for the recipe grammar, and its processor from local files.

    Args:
        model_folder: Folder with the model's config and weights.
        tokenizer_folder: Folder with the tokenizer.
        dtype: Type of the weights.
        temperature: Sampling temperature of the rollouts.
    """
    policy = Policy.from_pretrained(model_folder, dtype=dtype, local_files_only=True)
    tokenizer = load_tokenizer(str(tokenizer_folder), policy.config.templates)
    processor = MoondreamProcessor(
        CachingImageProcessor.from_config(policy.config),
        tokenizer,
        templates=policy.config.templates,
        image_token_id=policy.config.image_token_id,
    )
    policy.prepare(RecipeConstraint(tokenizer, grammar_segments(), end_id=policy.config.eos_id), temperature)
    return policy, processor


def generate_greedy(
    policy: Any, processor: MoondreamProcessor, photos: Sequence[Any], question: str, batch_size: int = 16
) -> list[str]:
    """Generate the most likely recipe for each photo.

    Args:
        policy: A `Policy`, bare or wrapped by PEFT.
        processor: Its processor.
        photos: uint8 RGB arrays or PIL images.
        question: The recipe question.
        batch_size: Photos per call of the model.

    Returns:
        One text per photo.
    """
    unwrapped = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    texts: list[str] = []
    for start in range(0, len(photos), batch_size):
        inputs = processor.prepare(list(photos[start : start + batch_size]), "query", question)
        inputs = {name: tensor.to(policy.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            output = policy.generate(**inputs, do_sample=False, max_new_tokens=unwrapped.constraint.max_tokens)
        texts += processor.decode_answers(output[:, inputs["input_ids"].shape[1] :])
    return texts
