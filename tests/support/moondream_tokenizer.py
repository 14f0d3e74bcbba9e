"""A small tokenizer with Moondream's control tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_TOKEN = "<|endoftext|>"
CONTROL_TOKENS = [END_TOKEN, *(f"<|md_reserved_{k}|>" for k in range(4)), *(f"<|other_{k}|>" for k in range(5, 15))]
TEMPLATE_WORDS = ["query", "caption", "detect", "point", "short", "normal", "long"]
TEXT = "Is it dark in the photo of the dog? " * 3


def build_tokenizer(special: bool = True) -> Tokenizer:
    """Train a byte-level tokenizer with the control tokens at ids 0..14.

    Args:
        special: Whether the control tokens are special tokens, or ordinary added tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=CONTROL_TOKENS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([*TEMPLATE_WORDS * 5, TEXT], trainer)
    if not special:
        text = tokenizer.to_str().replace('"special":true', '"special":false')
        return Tokenizer.from_str(text)
    return tokenizer


def as_fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN
    )
