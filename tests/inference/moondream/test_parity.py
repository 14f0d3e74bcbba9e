"""Parity with the original implementation: tilings, features, logits, greedy texts, boxes and points."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from inference.moondream import MoondreamImageProcessor
from tests.support.moondream_reference import NAMES, Reference
from tests.support.moondream_reference import reference as load

pytestmark = pytest.mark.slow

LOGITS, FEATURES, REGIONS = 1e-4, 1e-4, 1e-5


@pytest.fixture(params=NAMES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return load(request.param)


def test_references_exist() -> None:
    assert len(NAMES) >= 2


def test_tilings_and_crops(reference: Reference) -> None:
    for i, image in enumerate(reference.expected["images"]):
        assert reference.inputs["image_sizes"][i].tolist() == image["tiling"]
        sums = reference.inputs["pixel_values"][i].long().sum((1, 2, 3))
        assert sums[: image["crops"]].tolist() == reference.tensors[f"crops{i}_sum"].tolist()
        assert sums[image["crops"] :].sum() == 0


def test_pixel_values_have_the_documented_shape(reference: Reference) -> None:
    vision = reference.model.config.vision_config
    count, side = len(reference.images), vision.crop_size
    assert reference.inputs["pixel_values"].shape == (count, vision.max_crops + 1, 3, side, side)
    assert reference.inputs["pixel_values"].dtype == torch.uint8
    assert reference.inputs["image_sizes"].shape == (count, 2)


def test_vision_features(reference: Reference) -> None:
    for i, features in enumerate(reference.features):
        torch.testing.assert_close(features, reference.tensors[f"vision{i}"], atol=FEATURES, rtol=0)


def test_logits_of_single_rows(reference: Reference) -> None:
    for i, name in reference.cases:
        with torch.no_grad():
            logits = reference.model(**reference.batch([(i, name)])).logits[0]
        _assert_logits(reference, i, name, logits)


def test_logits_of_a_left_padded_batch_with_different_tilings(reference: Reference) -> None:
    assert len({tuple(image["tiling"]) for image in reference.expected["images"]}) > 1
    batch = reference.batch(reference.cases, features=False)
    assert batch["attention_mask"].min() == 0
    with torch.no_grad():
        logits = reference.model(**batch).logits
    for row, (i, name) in enumerate(reference.cases):
        _assert_logits(reference, i, name, logits[row, batch["attention_mask"][row] == 1])


def _assert_logits(reference: Reference, i: int, name: str, logits: torch.Tensor) -> None:
    """Compare the logits of one unpadded row: recorded for the prompt, and their logsumexp at every position."""
    expected = reference.tensors[f"logits{i}_{name}"]
    torch.testing.assert_close(logits[-len(expected) :], expected, atol=LOGITS, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), reference.tensors[f"logsumexp{i}_{name}"], atol=LOGITS, rtol=0)


def test_eager_attention_matches_sdpa() -> None:
    reference = load("moondream2-small")
    model = AutoModelForImageTextToText.from_pretrained(reference.folder, attn_implementation="eager").eval()
    batch = reference.batch(reference.cases, features=False)
    with torch.no_grad():
        eager, sdpa = model(**batch).logits, reference.model(**batch).logits
    assert model.model.text.config._attn_implementation == "eager"
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(eager[real], sdpa[real], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_of_a_left_padded_batch(reference: Reference, cache: str) -> None:
    batch = reference.batch(reference.cases)
    expected = [reference.expected["greedy"][f"{i}_{name}"] for i, name in reference.cases]
    written = reference.model.generate(
        **batch, max_new_tokens=len(expected[0]), do_sample=False, cache_implementation=cache
    )
    assert written[:, batch["input_ids"].shape[1] :].tolist() == expected


def test_greedy_text_without_a_cache() -> None:
    reference = load("moondream2-small")
    batch = reference.batch(reference.cases, features=False)
    written = reference.model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    expected = [reference.expected["greedy"][f"{i}_{name}"][:6] for i, name in reference.cases]
    assert written[:, -6:].tolist() == expected


@pytest.mark.parametrize("skill", ["detect", "point"])
def test_regions_of_a_batch_of_images(reference: Reference, skill: str) -> None:
    expected = [reference.expected[skill][str(i)] for i in range(len(reference.images))]
    find = getattr(reference.model, skill)
    found = find(reference.expected["object_ids"], max_objects=len(expected[0]), **reference.inputs)
    _assert_regions(found, expected)


@pytest.mark.parametrize("skill", ["detect", "point"])
def test_regions_of_single_images(skill: str) -> None:
    reference = load("moondream2-small")
    for i in range(len(reference.images)):
        expected = reference.expected[skill][str(i)]
        one = {name: value[i : i + 1] for name, value in reference.inputs.items()}
        ids = torch.tensor([reference.expected["object_ids"]])
        _assert_regions(getattr(reference.model, skill)(ids, max_objects=len(expected), **one), [expected])


def test_regions_of_complete_left_padded_prompts() -> None:
    reference = load("moondream2-small")
    config = reference.model.config
    around = config.templates["detect"]
    prompt = [*around["prefix"], *reference.expected["object_ids"], *around["suffix"]]
    ids = [config.bos_id, *[config.image_token_id] * config.image_tokens, *prompt]
    found = reference.model.detect(
        input_ids=torch.tensor([[0, 0, 0, *ids]] * 2),
        attention_mask=torch.tensor([[0, 0, 0, *[1] * len(ids)]] * 2),
        image_features=reference.features[[0, 1]],
        max_objects=4,
    )
    _assert_regions(found, [reference.expected["detect"]["0"], reference.expected["detect"]["1"]])


def _assert_regions(found: list, expected: list) -> None:
    assert [len(entries) for entries in found] == [len(entries) for entries in expected]
    for entries, wanted in zip(found, expected):
        for entry, want in zip(entries, wanted):
            assert entry == pytest.approx(want, abs=REGIONS)


def test_single_tile_is_encoded_once_and_padding_is_skipped() -> None:
    reference = load("moondream2-small")
    vision, seen = reference.model.model.vision, []
    original = vision.encode_crops
    vision.encode_crops = lambda crops: seen.append(len(crops)) or original(crops)
    try:
        with torch.no_grad():
            reference.model.get_image_features(**reference.inputs)
    finally:
        del vision.encode_crops
    crops = [image["crops"] for image in reference.expected["images"]]
    assert sum(seen) == sum(1 if n == 2 else n for n in crops)


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((378, 4000), (1, 1)),
        ((379, 379), (3, 3)),
        ((480, 640), (2, 4)),
        ((600, 900), (2, 4)),
        ((900, 600), (4, 2)),
        ((3000, 4000), (2, 4)),
        ((8000, 500), (12, 1)),  # 13 rows in the original, beyond its own limit
    ],
)
def test_tilings_at_released_sizes(size: tuple[int, int], tiling: tuple[int, int]) -> None:
    assert MoondreamImageProcessor().tiling(*size) == tiling


def test_tilings_never_exceed_max_crops() -> None:
    processor = MoondreamImageProcessor()
    sides = [1, 20, 378, 379, 500, 700, 1000, 3000, 8000, 40_000]
    tilings = [processor.tiling(height, width) for height in sides for width in sides]
    assert max(rows * columns for rows, columns in tilings) == processor.max_crops
    assert min(min(tiling) for tiling in tilings) == 1
