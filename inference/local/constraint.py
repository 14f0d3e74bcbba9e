"""RecipeConstraint: keeps what a model writes inside a grammar, the same way for generating and for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

Position = tuple[int, tuple[int, ...]]
"""(segment, the tokens of it that are written)."""


class RecipeConstraint:
    """A finite automaton over token ids, compiled from a grammar.

    grammar: segments, each a list of alternatives, as `recipes.grammar()` gives it; "".join of one choice per segment
    is a text of the language. An alternative may be one token or several. After the last segment only the end token
    is allowed, and after an end token nothing but more of them.
    tokenizer: anything with `encode` and `decode` in the manner of `tokenizers` or `transformers`.
    end_id: the end token; by default the tokenizer's `eos_token_id`.
    Raises ValueError when the tokenizer cannot write an alternative.

    A token outside the language leads to a state where only the end is allowed: `mask` gives such a token no
    probability, and a text that broke the rules earlier ends at once.
    """

    def __init__(self, tokenizer: Any, grammar: Sequence[Sequence[str]], end_id: int | None = None) -> None:
        self.end_id = int(tokenizer.eos_token_id if end_id is None else end_id)
        segments = [[_encode(tokenizer, text) for text in alternatives] for alternatives in grammar]
        self.max_tokens = sum(max(map(len, segment)) for segment in segments) + 1  # with the end token
        edges, final = _automaton(segments)
        tokens = sorted({token for ways in edges for token in ways} | {self.end_id})
        column = {token: place for place, token in enumerate(tokens)}
        ended = len(edges)  # one more state: the text has ended, or has left the language
        self._tokens = torch.tensor(tokens)
        # _next[state, column] -> state; the last column stands for all the tokens that the grammar does not have.
        self._next = torch.full((ended + 1, len(tokens) + 1), ended)
        for state, ways in enumerate(edges):
            for token, target in ways.items():
                self._next[state, column[token]] = target
        self._allowed = self._next[:, :-1] != ended  # [states, tokens of the grammar]
        self._allowed[[*final, ended], column[self.end_id]] = True

    def mask(self, completion_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """bool [B, T, vocab_size]: the tokens allowed at each place of completions [B, T], given those before it."""
        states = self._states(completion_ids)[:, :-1]
        return self._spread(states, vocab_size)

    def apply(self, logits: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the completions [B, T] with the forbidden tokens at a very low, finite value.

        For a trainer: log-probabilities of the result are those that were sampled from. Finite, so that an entropy
        (probability times log-probability) stays a number.
        """
        low = max(-1e9, torch.finfo(logits.dtype).min / 2)
        return logits.masked_fill(~self.mask(completion_ids, logits.shape[-1]), low)

    def processor(self, prompt_length: int) -> LogitsProcessor:
        """For `generate(logits_processor=[...])`; prompt_length: columns of input_ids before the answer, with pads."""
        return _Processor(self, prompt_length)

    def next_mask(self, completion_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """bool [B, vocab_size]: the tokens allowed after completions [B, T]; T may be 0."""
        return self._spread(self._states(completion_ids)[:, -1], vocab_size)

    def _states(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """The automaton's states [B, T + 1] before each token and after the last."""
        device = completion_ids.device
        table, tokens = self._next.to(device), self._tokens.to(device)
        columns = torch.searchsorted(tokens, completion_ids.contiguous()).clamp_(max=len(tokens) - 1)
        columns = torch.where(tokens[columns] == completion_ids, columns, len(tokens))
        states = [torch.zeros(len(completion_ids), dtype=torch.long, device=device)]
        for column in columns.unbind(1):
            states.append(table[states[-1], column])
        return torch.stack(states, 1)

    def _spread(self, states: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """The masks [..., vocab_size] of states [...]."""
        mask = torch.zeros(*states.shape, vocab_size, dtype=torch.bool, device=states.device)
        mask[..., self._tokens.to(states.device)] = self._allowed.to(states.device)[states]
        return mask


class _Processor(LogitsProcessor):
    def __init__(self, constraint: RecipeConstraint, prompt_length: int) -> None:
        self.constraint = constraint
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        allowed = self.constraint.next_mask(input_ids[:, self.prompt_length :], scores.shape[-1])
        return scores.masked_fill(~allowed, -torch.inf)


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    ids = tuple(getattr(encoded, "ids", encoded))
    if not ids or tokenizer.decode(list(ids)) != text:
        raise ValueError(f"this tokenizer cannot write {text!r}")
    return ids


def _automaton(segments: Sequence[Sequence[tuple[int, ...]]]) -> tuple[list[dict[int, int]], list[int]]:
    """The deterministic automaton of a sequence of choices, by subset construction.

    Returns the edges (per state: token -> state; state 0 is the start) and the states where the text is complete.
    """
    start = _close(segments, {(0, ())})
    numbers = {start: 0}
    edges: list[dict[int, int]] = []
    todo = [start]
    for positions in todo:  # grows while it is walked
        reached: dict[int, set[Position]] = {}
        for segment, written in positions:
            for choice in segments[segment] if segment < len(segments) else ():
                if len(choice) > len(written) and choice[: len(written)] == written:
                    reached.setdefault(choice[len(written)], set()).add((segment, choice[: len(written) + 1]))
        targets = {token: _close(segments, found) for token, found in reached.items()}
        for target in targets.values():
            if target not in numbers:
                numbers[target] = len(numbers)
                todo.append(target)
        edges.append({token: numbers[target] for token, target in targets.items()})
    complete = [number for positions, number in numbers.items() if (len(segments), ()) in positions]
    return edges, complete


def _close(segments: Sequence[Sequence[tuple[int, ...]]], positions: set[Position]) -> frozenset[Position]:
    """A finished choice is also the start of the next segment; one that no choice goes on from is nothing else."""
    closed: set[Position] = set()
    for segment, written in positions:
        choices = segments[segment]
        if written in choices:
            closed.add((segment + 1, ()))
        if any(len(choice) > len(written) and choice[: len(written)] == written for choice in choices):
            closed.add((segment, written))
    return frozenset(closed)
