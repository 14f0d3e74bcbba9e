"""The policy: Moondream as a trainer drives it. It answers inside the recipe grammar, in sampling and in the
log-probability pass alike; it looks at each photo once per run; and it computes a prompt once for all its answers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamForConditionalGeneration, MoondreamImageProcessor, register_names

MAX_LOOKS = 512  # photos whose features are kept: 3 MB each for Moondream 2, 50 kB for moondream-tiny
LOOKS_AT_ONCE = 8


@dataclass
class Scored:
    """Log-probability and entropy (nats) of each completion token, [B, K], under grammar and temperature."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


class ImageFeatureCache:
    """The features of photos by their pixels, computed once with the vision tower frozen. Least used ones give way."""

    def __init__(self, see: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], limit: int = MAX_LOOKS) -> None:
        self.see, self.limit = see, limit
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """uint8 [N, max_crops+1, 3, S, S] and tilings [N, 2] -> features [N, T, D]."""
        keys = [_fingerprint(pixels, tiling) for pixels, tiling in zip(pixel_values, image_sizes, strict=True)]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        new = list(dict.fromkeys(key for key in keys if key not in found))
        for start in range(0, len(new), LOOKS_AT_ONCE):
            some = new[start : start + LOOKS_AT_ONCE]
            rows = [keys.index(key) for key in some]
            found |= dict(zip(some, self.see(pixel_values[rows], image_sizes[rows]), strict=True))
        for key in keys:
            self._kept[key] = found[key]
            self._kept.move_to_end(key)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])


def _fingerprint(pixels: torch.Tensor, tiling: torch.Tensor) -> bytes:
    """What tells one photo from another: the whole photo's crop to the last bit, the tiling, and the sum of all."""
    total = int(pixels.sum(dtype=torch.int64))
    whole = pixels[0].contiguous().cpu().numpy().tobytes()
    return hashlib.blake2b(whole + repr((tiling.tolist(), total)).encode(), digest_size=16).digest()


class CachingImageProcessor(MoondreamImageProcessor):
    """An image processor that cuts a photo into crops once, however often it is given. It knows photos by their pixels,
    since the trainer hands on copies."""

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See `MoondreamImageProcessor.preprocess`."""
        cut: OrderedDict[bytes, BatchFeature] = self.__dict__.setdefault("_cut", OrderedDict())
        photos = [image for item in images for image in (item if isinstance(item, (list, tuple)) else [item])]
        if not all(isinstance(photo, Image.Image) for photo in photos):
            return super().preprocess(images, **kwargs)
        keys = [xxhash.xxh3_128_digest(repr((one.mode, one.size)).encode() + one.tobytes()) for one in photos]
        for key, photo in zip(keys, photos, strict=True):
            if key not in cut:
                cut[key] = super().preprocess([photo], **kwargs)
            cut.move_to_end(key)
        seen = [cut[key] for key in keys]
        while len(cut) > MAX_LOOKS:
            cut.popitem(last=False)
        return BatchFeature({name: torch.cat([one[name] for one in seen]) for name in ("pixel_values", "image_sizes")})

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the settings, without the photos."""
        return {name: value for name, value in super().to_dict().items() if name != "_cut"}


