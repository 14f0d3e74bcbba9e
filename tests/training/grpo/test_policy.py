"""The policy: shared prompts, cached features and merged adapters change no result; sampling and scoring agree."""

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
from recipes import grammar_segments, load_photo, parse, shrink
from training.data.bundled import bundled_photos
from training.grpo.policy import CachingImageProcessor, ImageFeatureCache, Policy, generate_greedy

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def processor() -> MoondreamProcessor:
    return MoondreamProcessor.from_pretrained(TINY)


@pytest.fixture
def policy(processor: MoondreamProcessor) -> Policy:
    torch.manual_seed(0)
    policy = Policy.from_pretrained(TINY, dtype=torch.float32)
    policy.prepare(RecipeConstraint(processor.tokenizer, grammar_segments(), end_id=policy.config.eos_id), TEMPERATURE)
    return policy


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [shrink(load_photo(photo.path), 300) for photo in bundled_photos("held-out")[:3]]


def rollouts(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray], counts: tuple[int, ...] = (3, 1, 2)
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sample completions as a trainer does; return the batch and the log-probabilities at sampling time, [B, K]."""
    rows = [photo for photo, count in zip(photos, counts, strict=True) for _ in range(count)]
    inputs = dict(processor.prepare(rows, "query", [RECIPE_QUESTION] * len(rows)))
    prompt = inputs["input_ids"].shape[1]
    torch.manual_seed(1)
    output = policy.generate(
        **inputs,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=40,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, prompt:])], 1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    sampled = torch.stack(output.scores, 1).log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images}, sampled


def test_importance_ratio_is_one_before_the_first_update(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    batch, sampled = rollouts(policy, processor, photos)
    with torch.no_grad():
        scored = policy(**batch, fused_lm_head=True)
    assert torch.allclose(scored.log_probs, sampled, atol=1e-4)
    assert ((scored.log_probs - sampled).exp() - 1).abs().max() < 1e-4
    assert (sampled < -0.1).any(), "some tokens had alternatives"


def test_importance_ratio_differs_without_the_grammar(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    with torch.no_grad():
        policy.lm_head.bias[300:] += 12.0  # make tokens likely that the grammar forbids
        batch, sampled = rollouts(policy, processor, photos)
        policy.constraint = None
        scored = policy(**batch, fused_lm_head=True)
    assert not torch.allclose(scored.log_probs, sampled, atol=1e-2)


def test_shared_prompts_give_the_scores_of_separate_rows(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    batch, _ = rollouts(policy, processor, photos)
    with torch.no_grad():
        shared = policy(**batch, fused_lm_head=True)
        policy.share_prompts = False
        plain = policy(**batch, fused_lm_head=True)
    assert torch.allclose(shared.log_probs, plain.log_probs, atol=1e-5)
    assert torch.allclose(shared.entropy, plain.entropy, atol=1e-5)
    assert shared.log_probs.shape == (6, len(grammar_segments()) + 1)


def test_shared_prompts_ignore_padding(policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]) -> None:
    """Prompts of two lengths: the shorter one is padded on the left."""
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
    batch = {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        shared = policy(**batch, fused_lm_head=True).log_probs
        policy.share_prompts = False
        assert torch.allclose(shared, policy(**batch, fused_lm_head=True).log_probs, atol=1e-5)


def test_shared_prompts_give_the_same_gradients(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    batch, _ = rollouts(policy, processor, photos)
    model = get_peft_model(policy, LoraConfig(r=4, target_modules=r".*\.text\.blocks\.\d+\.mlp\.fc[12]"))
    weights = torch.randn(batch["labels"].shape[0], 1)

    def gradients(share: bool) -> Iterator[torch.Tensor]:
        policy.share_prompts = share
        model.zero_grad()
        (model(**batch, fused_lm_head=True).log_probs * weights).mean().backward()
        return (p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)

    pairs = list(zip(list(gradients(True)), list(gradients(False)), strict=True))
    assert max(float(a.abs().max()) for a, _ in pairs) > 0
    for shared, plain in pairs:
        torch.testing.assert_close(shared, plain, atol=1e-6, rtol=1e-3)


def test_generation_merges_adapters_and_restores_the_weights(
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
    merged = model.generate(**inputs, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unmerged = super(Policy, policy).generate(  # type: ignore[misc]
        **inputs,
        **settings,
        logits_processor=[policy.constraint.processor(inputs["input_ids"].shape[1])],  # type: ignore[union-attr]
    )
    assert merged.tolist() == unmerged.tolist()
    with model.disable_adapter():
        assert model.generate(**inputs, **settings).tolist() != merged.tolist()
    batch, _ = rollouts(policy, processor, photos)
    model(**batch, fused_lm_head=True).log_probs.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "lora_B" in name)


def test_each_photo_is_encoded_once(policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]) -> None:
    crops: list[int] = []
    policy.model.vision.patch_emb.register_forward_pre_hook(lambda _, x: crops.append(len(x[0])))
    batch, _ = rollouts(policy, processor, photos)
    encoded = sum(crops)
    with torch.no_grad():
        cached = policy(**batch, fused_lm_head=True).log_probs
    generate_greedy(policy, processor, photos, RECIPE_QUESTION)
    assert sum(crops) == encoded == int((batch["image_sizes"][[0, 3, 4]].prod(1) + 1).sum())
    policy.image_cache = None
    with torch.no_grad():
        assert torch.allclose(policy(**batch, fused_lm_head=True).log_probs, cached, atol=1e-6)
    assert sum(crops) > encoded


def test_feature_cache_distinguishes_photos_that_differ_in_one_pixel() -> None:
    batch_sizes: list[int] = []

    def encode(pixels: torch.Tensor, tilings: torch.Tensor) -> torch.Tensor:
        batch_sizes.append(len(pixels))
        return torch.zeros(len(pixels), 2, 3)

    cache = ImageFeatureCache(encode, limit=2)
    pixels = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    pixels[1, 2, 0, 0, 0] = 1
    tilings = torch.ones(2, 2, dtype=torch.long)
    assert cache(pixels, tilings).shape == (2, 2, 3)
    cache(pixels[[1, 0, 1]], tilings[[1, 0, 1]])
    assert batch_sizes == [2]
    pixels[0, 0, 0, 0, 0] = 9
    cache(pixels[:1], tilings[:1])
    assert batch_sizes == [2, 1]


def test_caching_image_processor_processes_each_picture_once(photos: list[np.ndarray]) -> None:
    settings = {"crop_size": 112, "patch_size": 14, "max_crops": 8, "overlap_margin": 1}
    plain, caching = MoondreamImageProcessor(**settings), CachingImageProcessor(**settings)
    pictures = [Image.fromarray(photo) for photo in photos]
    rows = [[pictures[0]], [pictures[0].copy()], [pictures[2]]]
    expected, first, second = plain(rows), caching(rows), caching(rows)
    for name in expected:
        assert torch.equal(first[name], expected[name])
        assert torch.equal(second[name], expected[name])
    assert len(caching._crops) == 2  # type: ignore[attr-defined]
    assert "_crops" not in caching.to_dict()


def test_greedy_answers_are_canonical_recipes(
    policy: Policy, processor: MoondreamProcessor, photos: list[np.ndarray]
) -> None:
    texts = generate_greedy(policy, processor, photos, RECIPE_QUESTION, batch_size=2)
    assert [str(parse(text).recipe) for text in texts] == texts
