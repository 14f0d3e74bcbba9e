"""RecipeConstraint: samples are valid recipes, and training sees the same distribution as sampling."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

import recipes
from inference.local.constraint import RecipeConstraint
from training.pretrain.tokenizer import build_tokenizer

Pair = tuple[Any, RecipeConstraint]  # a tokenizer, and the constraint compiled for it


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte: alternatives take several tokens and share prefixes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def words() -> Any:
    return build_tokenizer(["A bright photo with warm colours."] * 3, vocab_size=512)


@pytest.fixture(scope="module")
def one_token(words: Any) -> Pair:
    return words, RecipeConstraint(words, recipes.grammar_segments())


@pytest.fixture(scope="module")
def many_tokens() -> Pair:
    tokenizer = byte_tokenizer()
    return tokenizer, RecipeConstraint(tokenizer, recipes.grammar_segments(), end_id=0)


def sample(
    constraint: RecipeConstraint, logits: torch.Generator, rows: int, vocab_size: int, scale: float
) -> torch.Tensor:
    """Sample completions step by step from random logits under the constraint."""
    ids = torch.zeros(rows, 0, dtype=torch.long)
    for _ in range(constraint.max_tokens):
        scores = torch.randn(rows, vocab_size, generator=logits) * scale
        scores = scores.masked_fill(~constraint.next_mask(ids, vocab_size), -torch.inf)
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=logits)], 1)
    return ids


def written(tokenizer: Any, ids: torch.Tensor) -> str:
    ids = ids.tolist()
    assert 0 in ids, "the answer must have ended"
    assert not any(ids[ids.index(0) :]), "nothing but the end token may follow the end"
    return tokenizer.decode(ids[: ids.index(0)])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 30), many=st.booleans())
def test_constrained_samples_are_valid_recipes(
    one_token: Pair, many_tokens: Pair, seed: int, scale: float, many: bool
) -> None:
    tokenizer, constraint = many_tokens if many else one_token
    size = tokenizer.get_vocab_size() if many else len(tokenizer)
    for row in sample(constraint, torch.Generator().manual_seed(seed), 4, size, scale):
        text = written(tokenizer, row)
        parsed = recipes.parse(text)
        assert parsed.ok and not parsed.problems
        assert str(parsed.recipe) == text


def test_every_alternative_is_reachable(one_token: Pair) -> None:
    tokenizer, constraint = one_token
    ids = torch.zeros(1, 0, dtype=torch.long)
    for alternatives in recipes.grammar_segments():
        allowed = constraint.next_mask(ids, len(tokenizer))[0].nonzero().flatten().tolist()
        assert sorted(tokenizer.decode([i]) for i in allowed) == sorted(alternatives)
        ids = torch.cat([ids, torch.tensor([[allowed[0]]])], 1)
    assert constraint.next_mask(ids, len(tokenizer))[0].nonzero().flatten().tolist() == [0]


def test_automaton_accepts_exactly_the_language_with_shared_prefixes() -> None:
    tokenizer = byte_tokenizer()
    grammar = [["a", "ab", "abc"], ["b", "bc", "c"], ["x"]]
    constraint = RecipeConstraint(tokenizer, grammar, end_id=0)
    language = {"".join(choice) for choice in itertools.product(*grammar)}
    found, ends = set(), [torch.zeros(1, 0, dtype=torch.long)]
    while ends:
        ids = ends.pop()
        for token in constraint.next_mask(ids, 257)[0].nonzero().flatten().tolist():
            if token == 0:
                found.add(tokenizer.decode(ids[0].tolist()))
            else:
                ends.append(torch.cat([ids, torch.tensor([[token]])], 1))
    assert found == language


def test_mask_matches_next_mask_and_logits_stay_finite(one_token: Pair) -> None:
    tokenizer, constraint = one_token
    ids = sample(constraint, torch.Generator().manual_seed(1), 3, len(tokenizer), 1.0)
    mask = constraint.mask(ids, len(tokenizer))
    for place in range(ids.shape[1]):
        assert torch.equal(mask[:, place], constraint.next_mask(ids[:, :place], len(tokenizer)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = constraint.apply(torch.randn(*mask.shape).to(dtype), ids)
        logp = logits.float().log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        assert torch.isfinite(logits).all() and torch.isfinite(entropy).all()
        assert logp.gather(-1, ids[..., None]).min() > -1e3
        assert logp.exp()[~mask].max() == 0


def test_text_outside_the_language_can_only_end(one_token: Pair) -> None:
    tokenizer, constraint = one_token
    stray = torch.tensor([tokenizer.encode("A bright photo")])
    assert constraint.next_mask(stray, len(tokenizer))[0].nonzero().flatten().tolist() == [0]
    assert not constraint.mask(stray, len(tokenizer))[0, 0, stray[0, 0]]


def test_ids_beyond_the_vocabulary_are_never_allowed(one_token: Pair) -> None:
    tokenizer, constraint = one_token
    ids = torch.full((1, 2), 10**6)
    assert constraint.mask(ids, len(tokenizer) + 100)[..., len(tokenizer) :].sum() == 0


def test_tokenizer_that_cannot_encode_the_grammar_raises(words: Any) -> None:
    class Shouting:
        eos_token_id = 0

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return words.encode(text.upper())

        decode = staticmethod(words.decode)

    with pytest.raises(ValueError, match="cannot encode"):
        RecipeConstraint(Shouting(), recipes.grammar_segments())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generate_and_training_pass_see_the_same_distribution(one_token: Pair, temperature: float) -> None:
    """Importance ratios of a left-padded batch are 1 with the constraint, but not without it."""
    tokenizer, constraint = one_token
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    prompts = torch.randint(15, len(tokenizer), (4, 6))
    attention = torch.ones_like(prompts)
    attention[0, :3] = attention[2, :1] = 0
    out = model.generate(
        prompts,
        attention_mask=attention,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=constraint.max_tokens,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([constraint.processor(prompts.shape[1])]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    completion = out.sequences[:, prompts.shape[1] :]
    assert all(recipes.parse(written(tokenizer, row)).ok for row in completion)
    sampled = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    mask = torch.cat([attention, torch.ones_like(completion)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=mask, position_ids=places).logits[:, prompts.shape[1] - 1 : -1]

    def ratios(seen: torch.Tensor) -> torch.Tensor:
        return ((seen / temperature).log_softmax(-1).gather(-1, completion[..., None])[..., 0] - sampled).exp()

    seen_by_the_trainer = ratios(constraint.apply(logits, completion))
    torch.testing.assert_close(seen_by_the_trainer, torch.ones_like(sampled), atol=1e-4, rtol=0)
    assert ratios(logits).min() < 0.5
