"""Pre-training: packed lessons lose what they would lose alone, runs repeat and resume, the folder loads again."""

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
from training.pretrain.auxiliary_heads import PLACE_TARGETS, WHOLE_TARGETS
from training.pretrain.dataset import IGNORE, PretrainDataset, turn_hues, vary
from training.pretrain.image_facts import lab
from training.pretrain.losses import PackedBatch, pack, recipe_loss, recipe_segments
from training.pretrain.model_card import export
from training.pretrain.quality import ModelEvaluator, load_evaluator
from training.pretrain.train import Parts, Settings, build, train

SETTINGS = Settings(seed=3, steps=4, batch=2, warmup=2)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return [load_photo(info.path) for info in bundled_photos("train")[:3]]


@pytest.fixture(scope="module")
def parts(photos: list[np.ndarray]) -> Parts:
    return build(SETTINGS, photos)


@pytest.fixture(scope="module")
def lessons(parts: Parts, photos: list[np.ndarray]) -> PretrainDataset:
    model, _, tokenizer = parts
    return PretrainDataset(photos, tokenizer, model.config.templates, batch=4, seed=1, steps=5, grid=8)


def test_a_batch_is_a_function_of_seed_and_step(lessons: PretrainDataset) -> None:
    first, again, other = lessons[2], lessons[2], lessons[3]
    assert all(np.array_equal(a, b) for a, b in zip(first["images"], again["images"], strict=True))
    assert first["recipe"] == again["recipe"]
    assert first["recipe"] != other["recipe"]


def test_a_varied_photo_keeps_its_shape_and_is_another_one(photos: list[np.ndarray]) -> None:
    photo, other = photos[:2]
    varied = [vary(photo, other, np.random.default_rng(seed)) for seed in range(30)]
    assert all(v.shape == photo.shape and v.dtype == np.uint8 for v in varied)
    assert np.array_equal(varied[3], vary(photo, other, np.random.default_rng(3)))
    assert sum(bool((v[..., 0] == v[..., 2]).all()) for v in varied) < 10
    assert np.ptp([v.mean() for v in varied]) > 20


def test_turned_hues_leave_light_and_strength_of_the_colours() -> None:
    photo = np.full((4, 4, 3), (150, 120, 100), np.uint8)
    before, after = lab(photo)[0, 0], lab(turn_hues(photo, 1.0))[0, 0]
    assert after[0] == pytest.approx(before[0], abs=1)
    assert np.hypot(*after[1:]) == pytest.approx(np.hypot(*before[1:]), abs=1.5)
    assert abs(np.arctan2(after[2], after[1]) - np.arctan2(before[2], before[1])) == pytest.approx(1.0, abs=0.1)


def test_lessons_are_in_the_templates_that_inference_uses(lessons: PretrainDataset) -> None:
    for lesson in lessons[0]["recipe"]:
        text = lessons.tokenizer.decode(lesson.prompt, skip_special_tokens=True)
        assert text == "query" + RECIPE_QUESTION
        assert lesson.prompt[-2:] == [3, 3]
        answer = lessons.tokenizer.decode(lesson.answer[:-1])
        assert str(parse(answer).recipe) == answer
        assert len(lesson.answer) == len(grammar_segments()) + 1


def test_packed_lessons_compute_what_each_would_alone(parts: Parts, lessons: PretrainDataset) -> None:
    model, image_processor, _ = parts
    batch = lessons[0]
    images = image_processor(batch["images"], return_tensors="pt")
    rows = list(zip(batch["recipe"], batch["text"], batch["region"], strict=True))
    with torch.inference_mode():
        features = model.get_image_features(images["pixel_values"], images["image_sizes"])

        def states(packed: PackedBatch) -> list[torch.Tensor]:
            out = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
            return [hidden[label != IGNORE] for hidden, label in zip(out.last_hidden_state, packed.labels, strict=True)]

        together = states(pack(model, features, rows))
        for index, row in enumerate(rows):
            alone = [states(pack(model, features[index : index + 1], [[lesson]]))[0] for lesson in row]
            assert torch.allclose(together[index], torch.cat(alone), atol=1e-5)


