"""The tokenizer of the embedded model: byte-level BPE in which every value of the recipe grammar is one token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import recipes

END = "<|endoftext|>"
# Ids 0..14, at the places where Moondream's own tokenizer has them.
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
# Words, numbers, punctuation and spaces, each with the space before it (as GPT-2 splits them).
PLAIN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, grammar: Sequence[Sequence[str]] | None = None
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on the texts the model is to read and write.

    Ids: 15 specials, the alternatives of the grammar (default: `recipes.grammar_segments()`) in order of appearance, the
    template words, the 256 bytes, then what BPE learns, up to `vocab_size` in all. A canonical recipe has one token
    per segment of the grammar; any text comes back unchanged from encode and decode.
    Raises ValueError when the vocabulary is too small for the fixed part.
    """
    alternatives = _alternatives(recipes.grammar_segments() if grammar is None else grammar)
    fixed = [*SPECIALS, *dict.fromkeys([*(_as_bytes(text) for text in alternatives), *TEMPLATE_WORDS])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(fixed) - len(alphabet)
    if room < 0:
        raise ValueError(f"vocab_size must be at least {vocab_size - room} for this grammar, not {vocab_size}")
    merges = _learn_merges(texts, alternatives, alphabet, len(alphabet) + room)
    learned = [left + right for left, right in merges]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys([*fixed, *alphabet, *learned]))}
    # ignore_merges: a piece that is a token as a whole is that token, however BPE would have built it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter((_pattern(alternatives) + "|" + PLAIN, "isolated"))
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
    """The ids around the user's words, per skill, in the layout of Moondream's `config.tokenizer.templates`."""
    word = {name: _one_token(tokenizer, name) for name in TEMPLATE_WORDS}
    around = {
        skill: {"prefix": [OPEN, word[skill], SEPARATE], "suffix": [ANSWER]} for skill in ("query", "detect", "point")
    }
    lengths = {name: [OPEN, word["caption"], SEPARATE, word[name], ANSWER] for name in ("short", "normal", "long")}
    return {"caption": lengths, **around}


def _alternatives(grammar: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(text for segment in grammar for text in segment))


def _pattern(alternatives: Sequence[str]) -> str:
    """A grammar alternative is a piece of its own unless a letter or digit goes on after it (" 10" in " 1000")."""
    longest_first = sorted(alternatives, key=len, reverse=True)
    return rf"(?:{'|'.join(re.escape(text) for text in longest_first)})(?![\p{{L}}\p{{N}}])"


def _splitter(*rules: tuple[str, str]) -> pre_tokenizers.PreTokenizer:
    """Splits by each (regular expression, what becomes of its matches), and writes bytes as letters."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior=behavior) for pattern, behavior in rules]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _learn_merges(
    texts: Iterable[str], alternatives: Sequence[str], alphabet: list[str], size: int
) -> list[tuple[str, str]]:
    """The merges of plain words; the grammar's pieces are tokens already and are left out."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splitter((_pattern(alternatives), "removed"), (PLAIN, "isolated"))
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _as_bytes(text: str) -> str:
    """The text in the letters that byte-level BPE writes bytes with."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def _one_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the tokenizer must have one token for {text!r}, and has {len(ids)}")
    return ids[0]
