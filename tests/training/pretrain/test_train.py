"""Pre-training: packing, losses, reproducible and resumable runs, export."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from inference.types import RECIPE_QUESTION
from recipes import grammar_segments, load_photo, parse
from training.data.bundled import bundled_photos
from training.pretrain.auxiliary_heads import IMAGE_TARGETS, TOKEN_TARGETS
from training.pretrain.dataset import EXAMPLES, IGNORE, PretrainDataset, augment, rotate_hues
from training.pretrain.image_facts import to_lab
from training.pretrain.losses import PackedBatch, pack, recipe_loss, recipe_segments
from training.pretrain.model_card import export
from training.pretrain.photos import PretrainPhotos
from training.pretrain.quality import ModelEvaluator
from training.pretrain.train import ModelParts, PretrainConfig, build_ema, build_model, train

pytestmark = pytest.mark.slow

CONFIG = PretrainConfig(seed=3, steps=4, batch_size=2, warmup_steps=2)


@pytest.fixture(scope="module")
def photos() -> PretrainPhotos:
    return PretrainPhotos([load_photo(info.path) for info in bundled_photos("train")[:3]])


@pytest.fixture(scope="module")
def parts(photos: PretrainPhotos) -> ModelParts:
    return build_model(CONFIG, photos.bundled)


@pytest.fixture(scope="module")
def dataset(parts: ModelParts, photos: PretrainPhotos) -> PretrainDataset:
    model, _, tokenizer = parts
    return PretrainDataset(photos, tokenizer, model.config.templates, batch_size=4, seed=1, steps=5, grid=8)


def test_a_batch_depends_on_seed_and_step_only(dataset: PretrainDataset) -> None:
    first, again, other = dataset[2], dataset[2], dataset[3]
    assert all(np.array_equal(a, b) for a, b in zip(first["images"], again["images"], strict=True))
    assert first["recipe"] == again["recipe"]
    assert first["recipe"] != other["recipe"]


def test_augment_keeps_the_shape_and_changes_the_photo(photos: PretrainPhotos) -> None:
    photo, other = photos.bundled[:2]
    augmented = [augment(photo, other, np.random.default_rng(seed)) for seed in range(30)]
    assert all(v.shape == photo.shape and v.dtype == np.uint8 for v in augmented)
    assert np.array_equal(augmented[3], augment(photo, other, np.random.default_rng(3)))
    assert sum(bool((v[..., 0] == v[..., 2]).all()) for v in augmented) < 10
    assert 0 < sum(np.array_equal(v, photo) for v in augmented) < 15, "some lessons keep the photo's own tones"
    assert np.ptp([v.mean() for v in augmented]) > 20


def test_rotate_hues_keeps_lightness_and_chroma() -> None:
    photo = np.full((4, 4, 3), (150, 120, 100), np.uint8)
    before, after = to_lab(photo)[0, 0], to_lab(rotate_hues(photo, 1.0))[0, 0]
    assert after[0] == pytest.approx(before[0], abs=1)
    assert np.hypot(*after[1:]) == pytest.approx(np.hypot(*before[1:]), abs=1.5)
    assert abs(np.arctan2(after[2], after[1]) - np.arctan2(before[2], before[1])) == pytest.approx(1.0, abs=0.1)


def test_examples_use_the_inference_templates(dataset: PretrainDataset) -> None:
    for example in dataset[0]["recipe"]:
        text = dataset.tokenizer.decode(example.prompt, skip_special_tokens=True)
        assert text == "query" + RECIPE_QUESTION
        assert example.prompt[-2:] == [3, 3]
        answer = dataset.tokenizer.decode(example.answer[:-1])
        assert str(parse(answer).recipe) == answer
        assert len(example.answer) == len(grammar_segments()) + 1


def test_packed_examples_equal_separate_ones(parts: ModelParts, dataset: PretrainDataset) -> None:
    model, image_processor, _ = parts
    batch = dataset[0]
    images = image_processor(batch["images"], return_tensors="pt")
    rows = list(zip(*(batch[name] for name in EXAMPLES), strict=True))
    with torch.inference_mode():
        features = model.get_image_features(images["pixel_values"], images["image_sizes"])

        def states(packed: PackedBatch) -> list[torch.Tensor]:
            out = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
            return [hidden[label != IGNORE] for hidden, label in zip(out.last_hidden_state, packed.labels, strict=True)]

        together = states(pack(model, features, rows))
        for index, row in enumerate(rows):
            alone = [states(pack(model, features[index : index + 1], [[example]]))[0] for example in row]
            assert torch.allclose(together[index], torch.cat(alone), atol=1e-5)


def test_a_packed_example_equals_the_models_forward_pass(parts: ModelParts, dataset: PretrainDataset) -> None:
    """The mask and positions of packing are those of inference."""
    model, image_processor, tokenizer = parts
    batch = dataset[1]
    example = batch["recipe"][0]
    inputs = ModelEvaluator(model, image_processor, tokenizer).inputs(
        batch["images"][:1], [example.prompt + example.answer[:-1]]
    )
    with torch.inference_mode():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        packed = pack(model, features, [[example]])
        actual = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
        expected = model.model(**inputs)
    assert torch.allclose(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5)


def test_auxiliary_targets_describe_the_degradation(dataset: PretrainDataset) -> None:
    batch = dataset[3]
    for photo, example, image, tokens in zip(
        batch["images"], batch["recipe"], batch["image_targets"], batch["token_targets"], strict=True
    ):
        recipe = parse(dataset.tokenizer.decode(example.answer[:-1])).recipe
        assert image[:4] * 40 == pytest.approx([recipe.exposure, recipe.contrast, recipe.saturation, recipe.warmth])
        assert image[5:9] * 10 == pytest.approx([*recipe.crop[:2], 100 - recipe.crop[2], 100 - recipe.crop[3]])
        assert tokens.shape == (64, TOKEN_TARGETS)
        assert image.shape == (IMAGE_TARGETS,)
        light = to_lab(photo)[..., 0].mean()
        assert tokens[:, 0].mean() * 20 + 50 == pytest.approx(light, abs=1)


def test_near_levels_have_a_lower_loss_than_far_ones(parts: ModelParts) -> None:
    _, _, tokenizer = parts
    segments = recipe_segments(tokenizer, 0.8)
    encode = lambda text: torch.tensor([[*tokenizer.encode(text, add_special_tokens=False), 0]])  # noqa: E731
    text = "crop 0 0 100 100; exposure {}; contrast 0; saturation 0; warmth 0; sharpening 0; look none"
    true = encode(text.format("+10"))

    def loss(level: str) -> float:
        logits = 8.0 * torch.nn.functional.one_hot(encode(text.format(level)), len(tokenizer)).float()
        return float(recipe_loss(logits, true, segments))

    assert loss("+10") < loss("+20") < loss("+40")
    assert loss("+20") == pytest.approx(loss("0"), rel=1e-4)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, photos: PretrainPhotos) -> None:
    class InterruptedRunError(Exception):
        pass

    uninterrupted, _ = train(CONFIG, tmp_path / "uninterrupted", photos, resume=False, save_every=2, workers=0)

    class FailingPhotos(list):
        """Photos that fail in the third step: each is read once at first, then two per example."""

        reads = 0

        def __getitem__(self, index: int) -> np.ndarray:
            FailingPhotos.reads += 1
            if FailingPhotos.reads > len(photos) + 4 * CONFIG.batch_size:
                raise InterruptedRunError
            return super().__getitem__(index)

    failing = PretrainPhotos(FailingPhotos(photos.bundled))
    with pytest.raises(InterruptedRunError):
        train(CONFIG, tmp_path / "interrupted", failing, resume=False, save_every=2, workers=0)
    saved = torch.load(tmp_path / "interrupted" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    resumed, _ = train(CONFIG, tmp_path / "interrupted", photos, resume=True, save_every=2, workers=0)
    for name, value in uninterrupted[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "uninterrupted" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]


def test_a_checkpoint_with_other_settings_is_rejected(tmp_path: Path, photos: PretrainPhotos) -> None:
    torch.save({"config": asdict(PretrainConfig(seed=99))}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="other settings"):
        train(CONFIG, tmp_path, photos, resume=True, workers=0)


def test_a_checkpoint_of_an_older_version_is_rejected(tmp_path: Path, photos: PretrainPhotos) -> None:
    torch.save({"settings": {"seed": 3}, "step": 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="older version"):
        train(CONFIG, tmp_path, photos, resume=True, workers=0)


def test_the_moving_average_starts_with_the_initial_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    ema = build_ema(model, decay=0.15)
    for value, expected in ((2.0, 1.9), (3.0, 1.9 + (3 - 1.9) * 0.85)):  # decays 1/10, then min(0.15, 2/11)
        torch.nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        assert ema.module.weight.item() == pytest.approx(expected)


def test_the_exported_folder_loads_with_the_auto_classes(tmp_path: Path, parts: ModelParts) -> None:
    model, image_processor, tokenizer = parts
    weights = {name: value.half().float() for name, value in model.state_dict().items()}
    export(model, image_processor, tokenizer, tmp_path / "tiny", "# card\n", {"a": 1}, [{"name": "bundled"}])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in weights.items())
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert processor.tokenizer.encode("; exposure +10") == tokenizer.encode("; exposure +10")
    assert not (tmp_path / "tiny.part").exists()
    assert json.loads((tmp_path / "tiny" / "sources.json").read_text()) == [{"name": "bundled"}]
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").iterdir()) < 10_000_000
    assert ModelEvaluator.from_folder(tmp_path / "tiny").templates == model.config.templates
    model.float()
