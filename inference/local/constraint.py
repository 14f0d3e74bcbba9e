"""RecipeConstraint: grammar-constrained decoding for generation and training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

Position = tuple[int, tuple[int, ...]]
"""(segment, its tokens written so far)."""


class RecipeConstraint:
    """A finite automaton over token ids, compiled from a grammar.

    After the last segment, after an end token and after a token outside the language, only the end token is allowed.

    Args:
        tokenizer: Any object with the `encode` and `decode` of a `tokenizers` or `transformers` tokenizer.
        grammar: Segments, each a list of alternatives, as returned by `recipes.grammar_segments()`. A text of the
            language is the concatenation of one alternative per segment. An alternative may take several tokens.
        end_id: The end token. Default: the tokenizer's `eos_token_id`.

    Attributes:
        end_id: The end token.
        max_tokens: Maximum length of a text in tokens, including the end token.

    Raises:
        ValueError: If the tokenizer cannot encode an alternative.
    """

    def __init__(self, tokenizer: Any, grammar: Sequence[Sequence[str]], end_id: int | None = None) -> None:
        self.end_id = int(tokenizer.eos_token_id if end_id is None else end_id)
        self._grammar = [{text: _encode(tokenizer, text) for text in alternatives} for alternatives in grammar]
        segments = [list(alternatives.values()) for alternatives in self._grammar]
        self.max_tokens = sum(max(map(len, segment)) for segment in segments) + 1
        transitions, final_states = _build_automaton(segments)
        tokens = sorted({token for edges in transitions for token in edges} | {self.end_id})
        column = {token: index for index, token in enumerate(tokens)}
        ended = len(transitions)  # state after the end token or after a token outside the language
        self._tokens = torch.tensor(tokens)
        # _next[state, column] -> state. The last column stands for all tokens that the grammar does not contain.
        self._next = torch.full((ended + 1, len(tokens) + 1), ended)
        for state, edges in enumerate(transitions):
            for token, target in edges.items():
                self._next[state, column[token]] = target
        self._allowed = self._next[:, :-1] != ended  # [states, tokens]
        self._allowed[[*final_states, ended], column[self.end_id]] = True

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text of the language, with the end token.

        Raises:
            ValueError: If the text is not in the language.
        """
        tokens: list[int] = []
        rest = text
        for alternatives in self._grammar:
            match = max((choice for choice in alternatives if rest.startswith(choice)), key=len, default=None)
            if match is None:
                raise ValueError(f"The grammar does not contain {text!r}.")
            tokens += alternatives[match]
            rest = rest.removeprefix(match)
        if rest:
            raise ValueError(f"The grammar does not contain {text!r}.")
        return [*tokens, self.end_id]

    def mask(self, completion_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return the tokens allowed at each position of completions, given the tokens before it.

        Args:
            completion_ids: [B, T].
            vocab_size: V, the size of the logits.

        Returns:
            bool [B, T, V].
        """
        return self._masks(self._states(completion_ids)[:, :-1], vocab_size)

    def next_mask(self, completion_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return the tokens allowed after completions [B, T], T >= 0, as bool [B, vocab_size]."""
        return self._masks(self._states(completion_ids)[:, -1], vocab_size)

    def apply(self, logits: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """Set the logits of forbidden tokens to a very low value, so that log-probabilities match those of sampling.

        The value is finite, which keeps entropies finite.

        Args:
            logits: [B, T, V].
            completion_ids: [B, T].

        Returns:
            Logits [B, T, V].
        """
        low = max(-1e9, torch.finfo(logits.dtype).min / 2)
        return logits.masked_fill(~self.mask(completion_ids, logits.shape[-1]), low)

    def processor(self, prompt_length: int) -> LogitsProcessor:
        """Return a logits processor for `generate`. `prompt_length` is the number of prompt columns, with padding."""
        return _ConstraintLogitsProcessor(self, prompt_length)

    def _states(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Return the states [B, T + 1] before each token and after the last."""
        device = completion_ids.device
        table, tokens = self._next.to(device), self._tokens.to(device)
        columns = torch.searchsorted(tokens, completion_ids.contiguous()).clamp_(max=len(tokens) - 1)
        columns = torch.where(tokens[columns] == completion_ids, columns, len(tokens))
        states = [torch.zeros(len(completion_ids), dtype=torch.long, device=device)]
        for column in columns.unbind(1):
            states.append(table[states[-1], column])
        return torch.stack(states, 1)

    def _masks(self, states: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return the masks [..., vocab_size] of states [...]."""
        mask = torch.zeros(*states.shape, vocab_size, dtype=torch.bool, device=states.device)
        mask[..., self._tokens.to(states.device)] = self._allowed.to(states.device)[states]
        return mask


class _ConstraintLogitsProcessor(LogitsProcessor):
    def __init__(self, constraint: RecipeConstraint, prompt_length: int) -> None:
        self.constraint = constraint
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        allowed = self.constraint.next_mask(input_ids[:, self.prompt_length :], scores.shape[-1])
        return scores.masked_fill(~allowed, -torch.inf)


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = tuple(getattr(encoding, "ids", encoding))
    if not ids or tokenizer.decode(list(ids)) != text:
        raise ValueError(f"The tokenizer cannot encode {text!r}.")
    return ids


def _build_automaton(segments: Sequence[Sequence[tuple[int, ...]]]) -> tuple[list[dict[int, int]], list[int]]:
    """Build the deterministic automaton of a sequence of choices by subset construction.

    Returns:
        The transitions (token -> state, per state; state 0 is the start) and the final states.
    """
    start = _close(segments, {(0, ())})
    state_ids = {start: 0}
    transitions: list[dict[int, int]] = []
    pending = [start]
    for positions in pending:  # grows during iteration
        successors: dict[int, set[Position]] = {}
        for segment, prefix in positions:
            for choice in segments[segment] if segment < len(segments) else ():
                if len(choice) > len(prefix) and choice[: len(prefix)] == prefix:
                    successors.setdefault(choice[len(prefix)], set()).add((segment, choice[: len(prefix) + 1]))
        targets = {token: _close(segments, reached) for token, reached in successors.items()}
        for target in targets.values():
            if target not in state_ids:
                state_ids[target] = len(state_ids)
                pending.append(target)
        transitions.append({token: state_ids[target] for token, target in targets.items()})
    final_states = [state for positions, state in state_ids.items() if (len(segments), ()) in positions]
    return transitions, final_states


def _close(segments: Sequence[Sequence[tuple[int, ...]]], positions: set[Position]) -> frozenset[Position]:
    """Add the start of the next segment to each complete choice; drop prefixes that no choice continues."""
    closed: set[Position] = set()
    for segment, prefix in positions:
        choices = segments[segment]
        if prefix in choices:
            closed.add((segment + 1, ()))
        if any(len(choice) > len(prefix) and choice[: len(prefix)] == prefix for choice in choices):
            closed.add((segment, prefix))
    return frozenset(closed)
