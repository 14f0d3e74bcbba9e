"""How Moondream writes: one look at a photo for every candidate, and boxes and points from the region heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, LogitsProcessor
from transformers.cache_utils import DynamicLayer, StaticLayer

if TYPE_CHECKING:
    from .configuration_moondream import MoondreamConfig
    from .modeling_moondream import MoondreamForConditionalGeneration

# Arguments of the model with one entry per row of text, and with one per image.
ROW_INPUTS = ("attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_features")


class MoondreamGeneration(GenerationMixin):
    """`generate` for Moondream.

    One look at a photo serves every candidate: the image and the prompt are run once per different row and the cache
    is then copied, so `num_return_sequences=N` (and a batch in which rows repeat their predecessor, as a trainer's
    does) costs one vision pass and one prefill. It works with sampling and beams, with dynamic and static caches;
    other caches and chunked prefill fall back to one prefill per row.
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
        """Adds what a static cache's ready-made mask needs at the first step, and drops the images after it."""
        token_type_ids = kwargs.pop("token_type_ids", None)
        if is_first_iteration:
            if token_type_ids is None and inputs_embeds is None:
                token_type_ids = self.model.prefix_of(input_ids, attention_mask).long()
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
        """The 4-D mask that `generate` makes before the forward pass when the cache is static."""
        prefix = None if token_type_ids is None or not is_first_iteration else token_type_ids == 1
        return self.model._mask(inputs_embeds, prefix, attention_mask, past_key_values)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeats everything but the pixels of a single photo, of which the repetitions are views."""
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
        if len(input_ids) == 1 or generation_config.prefill_chunk_size is not None or not _can_select(cache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        first, place = self._different_rows(input_ids, model_kwargs)
        if len(first) == len(input_ids):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        outputs = super()._prefill(
            input_ids[first], generation_config, self._rows_of(model_kwargs, input_ids, first), *args, **kwargs
        )
        select_rows(outputs.past_key_values, place)
        for name in ("logits", "pre_norm_hidden_state"):
            outputs[name] = outputs[name][place]
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(state[place] for state in outputs.hidden_states)
        return outputs

    def _different_rows(self, input_ids: torch.Tensor, given: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Rows that do not repeat their predecessor in text and image, and each row's place among them."""
        per_row = [input_ids, *(given.get(name) for name in ROW_INPUTS)]
        per_row = [tensor for tensor in per_row if tensor is not None and len(tensor) == len(input_ids)]
        images = [given[name] for name in IMAGE_INPUTS if given.get(name) is not None]
        image_of = self._image_of_row(input_ids, given)

        def same(i: int, j: int) -> bool:
            if not all(torch.equal(tensor[i], tensor[j]) for tensor in per_row):
                return False
            a, b = image_of[i], image_of[j]
            return a is None or a == b or all(torch.equal(tensor[a], tensor[b]) for tensor in images)

        return without_repeats(len(input_ids), same)

    def _image_of_row(self, input_ids: torch.Tensor, given: dict[str, Any]) -> list[int | None]:
        """For each row the number of its image, None for a row of text alone."""
        if given.get("inputs_embeds") is not None:
            return [None] * len(input_ids)
        has_image = (input_ids == self.config.image_token_id).any(dim=1)
        numbers = has_image.long().cumsum(0) - 1
        return [n if has else None for n, has in zip(numbers.tolist(), has_image.tolist())]

    def _rows_of(self, given: dict[str, Any], input_ids: torch.Tensor, rows: list[int]) -> dict[str, Any]:
        """The model's arguments for some of the rows, with the images that belong to them."""
        image_of = self._image_of_row(input_ids, given)
        images = [image_of[row] for row in rows if image_of[row] is not None]
        chosen = dict(given)
        for name in ROW_INPUTS:
            if given.get(name) is not None and len(given[name]) == len(input_ids):
                chosen[name] = given[name][rows]
        for name in IMAGE_INPUTS:
            if given.get(name) is not None:
                chosen[name] = given[name][images]
        return chosen

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
            raise ValueError("repetition_penalty must be 1: the image placeholder has no score that could be changed.")
        context = self.config.text_config.max_context
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = context
        if generation_config.max_length > context or input_ids_length >= context:
            self._refuse_length(input_ids_length, generation_config.max_length - input_ids_length)
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _refuse_length(self, prompt: int, new: int) -> None:
        context = self.config.text_config.max_context
        if prompt + new > context or new < 1:
            raise ValueError(
                f"The prompt takes {prompt} tokens (an image {self.config.image_tokens} of them) and {new} more are "
                f"wanted, but the context holds {context}. Shorten the text, or ask for at most "
                f"{max(0, context - prompt)} new tokens."
            )

    def detect(
        self,
        input_ids: Any = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> list[list[dict[str, float]]]:
        """Boxes around an object, per image a list of {x_min, y_min, x_max, y_max} in parts of the image.

        `input_ids`: the ids of the object's name (with its leading space), one list for all images or one per image;
        or finished prompts [B, L] that contain the image placeholders, with `attention_mask` [B, L] when padded at
        the left. The images: `pixel_values` uint8 [N, max_crops+1, 3, S, S] with `image_sizes` [N, 2], or
        `image_features` [N, T, D]. Further arguments: `max_objects` (default 50, fewer where the context ends),
        `temperature` (0, the default, takes the likeliest), `num_return_sequences` (so many samples per image, one
        look for all of them, returned one after the other), `generator` (torch.Generator), `stop` (called before
        each step; True ends the search).
        A box may reach beyond the image: nothing is clipped.
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
        """Points on an object, per image a list of {x, y} in parts of the image. Arguments as for `detect`."""
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
                raise ValueError("Give pixel_values with image_sizes, or image_features.")
            image_features = self.get_image_features(pixel_values.to(self.device), image_sizes)
        ids, mask = self._region_prompt(
            skill, object_ids if input_ids is None else input_ids, attention_mask, len(image_features)
        )
        steps = 3 if skill == "detect" else 2
        self._refuse_length(ids.shape[1], steps)
        max_objects = min(max_objects, (self.config.text_config.max_context - ids.shape[1]) // steps)
        cache = DynamicCache(config=self.config.text_config)
        outputs = self.model(
            input_ids=ids, attention_mask=mask, image_features=image_features, past_key_values=cache, use_cache=True
        )
        place = [row for row in range(len(ids)) for _ in range(num_return_sequences)]
        if num_return_sequences > 1:
            select_rows(cache, place)
        search = _RegionSearch(self, cache, mask[place], temperature, generator)
        return search.run(skill, outputs.pre_norm_hidden_state[place, -1], max_objects, stop)

    def _region_prompt(
        self, skill: str, ids: Any, attention_mask: torch.Tensor | None, images: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts [B, L] and their mask, from finished prompts or from the ids of an object's name."""
        if ids is None:
            raise ValueError("Give the token ids of the object.")
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else [i if isinstance(i, int) else list(i) for i in ids]
        rows = [rows] * images if not rows or isinstance(rows[0], int) else rows
        if any(self.config.image_token_id in row for row in rows):
            prompt = torch.tensor(rows, device=self.device)
            mask = torch.ones_like(prompt) if attention_mask is None else attention_mask.to(self.device)
            return prompt, mask
        if attention_mask is not None:
            rows = [[i for i, keep in zip(row, kept) if keep] for row, kept in zip(rows, attention_mask.tolist())]
        around = self.config.templates[skill]
        head = [self.config.bos_id, *[self.config.image_token_id] * self.config.image_tokens, *around["prefix"]]
        rows = [[*head, *row, *around["suffix"]] for row in (rows * images if len(rows) == 1 else rows)]
        longest = max(map(len, rows))
        padded = [[self.config.eos_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)


def without_repeats(count: int, same: Callable[[int, int], bool]) -> tuple[list[int], list[int]]:
    """Of `count` items in a row, those that do not repeat their predecessor, and for each item its place among them."""
    first: list[int] = []
    place: list[int] = []
    for i in range(count):
        if i == 0 or not same(i - 1, i):
            first.append(i)
        place.append(len(first) - 1)
    return first, place


def cache_length(cache: Cache | None) -> int:
    """How many places of the text are in the cache already."""
    return 0 if cache is None else int(cache.get_seq_length())


def _can_select(cache: Cache | None) -> bool:
    return (
        cache is not None
        and cache_length(cache) == 0
        and not getattr(cache, "offloading", False)
        and all(type(layer) in (DynamicLayer, StaticLayer) for layer in cache.layers)
    )


def select_rows(cache: Cache, rows: list[int]) -> None:
    """Makes a filled dynamic or static cache hold these rows, in this order; a row may be taken several times."""
    for number, layer in enumerate(cache.layers):
        index = torch.tensor(rows, device=layer.keys.device)
        if isinstance(layer, StaticLayer):
            layer.keys, layer.values, layer.batch_size = layer.keys[index], layer.values[index], len(rows)
        else:
            cache.layers[number] = RoomyLayer(layer.keys, layer.values, index)


class RoomyLayer(DynamicLayer):
    """A dynamic cache layer with room at its end: a new token does not copy all that was before it.

    Starts with the chosen rows of keys and values [B, heads, L, d]. For generating, not for gradients: it writes in
    place.
    """

    ROOM = 128  # tokens

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self._key_room = self._with_room(keys, rows)
        self.values, self._value_room = self._with_room(values, rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, heads, n, d] and returns all keys and all values."""
        self.keys, self._key_room = self._append(self.keys, self._key_room, key_states)
        self.values, self._value_room = self._append(self.values, self._value_room, value_states)
        return self.keys, self.values

    def _append(self, held: torch.Tensor, room: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length, end = held.shape[2], held.shape[2] + new.shape[2]
        # Whoever reorders or selects rows leaves tensors of their own in `keys` and `values`.
        if held.data_ptr() != room.data_ptr() or len(held) != len(room) or end > room.shape[2]:
            held, room = self._with_room(held, None, new.shape[2])
        room[:, :, length:end] = new
        return room[:, :, :end], room

    def _with_room(
        self, states: torch.Tensor, rows: torch.Tensor | None, more: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states (or their chosen rows) at the start of a larger tensor, and that tensor."""
        count, length = len(states) if rows is None else len(rows), states.shape[2]
        room = states.new_empty(count, states.shape[1], length + more + self.ROOM, states.shape[3])
        room[:, :, :length] = states if rows is None else states[rows]
        return room[:, :, :length], room


class AnswerMarkerBan(LogitsProcessor):
    """An answer may begin with the answer marker and not repeat it, as in the original's own decoding loop."""

    def __init__(self, answer_id: int, prompt_length: int) -> None:
        self.answer_id = answer_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] <= self.prompt_length:
            return scores
        return scores.index_fill(1, torch.tensor([self.answer_id], device=scores.device), -torch.inf)


class _RegionSearch:
    """Reads boxes or points off a filled cache, all rows in step; a row that is done idles along."""

    def __init__(
        self,
        model: MoondreamForConditionalGeneration,
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
        """`hidden` [B, D]: the state before the final norm at the prompt's end."""
        found: list[list[dict[str, float]]] = [[] for _ in range(len(hidden))]
        done = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        region, stopped = self.model.model.region, stop or (lambda: False)
        for number in range(max_objects):
            done |= self._choose(self._token_scores(hidden)) == self.model.config.eos_id
            if bool(done.all()) or stopped():
                break
            x, hidden = self._coordinate(hidden)
            if stopped():
                break
            y = region.coordinate_of(self._choose(region.decode_coordinate(hidden)))
            size = None
            last = number + 1 == max_objects
            if skill == "detect":
                hidden = self._step(region.encode_coordinate(y[:, None]))
                size = region.size_of(self._choose(region.decode_size(hidden)))
            for row, entry in enumerate(_entries(x, y, size)):
                if not done[row]:
                    found[row].append(entry)
            if not last:
                hidden = self._step(region.encode_coordinate(y[:, None]) if size is None else region.encode_size(size))
        return found

    def _coordinate(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        region = self.model.model.region
        value = region.coordinate_of(self._choose(region.decode_coordinate(hidden)))
        return value, self._step(region.encode_coordinate(value[:, None]))

    def _token_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.model.text.post_ln(hidden))

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[..., bins] -> [...] the likeliest, or one drawn at the temperature."""
        if self.temperature <= 0:
            return scores.argmax(dim=-1)
        chances = (scores.float() / self.temperature).softmax(dim=-1)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=self.generator)
        return drawn.view(scores.shape[:-1])

    def _step(self, embedding: torch.Tensor) -> torch.Tensor:
        """One decoder step on [B, D]: the next hidden state [B, D] before the final norm."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        outputs = self.model.model(
            inputs_embeds=embedding[:, None].to(self.model.dtype),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.pre_norm_hidden_state[:, -1]


def _entries(x: torch.Tensor, y: torch.Tensor, size: torch.Tensor | None) -> list[dict[str, float]]:
    """Rows of centres [B] and sizes [B, 2] as boxes, or as points where there is no size."""
    if size is None:
        return [{"x": a, "y": b} for a, b in zip(x.tolist(), y.tolist())]
    return [
        {"x_min": a - w / 2, "y_min": b - h / 2, "x_max": a + w / 2, "y_max": b + h / 2}
        for a, b, (w, h) in zip(x.tolist(), y.tolist(), size.tolist())
    ]
