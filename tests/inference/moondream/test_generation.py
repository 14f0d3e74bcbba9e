"""Moondream generation: shared prefill, text-only prompts, limits and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import pytest
import torch
from transformers import GenerationMixin

from inference.moondream.generation_moondream import PreallocatedCacheLayer
from tests.support.moondream_reference import Reference, load_small_model
from tests.support.moondream_reference import reference as load


@pytest.fixture
def reference() -> Reference:
    return load("moondream2-small")


@contextmanager
def count_computed(reference: Reference) -> Iterator[dict[str, int]]:
    """Count patches through the vision encoder and tokens through the first text block."""
    counts = {"crops": 0, "tokens": 0}
    vision, block = reference.model.model.vision, reference.model.model.text.blocks[0]

    def count(name: str) -> Callable:
        return lambda module, given: counts.update({name: counts[name] + given[0].shape[0] * given[0].shape[1]})

    hooks = [
        vision.patch_emb.register_forward_pre_hook(count("crops")),
        block.ln.register_forward_pre_hook(count("tokens")),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_num_return_sequences_encodes_and_prefills_once(reference: Reference, cache: str) -> None:
    batch = reference.batch([(0, "query")], features=False)
    with count_computed(reference) as one:
        reference.model.generate(**batch, max_new_tokens=1, do_sample=True, cache_implementation=cache)
    with count_computed(reference) as eight:
        reference.model.generate(
            **batch, max_new_tokens=1, do_sample=True, num_return_sequences=8, cache_implementation=cache
        )
    assert one == eight


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_shared_prefill_gives_the_same_samples_as_separate_prefill(reference: Reference, cache: str) -> None:
    cases = [(0, "query"), (3, "caption_short")]
    batch = reference.batch(cases, features=False)
    assert batch["attention_mask"].min() == 0
    tokens = PreallocatedCacheLayer.EXTRA_TOKENS + 12  # more than the cache layer preallocates
    settings = {"max_new_tokens": tokens, "do_sample": True, "temperature": 1.5, "cache_implementation": cache}
    torch.manual_seed(3)
    together = reference.model.generate(**batch, num_return_sequences=3, **settings)
    torch.manual_seed(3)
    apart = _generate_with_separate_prefill(reference, batch, 3, settings)
    assert together.tolist() == apart.tolist()
    assert len({tuple(row) for row in together.tolist()}) > 2


def _generate_with_separate_prefill(reference: Reference, batch: dict, n: int, settings: dict) -> torch.Tensor:
    """Generate with the prefill of transformers, which computes every row."""
    model = reference.model
    model._prefill = MethodType(GenerationMixin._prefill, model)
    try:
        return model.generate(**batch, num_return_sequences=n, **settings)
    finally:
        del model._prefill


def test_repeated_rows_encode_and_prefill_once(reference: Reference) -> None:
    cases = [(0, "query")] * 4 + [(1, "query")] * 4
    with count_computed(reference) as repeated:
        reference.model.generate(**reference.batch(cases, features=False), max_new_tokens=1, do_sample=True)
    with count_computed(reference) as single:
        reference.model.generate(**reference.batch([cases[0], cases[4]], features=False), max_new_tokens=1)
    assert repeated == single


def test_forward_encodes_repeated_images_once(reference: Reference) -> None:
    batch = reference.batch([(3, "query")] * 4, features=False)
    with count_computed(reference) as four, torch.no_grad():
        logits = reference.model(**batch).logits
    with count_computed(reference) as one, torch.no_grad():
        alone = reference.model(**{name: value[:1] for name, value in batch.items()}).logits
    assert four["crops"] == one["crops"]
    torch.testing.assert_close(logits, alone.expand_as(logits), atol=1e-5, rtol=0)


def test_equal_prompts_with_different_images_are_not_shared(reference: Reference) -> None:
    both = reference.batch([(0, "query"), (2, "query")], features=False)
    written = reference.model.generate(**both, max_new_tokens=6, do_sample=False)
    expected = [reference.expected["greedy"][f"{i}_query"][:6] for i in (0, 2)]
    assert written[:, -6:].tolist() == expected


def test_beam_search_encodes_the_image_once(reference: Reference) -> None:
    batch = reference.batch([(0, "query")], features=False)
    with count_computed(reference) as counts:
        written = reference.model.generate(**batch, max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert counts["crops"] == 4 * reference.model.config.image_tokens
    assert written.shape == (2, batch["input_ids"].shape[1] + 4)


def test_beam_search_gives_the_same_texts_as_separate_prefill(reference: Reference) -> None:
    batch = reference.batch([(0, "query"), (1, "query")], features=False)
    settings = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False}
    together = reference.model.generate(**batch, num_return_sequences=2, **settings)
    assert together.tolist() == _generate_with_separate_prefill(reference, batch, 2, settings).tolist()


def test_sampling_is_reproducible_by_seed(reference: Reference) -> None:
    batch = reference.batch([(1, "query")])

    def sample(seed: int) -> list:
        torch.manual_seed(seed)
        return reference.model.generate(**batch, max_new_tokens=8, do_sample=True, num_return_sequences=4).tolist()

    assert sample(1) == sample(1) != sample(2)


def test_text_only_rows_and_image_rows_mix_in_a_batch(reference: Reference) -> None:
    config, prompt = reference.model.config, reference.expected["prompts"]["query"]
    text = [config.bos_id, *prompt]
    photo = reference.ids("query")
    pad = len(photo) - len(text)
    batch = {
        "input_ids": torch.tensor([[0] * pad + text, photo, [0] * pad + text]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(text), [1] * len(photo), [0] * pad + [1] * len(text)]),
        "image_features": reference.features[:1],
    }
    alone = reference.model.generate(input_ids=torch.tensor([text]), max_new_tokens=6, do_sample=False)[0, -6:]
    mixed = reference.model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    assert mixed.tolist() == [alone.tolist(), reference.expected["greedy"]["0_query"][:6], alone.tolist()]
    several = reference.model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert len(several) == 6


def test_text_only_attention_is_causal(reference: Reference) -> None:
    text = torch.tensor([[0, *reference.expected["prompts"]["query"]]])
    changed = text.clone()
    changed[0, -1] = 77
    with torch.no_grad():
        before, after = reference.model(input_ids=text).logits, reference.model(input_ids=changed).logits
    torch.testing.assert_close(before[:, :-1], after[:, :-1])


def test_image_prefix_is_bidirectional_and_text_is_causal(reference: Reference) -> None:
    batch = reference.batch([(0, "query")])
    changed = batch["image_features"].clone()
    changed[:, -1] *= -1
    with torch.no_grad():
        before = reference.model(**batch).logits
        after = reference.model(**{**batch, "image_features": changed}).logits
    assert (before - after)[0, 0].abs().max() > 1e-4
    other = batch["input_ids"].clone()
    other[0, -1] = 77
    with torch.no_grad():
        after = reference.model(**{**batch, "input_ids": other}).logits
    torch.testing.assert_close(before[:, :-1], after[:, :-1])


def test_incremental_forward_with_cache_matches_full_forward(reference: Reference) -> None:
    batch = reference.batch([(0, "query"), (1, "caption_short")])
    with torch.no_grad():
        whole = reference.model(**batch).logits
        cut = batch["input_ids"].shape[1] - 3
        first = reference.model(
            input_ids=batch["input_ids"][:, :cut],
            attention_mask=batch["attention_mask"][:, :cut],
            image_features=batch["image_features"],
            use_cache=True,
        )
        rest = reference.model(
            input_ids=batch["input_ids"][:, cut:],
            attention_mask=batch["attention_mask"],
            past_key_values=first.past_key_values,
        )
    torch.testing.assert_close(rest.logits, whole[:, cut:], atol=1e-5, rtol=0)


def test_inputs_embeds_with_and_without_ids_match_ids(reference: Reference) -> None:
    batch = reference.batch([(0, "query")])
    model = reference.model.model
    embeds = model.embed(batch["input_ids"], batch["image_features"])
    with torch.no_grad():
        expected = model(**batch).pre_norm_hidden_state
        beside = model(**batch, inputs_embeds=embeds).pre_norm_hidden_state
        prefix = model.prefix_mask(batch["input_ids"], None).long()
        alone = model(inputs_embeds=embeds, token_type_ids=prefix).pre_norm_hidden_state
    torch.testing.assert_close(beside, expected)
    torch.testing.assert_close(alone, expected)


def test_pre_norm_state_is_the_last_hidden_state(reference: Reference) -> None:
    with torch.no_grad():
        outputs = reference.model(**reference.batch([(0, "query")]), output_hidden_states=True)
    assert len(outputs.hidden_states) == reference.model.config.text_config.n_layers + 1
    assert outputs.hidden_states[-1] is outputs.pre_norm_hidden_state
    logits = reference.model.lm_head(reference.model.model.text.post_ln(outputs.pre_norm_hidden_state))
    torch.testing.assert_close(logits, outputs.logits)


def test_bins_and_values_are_inverse(reference: Reference) -> None:
    region = reference.model.model.region
    bins = torch.arange(1024)
    assert torch.equal(region.coordinate_to_bin(region.bin_to_coordinate(bins)), bins)
    assert torch.equal(region.size_to_bin(region.bin_to_size(bins)), bins)
    assert region.size_to_bin(torch.tensor([0.0, 2.0])).tolist() == [0, 1023]


def test_teacher_forcing_reproduces_decoded_point(reference: Reference) -> None:
    """One pass over prompt, x and y gives the bins that step-by-step decoding gave."""
    config, model = reference.model.config, reference.model.model
    around = config.templates["point"]
    ids = [config.bos_id, *[config.image_token_id] * config.image_tokens]
    ids = torch.tensor([[*ids, *around["prefix"], *reference.expected["object_ids"], *around["suffix"]]])
    first = reference.expected["point"]["0"][0]
    with torch.no_grad():
        x = model.region.encode_coordinate(torch.tensor([[[first["x"]]]]))
        embeds = torch.cat([model.embed(ids, reference.features[:1]), x], dim=1)
        prefix = torch.cat([model.prefix_mask(ids, None), torch.tensor([[False]])], dim=1).long()
        hidden = model(inputs_embeds=embeds, token_type_ids=prefix).pre_norm_hidden_state[0, -2:]
        bins = model.region.decode_coordinate(hidden).argmax(-1)
    assert (bins / 1024).tolist() == [first["x"], first["y"]]


def test_sampled_regions_encode_images_once(reference: Reference) -> None:
    given = {name: value[:2] for name, value in reference.inputs.items()}
    with count_computed(reference) as one:
        reference.model.point(reference.expected["object_ids"], max_objects=1, **given)
    torch.manual_seed(0)
    with count_computed(reference) as four:
        found = reference.model.point(
            reference.expected["object_ids"], max_objects=1, temperature=2.0, num_return_sequences=4, **given
        )
    assert len(found) == 8
    assert four["crops"] == one["crops"]
    assert four["tokens"] - one["tokens"] == 6  # the one step after x, for six rows more
    assert len({str(entries) for entries in found}) > 2


def test_finished_row_adds_no_regions_while_others_continue() -> None:
    reference, model = load("moondream2-small"), load_small_model().eval()
    ends = iter([[True, False], [False, False], [True, True]])

    def script(module: torch.nn.Module, given: tuple, scores: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([0 if end else 50 for end in next(ends)]), scores.shape[-1])

    model.lm_head.register_forward_hook(script)
    given = {name: value[:2] for name, value in reference.inputs.items()}
    found = model.point(reference.expected["object_ids"], **given)
    assert [len(entries) for entries in found] == [0, 2]


def test_stop_callback_ends_region_decoding(reference: Reference) -> None:
    calls = iter([False, False, True, True, True])
    found = reference.model.detect(
        reference.expected["object_ids"], image_features=reference.features[:1], stop=lambda: next(calls)
    )
    assert len(found[0]) == 1


def test_repetition_penalty_raises(reference: Reference) -> None:
    with pytest.raises(ValueError, match="repetition_penalty must be 1"):
        reference.model.generate(**reference.batch([(0, "query")]), repetition_penalty=1.2, max_new_tokens=2)


def test_too_long_prompt_raises_with_the_number_that_fits() -> None:
    reference = load("moondream2-full")
    batch = reference.batch([(1, "query")])
    with pytest.raises(ValueError, match=r"has 742 tokens .* 729 of them.* 2000 new tokens .* at most 1306"):
        reference.model.generate(**batch, max_new_tokens=2000)
    long = torch.cat([batch["input_ids"], torch.full((1, 1400), 50)], dim=1)
    with pytest.raises(ValueError, match="the context is limited to 2048"):
        reference.model.generate(input_ids=long, image_features=batch["image_features"], max_new_tokens=1)
    with pytest.raises(ValueError, match="the context is limited to 2048"):
        reference.model.detect([50] * 1400, image_features=batch["image_features"])


def test_mismatched_images_raise(reference: Reference) -> None:
    batch = reference.batch([(0, "query")], features=False)
    with pytest.raises(ValueError, match="16 image placeholders, the images have 32"):
        reference.model(input_ids=batch["input_ids"], image_features=reference.features[:2])
    with pytest.raises(ValueError, match="image_sizes"):
        reference.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="needs 7 crops"):
        reference.model.get_image_features(batch["pixel_values"][:, :3], torch.tensor([[2, 3]]))


def test_answer_marker_is_generated_only_as_first_token(reference: Reference) -> None:
    model = load_small_model().eval()
    with torch.no_grad():
        model.lm_head.bias[3] = 1e4
    written = model.generate(**reference.batch([(0, "query")]), max_new_tokens=5, do_sample=True)[0, -5:].tolist()
    assert written[0] == 3
    assert 3 not in written[1:]
