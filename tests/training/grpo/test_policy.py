"""The policy: what it computes once for many is what each would compute alone, and sampling and scoring agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamImageProcessor, MoondreamProcessor
from inference.registry import TINY
from inference.types import RECIPE_QUESTION
from recipes import grammar, load_photo, parse, shrink
from training.data.bundled import bundled
from training.grpo.policy import CachingImageProcessor, ImageFeatureCache, Policy, greedy

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def processor() -> MoondreamProcessor:
    return MoondreamProcessor.from_pretrained(TINY)


@pytest.fixture
def policy(processor: MoondreamProcessor) -> Policy:
    torch.manual_seed(0)
    made = Policy.from_pretrained(TINY, dtype=torch.float32)
    made.prepare(RecipeConstraint(processor.tokenizer, grammar(), end_id=made.config.eos_id), TEMPERATURE)
    return made


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [shrink(load_photo(info.path), 300) for info in bundled("held-out")[:3]]


def rollouts(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray], counts: tuple[int, ...] = (3, 1, 2)
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sampled answers, several to some photos, as a trainer gives them; and their log-probabilities when drawn."""
    rows = [photo for photo, count in zip(photos, counts, strict=True) for _ in range(count)]
    inputs = dict(processor.prepare(rows, "query", [RECIPE_QUESTION] * len(rows)))
    prompt = inputs["input_ids"].shape[1]
    torch.manual_seed(1)
    out = policy.generate(
        **inputs,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=40,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = out.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, prompt:])], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    drawn = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images}, drawn


