"""Generation of Moondream: shared prefill for repeated prompts, and decoding of boxes and points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, LogitsProcessor
from transformers.cache_utils import DynamicLayer, StaticLayer

from .configuration_moondream import MoondreamConfig

# Model arguments with one entry per row of text, and with one per image.
ROW_INPUTS = ("attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_features")


class MoondreamGenerationMixin(GenerationMixin):
    """`generate`, `detect` and `point` of Moondream.

    Image and prompt are computed once per run of equal rows, and the cache is then copied: `num_return_sequences=N`,
    or a batch with repeated rows as in GRPO training, costs one vision pass and one prefill. Works with sampling and
    beam search and with dynamic and static caches; other caches and chunked prefill fall back to one prefill per row.
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Add the `token_type_ids` for the mask of a static cache at the first step, and drop images after it."""
        token_type_ids = kwargs.pop("token_type_ids", None)
        if is_first_iteration:
            if token_type_ids is None and inputs_embeds is None:
                token_type_ids = self.model.prefix_mask(input_ids, attention_mask).long()
            kwargs["token_type_ids"] = token_type_ids
        elif kwargs.get("use_cache", True):
            kwargs.pop("image_features", None)
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def create_masks_for_generate(
        self,
        config: MoondreamConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Create the 4-D mask that `generate` passes to the model with a static cache."""
        prefix = None if token_type_ids is None or not is_first_iteration else token_type_ids == 1
        return self.model._attention_mask(inputs_embeds, prefix, attention_mask, past_key_values)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat the inputs per candidate; repeated images are views."""
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        repeated = {
            name: image[:, None].expand(-1, expand_size, *image.shape[1:]).flatten(0, 1)
            for name, image in images.items()
        }
        return input_ids, {**model_kwargs, **repeated}

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if (
            len(input_ids) == 1
            or generation_config.prefill_chunk_size is not None
            or not _supports_row_selection(cache)
        ):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        unique, inverse = self._unique_rows(input_ids, model_kwargs)
        if len(unique) == len(input_ids):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        outputs = super()._prefill(
            input_ids[unique],
            generation_config,
            self._select_model_inputs(model_kwargs, input_ids, unique),
            *args,
            **kwargs,
        )
        select_cache_rows(outputs.past_key_values, inverse)
        for name in ("logits", "pre_norm_hidden_state"):
            outputs[name] = outputs[name][inverse]
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(state[inverse] for state in outputs.hidden_states)
        return outputs

    def _unique_rows(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the rows that differ from their predecessor in text or image, and each row's index among them."""
        per_row = [input_ids, *(model_kwargs.get(name) for name in ROW_INPUTS)]
        per_row = [tensor for tensor in per_row if tensor is not None and len(tensor) == len(input_ids)]
        images = [model_kwargs[name] for name in IMAGE_INPUTS if model_kwargs.get(name) is not None]
        image_of = self._image_indices(input_ids, model_kwargs)

        def same(i: int, j: int) -> bool:
            if not all(torch.equal(tensor[i], tensor[j]) for tensor in per_row):
                return False
            a, b = image_of[i], image_of[j]
            return a is None or a == b or all(torch.equal(tensor[a], tensor[b]) for tensor in images)

        return unique_consecutive(len(input_ids), same)

    def _image_indices(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> list[int | None]:
        """Return the image index of each row, None for rows without an image."""
        if model_kwargs.get("inputs_embeds") is not None:
            return [None] * len(input_ids)
        has_image = (input_ids == self.config.image_token_id).any(dim=1)
        numbers = has_image.long().cumsum(0) - 1
        return [n if has else None for n, has in zip(numbers.tolist(), has_image.tolist())]

    def _select_model_inputs(
        self, model_kwargs: dict[str, Any], input_ids: torch.Tensor, rows: list[int]
    ) -> dict[str, Any]:
        """Select the model arguments of some rows, with their images."""
        image_of = self._image_indices(input_ids, model_kwargs)
        images = [image_of[row] for row in rows if image_of[row] is not None]
        selected = dict(model_kwargs)
        for name in ROW_INPUTS:
            if model_kwargs.get(name) is not None and len(model_kwargs[name]) == len(input_ids):
                selected[name] = model_kwargs[name][rows]
        for name in IMAGE_INPUTS:
            if model_kwargs.get(name) is not None:
                selected[name] = model_kwargs[name][images]
        return selected

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: int | None = None, **kwargs: Any
    ) -> Any:
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        ban = AnswerMarkerBan(self.config.tokenizer_config["answer_id"], input_ids_seq_length or 0)
        processors.insert(0, ban)
        return processors

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        if (generation_config.repetition_penalty or 1.0) != 1.0:
            raise ValueError("repetition_penalty must be 1, because the image placeholder has no logit to penalise.")
        context = self.config.text_config.max_context
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = context
        if generation_config.max_length > context or input_ids_length >= context:
            self._check_length(input_ids_length, generation_config.max_length - input_ids_length)
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _check_length(self, prompt_length: int, new_tokens: int) -> None:
        context = self.config.text_config.max_context
        if prompt_length + new_tokens > context or new_tokens < 1:
            raise ValueError(
                f"The prompt has {prompt_length} tokens (an image {self.config.image_tokens} of them) and {new_tokens} "
                f"new tokens are requested, but the context is limited to {context}. Shorten the text, or request at "
                f"most {max(0, context - prompt_length)} new tokens."
            )

    def detect(
        self,
        input_ids: Any = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> list[list[dict[str, float]]]:
        """Detect an object in images.

        Args:
            input_ids: Token ids of the object's name with a leading space, one list for all images or one per image;
                or complete prompts [B, L] with image placeholders.
            attention_mask: [B, L], for prompts padded at the left.
            pixel_values: Crops, uint8 [N, max_crops + 1, 3, S, S].
            image_sizes: Tilings [N, 2].
            **kwargs: `image_features` [N, T, D]: used instead of `pixel_values`. `max_objects`: default 50, fewer if
                the context ends. `temperature`: default 0, greedy. `num_return_sequences`: samples per image, returned
                consecutively. `generator`: torch.Generator. `stop`: called before each step; True ends decoding.

        Returns:
            Per image, a list of boxes {x_min, y_min, x_max, y_max} in fractions of the image. Boxes are not clipped.

        Raises:
            ValueError: If inputs are missing or the prompt is too long.
        """
        return self._regions("detect", input_ids, attention_mask, pixel_values, image_sizes, **kwargs)

    def point(
        self,
        input_ids: Any = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> list[list[dict[str, float]]]:
        """Point at an object in images: per image, a list of {x, y} in fractions of it. Arguments as for `detect`."""
        return self._regions("point", input_ids, attention_mask, pixel_values, image_sizes, **kwargs)

    @torch.no_grad()
    def _regions(
        self,
        skill: str,
        input_ids: Any,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        image_features: torch.Tensor | None = None,
        object_ids: Any = None,
        max_objects: int = 50,
        temperature: float = 0.0,
        num_return_sequences: int = 1,
        generator: torch.Generator | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[list[dict[str, float]]]:
        if image_features is None:
            if pixel_values is None or image_sizes is None:
                raise ValueError("Pass pixel_values and image_sizes, or image_features.")
            image_features = self.get_image_features(pixel_values.to(self.device), image_sizes)
        ids, mask = self._prepare_region_prompt(
            skill, object_ids if input_ids is None else input_ids, attention_mask, len(image_features)
        )
        steps = 3 if skill == "detect" else 2
        self._check_length(ids.shape[1], steps)
        max_objects = min(max_objects, (self.config.text_config.max_context - ids.shape[1]) // steps)
        cache = DynamicCache(config=self.config.text_config)
        outputs = self.model(
            input_ids=ids, attention_mask=mask, image_features=image_features, past_key_values=cache, use_cache=True
        )
        rows = [row for row in range(len(ids)) for _ in range(num_return_sequences)]
        if num_return_sequences > 1:
            select_cache_rows(cache, rows)
        decoder = _RegionDecoder(self, cache, mask[rows], temperature, generator)
        return decoder.run(skill, outputs.pre_norm_hidden_state[rows, -1], max_objects, stop)

    def _prepare_region_prompt(
        self, skill: str, ids: Any, attention_mask: torch.Tensor | None, images: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prompts [B, L] and their mask, from complete prompts or from the ids of an object's name."""
        if ids is None:
            raise ValueError("Pass the token ids of the object as input_ids.")
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else [i if isinstance(i, int) else list(i) for i in ids]
        rows = [rows] * images if not rows or isinstance(rows[0], int) else rows
        if any(self.config.image_token_id in row for row in rows):
            prompt = torch.tensor(rows, device=self.device)
            mask = torch.ones_like(prompt) if attention_mask is None else attention_mask.to(self.device)
            return prompt, mask
        if attention_mask is not None:
            rows = [[i for i, keep in zip(row, kept) if keep] for row, kept in zip(rows, attention_mask.tolist())]
        template = self.config.templates[skill]
        head = [self.config.bos_id, *[self.config.image_token_id] * self.config.image_tokens, *template["prefix"]]
        rows = [[*head, *row, *template["suffix"]] for row in (rows * images if len(rows) == 1 else rows)]
        longest = max(map(len, rows))
        padded = [[self.config.eos_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)


def unique_consecutive(count: int, same: Callable[[int, int], bool]) -> tuple[list[int], list[int]]:
    """Find the items that differ from their predecessor.

    Args:
        count: Number of items.
        same: Whether two items, given by their indices, are equal.

    Returns:
        Indices of the differing items, and for each item its index among them (as `torch.unique_consecutive`).
    """
    unique: list[int] = []
    inverse: list[int] = []
    for i in range(count):
        if i == 0 or not same(i - 1, i):
            unique.append(i)
        inverse.append(len(unique) - 1)
    return unique, inverse


def get_cache_length(cache: Cache | None) -> int:
    """Return the number of cached positions."""
    return 0 if cache is None else int(cache.get_seq_length())


def _supports_row_selection(cache: Cache | None) -> bool:
    return (
        cache is not None
        and get_cache_length(cache) == 0
        and not getattr(cache, "offloading", False)
        and all(type(layer) in (DynamicLayer, StaticLayer) for layer in cache.layers)
    )


def select_cache_rows(cache: Cache, rows: list[int]) -> None:
    """Replace the rows of a filled dynamic or static cache by a selection, in place. Rows may repeat."""
    for layer_index, layer in enumerate(cache.layers):
        index = torch.tensor(rows, device=layer.keys.device)
        if isinstance(layer, StaticLayer):
            layer.keys, layer.values, layer.batch_size = layer.keys[index], layer.values[index], len(rows)
        else:
            cache.layers[layer_index] = PreallocatedCacheLayer(layer.keys, layer.values, index)


class PreallocatedCacheLayer(DynamicLayer):
    """A dynamic cache layer with preallocated space, so that a new token does not copy all previous ones.

    Writes in place, hence for inference only.

    Args:
        keys: [B, heads, L, d].
        values: [B, heads, L, d].
        rows: Rows of keys and values to start with.
    """

    EXTRA_TOKENS = 128

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self._key_buffer = self._allocate(keys, rows)
        self.values, self._value_buffer = self._allocate(values, rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, n, d] and return all keys and values."""
        self.keys, self._key_buffer = self._append(self.keys, self._key_buffer, key_states)
        self.values, self._value_buffer = self._append(self.values, self._value_buffer, value_states)
        return self.keys, self.values

    def _append(
        self, cached: torch.Tensor, buffer: torch.Tensor, new: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length, end = cached.shape[2], cached.shape[2] + new.shape[2]
        # Reordering or selecting rows replaces `keys` and `values` by other tensors.
        if cached.data_ptr() != buffer.data_ptr() or len(cached) != len(buffer) or end > buffer.shape[2]:
            cached, buffer = self._allocate(cached, None, new.shape[2])
        buffer[:, :, length:end] = new
        return buffer[:, :, :end], buffer

    def _allocate(
        self, states: torch.Tensor, rows: torch.Tensor | None, more: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy states, or selected rows, to the start of a larger buffer. Returns this part and the buffer."""
        count, length = len(states) if rows is None else len(rows), states.shape[2]
        buffer = states.new_empty(count, states.shape[1], length + more + self.EXTRA_TOKENS, states.shape[3])
        buffer[:, :, :length] = states if rows is None else states[rows]
        return buffer[:, :, :length], buffer


class AnswerMarkerBan(LogitsProcessor):
    """Bans the answer marker except as the first token, as the original's decoding loop does."""

    def __init__(self, answer_id: int, prompt_length: int) -> None:
        self.answer_id = answer_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the answer marker after the first generated token."""
        if input_ids.shape[1] <= self.prompt_length:
            return scores
        return scores.index_fill(1, torch.tensor([self.answer_id], device=scores.device), -torch.inf)


class _RegionDecoder:
    """Decodes boxes or points from a filled cache, all rows in lockstep. Finished rows are computed and ignored."""

    def __init__(
        self,
        model: MoondreamGenerationMixin,
        cache: Cache,
        mask: torch.Tensor,
        temperature: float,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.cache, self.mask = model, cache, mask
        self.temperature, self.generator = temperature, generator

    def run(
        self, skill: str, hidden: torch.Tensor, max_objects: int, stop: Callable[[], bool] | None
    ) -> list[list[dict[str, float]]]:
        """Decode the regions of B rows. `hidden` [B, D] is the state before the final norm at the end of the prompt."""
        regions: list[list[dict[str, float]]] = [[] for _ in range(len(hidden))]
        done = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        heads, stopped = self.model.model.region, stop or (lambda: False)
        for index in range(max_objects):
            token_logits = self.model.lm_head(self.model.model.text.post_ln(hidden))
            done |= self._sample(token_logits) == self.model.config.eos_id
            if bool(done.all()) or stopped():
                break
            x = heads.bin_to_coordinate(self._sample(heads.decode_coordinate(hidden)))
            hidden = self._step(heads.encode_coordinate(x[:, None]))
            if stopped():
                break
            y = heads.bin_to_coordinate(self._sample(heads.decode_coordinate(hidden)))
            size = None
            if skill == "detect":
                hidden = self._step(heads.encode_coordinate(y[:, None]))
                size = heads.bin_to_size(self._sample(heads.decode_size(hidden)))
            for row, region in enumerate(_format_regions(x, y, size)):
                if not done[row]:
                    regions[row].append(region)
            if index + 1 < max_objects:
                hidden = self._step(heads.encode_coordinate(y[:, None]) if size is None else heads.encode_size(size))
        return regions

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Sample indices [...] from logits [..., bins] at the temperature."""
        if self.temperature <= 0:
            return logits.argmax(dim=-1)
        probabilities = (logits.float() / self.temperature).softmax(dim=-1)
        samples = torch.multinomial(probabilities.flatten(0, -2), 1, generator=self.generator)
        return samples.view(logits.shape[:-1])

    def _step(self, embedding: torch.Tensor) -> torch.Tensor:
        """Run one decoder step on embeddings [B, D]. Returns the hidden state [B, D] before the final norm."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        outputs = self.model.model(
            inputs_embeds=embedding[:, None].to(self.model.dtype),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.pre_norm_hidden_state[:, -1]


def _format_regions(x: torch.Tensor, y: torch.Tensor, size: torch.Tensor | None) -> list[dict[str, float]]:
    """Convert centers [B] and sizes [B, 2] to boxes, or to points without sizes."""
    if size is None:
        return [{"x": a, "y": b} for a, b in zip(x.tolist(), y.tolist())]
    return [
        {"x_min": a - w / 2, "y_min": b - h / 2, "x_max": a + w / 2, "y_max": b + h / 2}
        for a, b, (w, h) in zip(x.tolist(), y.tolist(), size.tolist())
    ]
