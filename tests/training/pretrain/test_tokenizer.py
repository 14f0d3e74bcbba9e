"""The tokenizer of moondream-tiny: one token per grammar alternative, lossless for any text."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import recipes
from training.pretrain.tokenizer import SPECIALS, build_tokenizer, templates

TEXTS = [
    "A bright photo with warm colours and much contrast; the exposure is about +20.",
    "The photo is dark, slightly blurred and almost grey. It is 30 % wider than high.",
    "How should this photo be finished?",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS, vocab_size=1024)


def test_special_tokens_have_moondreams_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(range(15))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids("<|md_reserved_2|>") == 3


@pytest.mark.parametrize("seed", range(20))
def test_a_canonical_recipe_has_one_token_per_segment(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.choice(segment) for segment in recipes.grammar_segments()]
    ids = tokenizer.encode("".join(pieces))
    assert [tokenizer.decode([i]) for i in ids] == pieces


@pytest.mark.parametrize("text", [" 1000", " 10000 +205", "microcrops", " nonesuch", "; exposures 2000", " -1000"])
def test_longer_words_contain_no_grammar_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    alternatives = {piece for segment in recipes.grammar_segments() for piece in segment}
    assert not alternatives & {tokenizer.decode([i]) for i in tokenizer.encode(text)}
    assert tokenizer.decode(tokenizer.encode(text)) == text


PIECES = ["crop", " 1", "00", "+20", "; look", " ", "\n", "none", "é", "🙂", ".", ";", "<|endoftext|>"]


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_encoding_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_user_text_are_encoded_as_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("<|md_reserved_2|><|endoftext|>", split_special_tokens=True)
    assert min(ids) >= len(SPECIALS)


def test_templates_are_distinct_and_in_moondreams_layout(tokenizer: PreTrainedTokenizerFast) -> None:
    ids_by_skill = templates(tokenizer)
    prefixes = [tuple(ids_by_skill[skill]["prefix"]) for skill in ("query", "detect", "point")]
    captions = [tuple(ids_by_skill["caption"][length]) for length in ("short", "normal", "long")]
    assert len({*prefixes, *captions}) == 6
    assert all(ids[0] == 1 and ids[2] == 2 for ids in prefixes + captions)
    assert all(ids[-1] == 3 for ids in captions) and ids_by_skill["query"]["suffix"] == [3]


def test_a_saved_tokenizer_loads_with_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = TEXTS[0] + "".join(segment[-1] for segment in recipes.grammar_segments())
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == tokenizer.encode(text)


def test_a_too_small_vocabulary_raises_with_the_minimum() -> None:
    with pytest.raises(ValueError, match="at least"):
        build_tokenizer(TEXTS, vocab_size=300)


def test_training_texts_are_compressed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2.5