def test_the_importance_ratio_is_one_before_the_first_update(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    given, drawn = rollouts(policy, processor, photos)
    with torch.no_grad():
        scored = policy(**given, fused_lm_head=True)
    assert torch.allclose(scored.log_probs, drawn, atol=1e-4)
    assert ((scored.log_probs - drawn).exp() - 1).abs().max() < 1e-4
    assert (drawn < -0.1).any(), "something was really chosen"


def test_without_the_grammar_the_ratio_would_not_be_one(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    with torch.no_grad():
        policy.lm_head.bias[300:] += 12.0  # words that the grammar forbids become likely
        given, drawn = rollouts(policy, processor, photos)
        policy.constraint = None
        scored = policy(**given, fused_lm_head=True)
    assert not torch.allclose(scored.log_probs, drawn, atol=1e-2)


def test_a_shared_prompt_gives_each_row_what_it_would_compute_alone(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    given, _ = rollouts(policy, processor, photos)
    with torch.no_grad():
        shared = policy(**given, fused_lm_head=True)
        policy.share = False
        plain = policy(**given, fused_lm_head=True)
    assert torch.allclose(shared.log_probs, plain.log_probs, atol=1e-5)
    assert torch.allclose(shared.entropy, plain.entropy, atol=1e-5)
    assert shared.log_probs.shape == (6, len(grammar()) + 1)


def test_padded_prompts_are_shared_rightly(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    """Prompts of two lengths: the shorter one stands behind padding, and its rows see nothing of it."""
    rows = [photos[0], photos[0], photos[1]]
    inputs = dict(
        processor.prepare(rows, "query", [RECIPE_QUESTION, RECIPE_QUESTION, "How bright is this photo, then?"])
    )
    prompt = inputs["input_ids"].shape[1]
    assert not inputs["attention_mask"].all()
    torch.manual_seed(2)
    ids = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=40)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, prompt:])], 1)
    labels = ids.clone()
    labels[:, :prompt] = -100
    given = {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        shared = policy(**given, fused_lm_head=True).log_probs
        policy.share = False
        assert torch.allclose(shared, policy(**given, fused_lm_head=True).log_probs, atol=1e-5)


def test_the_gradients_of_an_adapter_are_the_same_either_way(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    given, _ = rollouts(policy, processor, photos)
    model = get_peft_model(policy, LoraConfig(r=4, target_modules=r".*\.text\.blocks\.\d+\.mlp\.fc[12]"))
    weights = torch.randn(given["labels"].shape[0], 1)

    def gradients(share: bool) -> Iterator[torch.Tensor]:
        policy.share = share
        model.zero_grad()
        (model(**given, fused_lm_head=True).log_probs * weights).mean().backward()
        return (p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)

    pairs = list(zip(list(gradients(True)), list(gradients(False)), strict=True))
    assert max(float(a.abs().max()) for a, _ in pairs) > 0
    for shared, plain in pairs:
        torch.testing.assert_close(shared, plain, atol=1e-6, rtol=1e-3)


def test_adapters_are_folded_in_for_writing_and_come_out_again(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    model = get_peft_model(policy, LoraConfig(r=4, target_modules=r".*\.text\.blocks\.\d+\.mlp\.fc[12]"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = processor.prepare(photos, "query", [RECIPE_QUESTION] * 3)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
    written = model.generate(**inputs, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unfolded = super(Policy, policy).generate(  # type: ignore[misc]
        **inputs,
        **settings,
        logits_processor=[policy.constraint.processor(inputs["input_ids"].shape[1])],  # type: ignore[union-attr]
    )
    assert written.tolist() == unfolded.tolist()
    with model.disable_adapter():
        assert model.generate(**inputs, **settings).tolist() != written.tolist()
    given, _ = rollouts(policy, processor, photos)
    model(**given, fused_lm_head=True).log_probs.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "lora_B" in name)


def test_each_photo_is_looked_at_once(policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]) -> None:
    crops: list[int] = []
    policy.model.vision.patch_emb.register_forward_pre_hook(lambda _, x: crops.append(len(x[0])))
    given, _ = rollouts(policy, processor, photos)
    looked = sum(crops)
    with torch.no_grad():
        remembered = policy(**given, fused_lm_head=True).log_probs
    greedy(policy, processor, photos, RECIPE_QUESTION)
    assert sum(crops) == looked == int((given["image_sizes"][[0, 3, 4]].prod(1) + 1).sum())
    policy.looks = None
    with torch.no_grad():
        assert torch.allclose(policy(**given, fused_lm_head=True).log_probs, remembered, atol=1e-6)
    assert sum(crops) > looked


def test_photos_that_differ_in_one_pixel_are_two(policy: Policy, processor: MoondreamProcessor) -> None:
    seen: list[int] = []

    def see(pixels: torch.Tensor, tilings: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return torch.zeros(len(pixels), 2, 3)

    looks = ImageFeatureCache(see, limit=2)
    pixels = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    pixels[1, 2, 0, 0, 0] = 1
    tilings = torch.ones(2, 2, dtype=torch.long)
    assert looks(pixels, tilings).shape == (2, 2, 3)
    looks(pixels[[1, 0, 1]], tilings[[1, 0, 1]])
    assert seen == [2]
    pixels[0, 0, 0, 0, 0] = 9
    looks(pixels[:1], tilings[:1])
    assert seen == [2, 1]


def test_a_repeated_picture_is_cut_once_and_as_the_model_wants_it(photos: list[np.ndarray]) -> None:
    settings = {"crop_size": 112, "patch_size": 14, "max_crops": 8, "overlap_margin": 1}
    plain, repeated = MoondreamImageProcessor(**settings), CachingImageProcessor(**settings)
    pictures = [Image.fromarray(photo) for photo in photos]
    rows = [[pictures[0]], [pictures[0].copy()], [pictures[2]]]
    wanted, first, again = plain(rows), repeated(rows), repeated(rows)
    for name in wanted:
        assert torch.equal(first[name], wanted[name])
        assert torch.equal(again[name], wanted[name])
    assert len(repeated._cut) == 2  # type: ignore[attr-defined]
    assert "_cut" not in repeated.to_dict()


def test_greedy_answers_are_recipes(policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]) -> None:
    texts = greedy(policy, processor, photos, RECIPE_QUESTION, at_once=2)
    assert [str(parse(text).recipe) for text in texts] == texts