class Policy(MoondreamForConditionalGeneration):
    """Moondream with what a trainer needs; see `prepare`.

    It understands `fused_lm_head=True`, with which TRL's GRPO trainer asks for log-probabilities of completions.
    """

    constraint: RecipeConstraint | None = None
    temperature: float = 1.0
    share: bool = True
    looks: ImageFeatureCache | None = None

    def prepare(
        self, constraint: RecipeConstraint, temperature: float = 1.0, remember: bool = True, share: bool = True
    ) -> None:
        """Sets the grammar and the temperature of the rollouts, freezes the vision tower and the region heads.

        remember: keep each photo's features. share: compute a prompt once for the rows that have it in common.
        Both change nothing but the time; they can be switched off to measure it.
        """
        self.constraint, self.temperature, self.share = constraint, temperature, share
        self.looks = ImageFeatureCache(self.model.get_image_features) if remember else None
        self.model.vision.requires_grad_(False)
        self.model.region.requires_grad_(False)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` inside the grammar."""
        if self.constraint is not None and "logits_processor" not in kwargs:
            length = kwargs["input_ids"].shape[1]
            kwargs["logits_processor"] = [self.constraint.processor(length)]
        with self.folded():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, adapters in float32 are folded into the weights that they sit on, which saves a third of the time of
        writing; the weights come back as they were, to the last bit."""
        found: list[Any] = [module for module in self.modules() if isinstance(module, LoraLayer)]
        layers = [layer for layer in found if not layer.disable_adapters and not layer.merged]
        layers = [layer for layer in layers if layer.get_base_layer().weight.dtype == torch.float32]
        kept = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        try:
            for layer in layers:
                layer.merge()
            yield
        finally:
            for layer, weight in zip(layers, kept, strict=True):
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
        """`MoondreamForConditionalGeneration.forward`; with `fused_lm_head`, `Scored` of what `labels` names.

        `labels` [B, L] are -100 up to the completions, which begin at one column for all rows.
        """
        if pixel_values is not None and image_features is None and image_sizes is not None:
            see = self.looks or self.model.get_image_features
            image_features, pixel_values, image_sizes = see(pixel_values, image_sizes), None, None
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
    ) -> Scored:
        """Log-probabilities and entropies of completions; see `forward`."""
        asked = labels != -100
        start = int(asked.any(0).int().argmax())
        completions, asked = input_ids[:, start:], asked[:, start:]
        states = self._shared if self.share else self._plain
        logits = self.lm_head(states(input_ids, attention_mask, start, features)).float()
        if self.constraint is not None:
            logits = self.constraint.apply(logits, completions)
        likely = (logits / self.temperature).log_softmax(-1)
        chosen = likely.gather(-1, completions[..., None]).squeeze(-1)
        entropy = -(likely.exp() * likely).sum(-1)
        return Scored(chosen * asked, entropy * asked)

    def _plain(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, start: int, features: torch.Tensor
    ) -> torch.Tensor:
        """The states [B, K, D] from which the completion tokens are predicted, each row computed by itself."""
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, image_features=features, use_cache=False)
        return out.last_hidden_state[:, start - 1 : -1]

    def _shared(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, start: int, features: torch.Tensor
    ) -> torch.Tensor:
        """As `_plain`, with one prompt per group of rows: their completions stand one after the other behind it, and
        each sees the prompt and itself."""
        first, place = _groups(input_ids[:, :start], attention_mask[:, :start], features)
        slot = [place[:row].count(place[row]) for row in range(len(place))]
        many, length = max(slot) + 1, input_ids.shape[1] - start - 1
        prompts, real = input_ids[first, :start], attention_mask[first, :start].bool()
        embeds = self.model.embed(prompts, features[first])
        said = self.get_input_embeddings()(input_ids[:, start:-1]).to(embeds.dtype)
        behind = said.new_zeros(len(first), many, length, said.shape[-1]).index_put(
            (torch.tensor(place), torch.tensor(slot)), said
        )
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        later = positions[:, -1:] + 1 + torch.arange(length, device=positions.device).repeat(many)
        out = self.model.text(
            inputs_embeds=torch.cat([embeds, behind.flatten(1, 2)], 1),
            attention_mask=self._sight(prompts, real, many, length),
            position_ids=torch.cat([positions, later], 1),
        )
        hidden = out.last_hidden_state
        before = hidden[place, start - 1][:, None]
        after = hidden[:, start:].unflatten(1, (many, length))[place, slot]
        return torch.cat([before, after], 1)

    def _sight(self, prompts: torch.Tensor, real: torch.Tensor, many: int, length: int) -> torch.Tensor:
        """Who sees whom, bool [U, 1, T, T], T = P + many * length; padding sees itself, so that nothing is NaN."""
        prompt = prompts.shape[1]
        owner = torch.cat([torch.zeros(prompt), torch.arange(many).repeat_interleave(length) + 1]).to(prompts.device)
        order = torch.arange(len(owner), device=prompts.device)
        causal = order[:, None] >= order[None]
        alone = ((owner[:, None] == owner[None]) | (owner == 0)[None]) & causal
        sight = alone[None].repeat(len(prompts), 1, 1)
        prefix = self.model.prefix_of(prompts, real.long())
        sight[:, :prompt, :prompt] |= prefix[:, :, None] & prefix[:, None]
        sight[:, :, :prompt] &= real[:, None]
        return (sight | torch.eye(len(owner), dtype=torch.bool, device=prompts.device))[:, None]


register_names(Policy)


def _groups(prompts: torch.Tensor, masks: torch.Tensor, features: torch.Tensor) -> tuple[list[int], list[int]]:
    """The first row of each group of rows with one prompt and photo, and each row's group."""
    first: list[int] = []
    place: list[int] = []
    for row in range(len(prompts)):
        for group in reversed(range(len(first))):  # most often the last one
            if all(torch.equal(part[row], part[first[group]]) for part in (prompts, masks, features)):
                break
        else:
            first.append(row)
            group = len(first) - 1
        place.append(group)
    return first, place


def greedy(policy: Any, processor: Any, photos: Sequence[Any], question: str, at_once: int = 16) -> list[str]:
    """The likeliest recipe for each photo (uint8 RGB or PIL), as text. policy: a `Policy`, bare or inside PEFT."""
    texts: list[str] = []
    for start in range(0, len(photos), at_once):
        inputs = processor.prepare(list(photos[start : start + at_once]), "query", question)
        inputs = {name: tensor.to(policy.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            out = policy.generate(**inputs, do_sample=False, max_new_tokens=_longest(policy))
        texts += processor.decode_answers(out[:, inputs["input_ids"].shape[1] :])
    return texts


def _longest(policy: Any) -> int:
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    return base.constraint.max_tokens
