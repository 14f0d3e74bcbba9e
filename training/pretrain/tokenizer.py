"""Tokenizer of moondream-tiny: byte-level BPE in which every alternative of the recipe grammar is one token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import recipes

END = "<|endoftext|>"
# Ids 0..14, the same as in Moondream's own tokenizer.
SPECIALS = (
    END,
    *(f"<|md_reserved_{k}|>" for k in range(4)),
    "<|coord|>",
    "<|size|>",
    "<|start_ground_points|>",
    "<|md_reserved_4|>",
    "<|end_ground|>",
    *(f"<|md_reserved_{k}|>" for k in range(5, 10)),
)
OPEN, SEPARATE, ANSWER = 1, 2, 3
TEMPLATE_WORDS = ("caption", "query", "detect", "point", "short", "normal", "long")
# Words, numbers, punctuation and spaces, each with the preceding space, as in GPT-2.
GPT2_SPLIT = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, grammar: Sequence[Sequence[str]] | None = None
) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Ids: 15 special tokens, the alternatives of the grammar in order of appearance, the template words, the 256 bytes,
    then the learned BPE tokens. A canonical recipe has one token per segment of the grammar, and decoding the encoding
    of any text returns the text.

    Args:
        texts: Training texts.
        vocab_size: Number of tokens in all.
        grammar: Segments of alternatives; `recipes.grammar_segments()` by default.

    Raises:
        ValueError: If the vocabulary is too small for the fixed tokens.
    """
    segments = recipes.grammar_segments() if grammar is None else grammar
    alternatives = list(dict.fromkeys(text for segment in segments for text in segment))
    fixed = [*SPECIALS, *dict.fromkeys([*(_as_bytes(text) for text in alternatives), *TEMPLATE_WORDS])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    remaining = vocab_size - len(fixed) - len(alphabet)
    if remaining < 0:
        raise ValueError(f"vocab_size must be at least {vocab_size - remaining} for this grammar, not {vocab_size}")
    merges = _learn_merges(texts, alternatives, alphabet, len(alphabet) + remaining)
    learned = [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*fixed, *alphabet, *learned]))}
    # ignore_merges: a piece that is a token is encoded as that token, whatever the merges would produce.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter((_pattern(alternatives) + "|" + GPT2_SPLIT, "isolated"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the prompt template ids per skill, in the layout of Moondream's `config.tokenizer.templates`."""
    word_ids = {name: _one_token(tokenizer, name) for name in TEMPLATE_WORDS}
    skills = {
        skill: {"prefix": [OPEN, word_ids[skill], SEPARATE], "suffix": [ANSWER]}
        for skill in ("query", "detect", "point")
    }
    lengths = {
        name: [OPEN, word_ids["caption"], SEPARATE, word_ids[name], ANSWER] for name in ("short", "normal", "long")
    }
    return {"caption": lengths, **skills}


def _pattern(alternatives: Sequence[str]) -> str:
    """Match a grammar alternative unless a letter or digit follows it (" 10" in " 1000")."""
    longest_first = sorted(alternatives, key=len, reverse=True)
    return rf"(?:{'|'.join(re.escape(text) for text in longest_first)})(?![\p{{L}}\p{{N}}])"


def _splitter(*rules: tuple[str, str]) -> pre_tokenizers.PreTokenizer:
    """Build a pre-tokenizer that applies (regular expression, split behavior) rules, then maps bytes to letters."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior=behavior) for pattern, behavior in rules]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _learn_merges(
    texts: Iterable[str], alternatives: Sequence[str], alphabet: list[str], size: int
) -> list[tuple[str, str]]:
    """Learn the merges of plain words. The grammar's alternatives are tokens already and are left out."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _splitter((_pattern(alternatives), "removed"), (GPT2_SPLIT, "isolated"))
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def _as_bytes(text: str) -> str:
    """Return the text in the letters that byte-level BPE uses for bytes."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def _one_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the tokenizer must have one token for {text!r}, not {len(ids)}")
    return ids[0]