def test_a_packed_lesson_sees_what_the_model_sees_when_it_answers(parts: Parts, lessons: PretrainDataset) -> None:
    """The training mask and positions are those of the model's own forward pass."""
    model, image_processor, tokenizer = parts
    batch = lessons[1]
    lesson = batch["recipe"][0]
    reader = ModelEvaluator(model, image_processor, tokenizer)
    inputs = reader.inputs(batch["images"][:1], [lesson.prompt + lesson.answer[:-1]])
    with torch.inference_mode():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        packed = pack(model, features, [[lesson]])
        mine = model.model.text(packed.embeds, attention_mask=packed.mask, position_ids=packed.positions)
        theirs = model.model(**inputs)
    assert torch.allclose(mine.last_hidden_state, theirs.last_hidden_state, atol=1e-5)


def test_the_probe_is_told_what_was_done_to_the_photo(lessons: PretrainDataset) -> None:
    batch = lessons[3]
    for photo, lesson, whole, places in zip(
        batch["images"], batch["recipe"], batch["whole"], batch["places"], strict=True
    ):
        recipe = parse(lessons.tokenizer.decode(lesson.answer[:-1])).recipe
        assert whole[:4] * 40 == pytest.approx([recipe.exposure, recipe.contrast, recipe.saturation, recipe.warmth])
        assert whole[5:9] * 10 == pytest.approx([*recipe.crop[:2], 100 - recipe.crop[2], 100 - recipe.crop[3]])
        assert places.shape == (64, PLACE_TARGETS)
        assert whole.shape == (WHOLE_TARGETS,)
        light = lab(photo)[..., 0].mean()
        assert places[:, 0].mean() * 20 + 50 == pytest.approx(light, abs=1)


def test_near_levels_cost_less_than_far_ones(parts: Parts) -> None:
    _, _, tokenizer = parts
    segments = recipe_segments(tokenizer, 0.8)
    encode = lambda text: torch.tensor([[*tokenizer.encode(text, add_special_tokens=False), 0]])  # noqa: E731
    text = "crop 0 0 100 100; exposure {}; contrast 0; saturation 0; warmth 0; sharpening 0; look none"
    true = encode(text.format("+10"))

    def loss(said: str) -> float:
        logits = 8.0 * torch.nn.functional.one_hot(encode(text.format(said)), len(tokenizer)).float()
        return float(recipe_loss(logits, true, segments))

    assert loss("+10") < loss("+20") < loss("+40")
    assert loss("+20") == pytest.approx(loss("0"), rel=1e-4)


def test_a_killed_run_goes_on_and_ends_where_it_would_have(tmp_path: Path, photos: list[np.ndarray]) -> None:
    class Killed(Exception):
        pass

    whole, _ = train(SETTINGS, tmp_path / "whole", photos, resume=False, save_every=2, workers=0)

    class Dying(list):
        """Photos that can be drawn from only until the third step: each once at first, then two a lesson."""

        drawn = 0

        def __getitem__(self, index: int) -> np.ndarray:
            Dying.drawn += 1
            if Dying.drawn > len(photos) + 4 * SETTINGS.batch:
                raise Killed
            return super().__getitem__(index)

    with pytest.raises(Killed):
        train(SETTINGS, tmp_path / "cut", Dying(photos), resume=False, save_every=2, workers=0)
    saved = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    resumed, _ = train(SETTINGS, tmp_path / "cut", photos, resume=True, save_every=2, workers=0)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, photos: list[np.ndarray]) -> None:
    torch.save({"settings": asdict(Settings(seed=99))}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="other settings"):
        train(SETTINGS, tmp_path, photos, resume=True, workers=0)


def test_the_exported_folder_loads_with_the_auto_classes(tmp_path: Path, parts: Parts) -> None:
    model, image_processor, tokenizer = parts
    kept = {name: value.half().float() for name, value in model.state_dict().items()}
    export(model, image_processor, tokenizer, tmp_path / "tiny", "# card\n", {"a": 1})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in kept.items())
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert processor.tokenizer.encode("; exposure +10") == tokenizer.encode("; exposure +10")
    assert not (tmp_path / "tiny.part").exists()
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").iterdir()) < 10_000_000
    reader = load_evaluator(tmp_path / "tiny")
    assert reader.templates == model.config.templates
    model.float()
