"""Training of Moondream: LoRA, gradient checkpointing, bfloat16 and TRL's GRPOTrainer."""

from __future__ import annotations

import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from inference.moondream import MoondreamConfig, MoondreamForConditionalGeneration, MoondreamProcessor
from inference.moondream.processing_moondream import build_templates
from tests.support.moondream_reference import load_small_model, reference
from tests.support.moondream_tokenizer import as_fast_tokenizer, build_tokenizer

TEXT_LINEARS = r".*\.text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"


def batch() -> dict[str, torch.Tensor]:
    """Return a padded batch with two tilings, from pixels, with labels on the last four tokens."""
    given = reference("moondream2-small").batch([(0, "query"), (1, "caption_short")], features=False)
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, -4:] = given["input_ids"][:, -4:]
    return {**given, "labels": labels}


def lora(model: MoondreamForConditionalGeneration) -> PeftModel:
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TEXT_LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def descend(model: torch.nn.Module, steps: int, rate: float) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_all_weights_but_region_heads_get_gradients() -> None:
    model = load_small_model().train()
    model(**batch()).loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without
    assert all(name.startswith("model.region.") for name in without)


def test_loss_is_next_token_cross_entropy() -> None:
    given = batch()
    labels = given.pop("labels")
    model = reference("moondream2-small").model
    with torch.no_grad():
        loss, logits = model(**given, labels=labels).loss, model(**given).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, -5:-1].flatten(0, 1), labels[:, -4:].flatten())
    torch.testing.assert_close(loss, wanted)
    with torch.no_grad():
        accumulated = model(**given, labels=labels, num_items_in_batch=16).loss
    torch.testing.assert_close(accumulated, wanted / 2)


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    plain, checkpointed = load_small_model().train(), load_small_model().train()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.model.text.blocks[0].gradient_checkpointing
    calls = []
    checkpointed.model.text.blocks[0].ln.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(**batch(), use_cache=False).loss.backward()
    assert len(calls) == 2  # once forward, once again for the gradient
    gradients = [{n: w.grad for n, w in model.named_parameters()} for model in (plain, checkpointed)]
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_lora_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    model = lora(load_small_model())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 * 2  # two blocks, four linears, A and B
    losses = descend(model, steps=6, rate=1e-2)
    assert losses[-1] < losses[0] - 0.5
    given = batch()
    with torch.no_grad():
        expected = model.eval()(**given).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_small_model(), tmp_path).eval()
    merged = PeftModel.from_pretrained(load_small_model(), tmp_path).merge_and_unload().eval()
    assert isinstance(merged, MoondreamForConditionalGeneration)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged(**given).logits, expected, atol=1e-4, rtol=0)
        with loaded.disable_adapter():
            base = loaded(**given).logits
    torch.testing.assert_close(base, reference("moondream2-small").model(**given).logits, atol=1e-5, rtol=0)
    assert (base - expected).abs().max() > 1e-2


def test_merged_model_saves_under_original_names(tmp_path: Path) -> None:
    model = lora(load_small_model())
    descend(model, steps=1, rate=1e-2)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = MoondreamForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(merged.state_dict().values(), again.state_dict().values()))


def test_adapted_model_generates_and_encodes_images_once() -> None:
    model = lora(load_small_model()).eval()
    given = batch()
    del given["labels"]
    written = model.generate(**given, max_new_tokens=6, do_sample=False)
    expected = reference("moondream2-small").model.generate(**given, max_new_tokens=6, do_sample=False)
    assert written.tolist() == expected.tolist()
    seen = []
    model.base_model.model.model.vision.patch_emb.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    model.generate(**given, max_new_tokens=2, do_sample=True, num_return_sequences=4)
    assert seen == [5]  # four crops of the first photo, one of the second


def test_lora_trains_with_gradient_checkpointing() -> None:
    model = lora(load_small_model()).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    losses = descend(model, steps=4, rate=1e-2)
    assert losses[-1] < losses[0]


def test_bfloat16_is_close_to_float32_and_generates() -> None:
    exact = reference("moondream2-small")
    model = copy.deepcopy(exact.model).to(torch.bfloat16)
    given = exact.batch([(0, "query"), (1, "caption_short")], features=False)
    with torch.no_grad():
        logits, wanted = model(**given).logits, exact.model(**given).logits
    assert logits.dtype == torch.bfloat16
    real = given["attention_mask"] == 1
    assert logits.isfinite().all()
    assert (logits.float() - wanted)[real].abs().max() < 0.1
    assert model.generate(**given, max_new_tokens=4, do_sample=True, num_return_sequences=2).shape[0] == 4
    boxes = model.detect(exact.expected["object_ids"], max_objects=2, **exact.inputs)
    assert all(np.isfinite(list(box.values())).all() for found in boxes for box in found)
    model.train()
    model(**given, labels=given["input_ids"]).loss.backward()
    assert model.model.text.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_crops_are_normalised_in_the_model_dtype() -> None:
    exact = reference("moondream2-small")
    vision = copy.deepcopy(exact.model.model.vision).to(torch.bfloat16)
    crops = exact.inputs["pixel_values"][0, :1]
    seen = []
    vision.patch_emb.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        vision.encode_crops(crops)
    side = vision.config.enc_patch_size
    corner = crops[0, :, :side, :side].flatten().to(torch.bfloat16)
    assert torch.equal(seen[0][0, 0], (corner / 255 - 0.5) / 0.5)


# TRL


@pytest.fixture(scope="module")
def tiny() -> tuple[MoondreamForConditionalGeneration, MoondreamProcessor]:
    """Return a model of a few thousand parameters with its tokenizer."""
    tokenizer = as_fast_tokenizer(build_tokenizer())
    sections = {
        "text": {"dim": 32, "ff_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": len(tokenizer)},
        "vision": {
            "enc_dim": 16, "enc_n_layers": 1, "enc_ff_dim": 32, "enc_n_heads": 2, "proj_inner_dim": 16,
            "crop_size": 56, "max_crops": 4, "overlap_margin": 1,
        },
        "region": {"inner_dim": 16},
        "tokenizer": {"templates": build_templates(tokenizer)},
    }  # fmt: skip
    torch.manual_seed(0)
    config = MoondreamConfig(config=sections)
    return MoondreamForConditionalGeneration(config), MoondreamProcessor.from_config(config, tokenizer)


def test_trl_grpo_trainer_runs_two_steps(tiny: tuple, tmp_path: Path) -> None:
    model, processor = tiny
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (side, 90, 3), dtype=np.uint8)) for side in (50, 120, 60, 130)]
    prompt = [{"role": "user", "content": "is it dark?"}]
    rows = datasets.Dataset.from_dict({"prompt": [prompt] * 4, "image": photos})
    groups = []

    def reward(completions: list, **kwargs: object) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        groups.append(len(texts))
        return [float(len(set(text))) for text in texts]

    settings = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=2, learning_rate=1e-2, beta=0.04, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        logging_steps=1, save_strategy="no", dataloader_pin_memory=False, seed=1, temperature=1.5,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=copy.deepcopy(model), reward_funcs=reward, args=settings, train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(r=4, target_modules=TEXT_LINEARS, task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert trainer.state.global_step == 2
    assert sum(groups) == 8
    assert changed
    assert all("lora_" in name for name in changed)


def test_trainer_log_probabilities_equal_sampled_ones(tiny: tuple, tmp_path: Path) -> None:
    """The trainer's forward pass must use the bidirectional image prefix; a causal prefix gives other values."""
    model, processor = tiny
    photos = [np.full((120, 90, 3), 200, np.uint8), np.zeros((50, 60, 3), np.uint8)]
    given = processor.prepare(photos, "query", ["is it dark?", "?"])
    torch.manual_seed(0)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        model.lm_head.bias[[0, 3]] = -30.0
    out = model.generate(
        **given, max_new_tokens=5, do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True
    )
    new = out.sequences[:, given["input_ids"].shape[1] :]
    sampled = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, new[..., None])
    mask = torch.cat([given["attention_mask"], torch.ones_like(new)], 1)
    images = {name: given[name] for name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        base = model.base_model(input_ids=out.sequences, attention_mask=mask, use_cache=False, **images)
        head = model.get_output_embeddings()
        logits = base.last_hidden_state[:, -6:-1] @ head.weight.T + head.bias
        causal = model.base_model(
            input_ids=out.sequences, attention_mask=mask, token_type_ids=torch.zeros_like(mask), **images
        )
        other = causal.last_hidden_state[:, -6:-1] @ head.weight.T + head.bias
    trained = logits.log_softmax(-1).gather(-1, new[..., None])
    torch.testing.assert_close(trained, sampled, atol=1e-5, rtol=0)
    assert (other - logits).abs().max() > 1e-5
