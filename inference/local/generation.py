"""Batched generation: prompts, per-row sampling, streaming and cancellation for jobs on one loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from inference.local.model_cache import LoadedModel
from inference.types import (
    SKILLS,
    Answer,
    AnswerEvent,
    Box,
    InferenceError,
    ModelSpec,
    Point,
    Request,
    TextUpdate,
    clean,
    recipe_prompt,
)

CONTROL_IDS = range(15)  # Moondream's end token and its markers of prompts and regions
MIN_NEW_TOKENS = 16  # a prompt that leaves less room is too long
TOKENS_PER_OBJECT = {"detect": 3, "point": 2}
UPDATES_PER_SECOND = 12
BATCH_KEYS = ("skill", "n", "temperature", "max_tokens", "max_objects")  # request fields that a batch has in common


@dataclass(eq=False)
class Job:
    """One request in the engine.

    Attributes:
        spec: The model.
        request: What to generate.
        is_cancelled: Whether the caller has cancelled.
        send: Receives events, then an exception on failure, then None at the end.
        queued_at: Arrival time, by `time.perf_counter()`.
        cold_start_seconds: Time in which the model was loaded for this job; None if it was in memory.
        claimed: Whether a thread computes the job or has computed it.
        batched: Whether the job shares its batch with others.
        remaining: Number of candidates without an answer.
    """

    spec: ModelSpec
    request: Request
    is_cancelled: Callable[[], bool]
    send: Callable[[AnswerEvent | Exception | None], None]
    queued_at: float
    cold_start_seconds: float | None = None
    claimed: bool = False
    batched: bool = False
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        self.remaining = self.request.n

    @property
    def finished(self) -> bool:
        """Whether all candidates are answered."""
        return self.remaining == 0

    def queue_seconds(self, start: float) -> float:
        """Return the time spent waiting until a start by `time.perf_counter()`, without that of a cold start."""
        return max(0.0, start - self.queued_at - (self.cold_start_seconds or 0.0))

    def emit(self, event: TextUpdate | Answer) -> None:
        """Send an event. The last answer of a batched job ends its stream while the rest of the batch continues."""
        self.remaining -= isinstance(event, Answer)
        self.send(event)
        if self.batched and self.finished:
            self.send(None)

    def can_batch_with(self, other: Job) -> bool:
        """Whether both jobs can share a batch: they differ only in photo, prompt, seed and stop texts."""
        a, b = self.request, other.request
        return (
            self.spec == other.spec
            and a.has_photo == b.has_photo
            and all(getattr(a, key) == getattr(b, key) for key in BATCH_KEYS)
        )


def answer(loaded: LoadedModel, jobs: Sequence[Job]) -> None:
    """Run one job, or several that can share a batch, and emit their events. The caller must have acquired the device.

    Each candidate i is sampled with its own generator, seeded with `seed + i`: equal requests give equal answers, and a
    candidate does not depend on the number of candidates (up to rounding of batched arithmetic). Regions, and texts at
    temperature 0, are deterministic: computed once and emitted for all candidates.

    A cancelled job is left unfinished.

    Raises:
        InferenceError: If a prompt is too long.
    """
    start = time.perf_counter()
    generate = _generate_regions if SKILLS[jobs[0].request.skill].output == "regions" else _generate_texts
    inputs = [prepare_inputs(loaded, job.request, job.spec) for job in jobs]
    if len(jobs) == 1:
        generate(loaded, jobs, inputs, start)
    elif not generate(loaded, jobs, inputs, start):
        for job, job_inputs in zip(jobs, inputs):
            generate(loaded, [job], [job_inputs], start)


def prepare_inputs(loaded: LoadedModel, request: Request, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the model inputs of a request on the model's device: one row of ids, its mask, and the photo's crops."""
    skill, prompt = request.skill, request.prompt
    if skill == "recipe":
        skill, prompt = "query", recipe_prompt(prompt) if spec.grammar_in_prompt else prompt
    photo = request.photo if request.has_photo else None
    inputs = loaded.processor.prepare(photo, skill, prompt, request.length)
    return {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}


def _remaining_context(loaded: LoadedModel, prompt_length: int, required: int) -> int:
    """Return the number of tokens that fit after the prompt. Raises InferenceError if fewer than `required`."""
    remaining = loaded.model.config.text_config.max_context - prompt_length
    if remaining < required:
        message = f"The prompt is {required - remaining} tokens too long for this model. Use fewer words."
        raise InferenceError("too_long", message)
    return remaining


def _collate(loaded: LoadedModel, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack inputs to one batch, padded at the left."""
    if len(inputs) == 1:
        return inputs[0]
    length = max(row["input_ids"].shape[1] for row in inputs)
    fill_values = {"input_ids": loaded.model.config.eos_id, "attention_mask": 0}
    batch = {}
    for name in inputs[0]:
        tensors = [row[name] for row in inputs]
        if name in fill_values:
            tensors = [pad(tensor, (length - tensor.shape[1], 0), value=fill_values[name]) for tensor in tensors]
        batch[name] = torch.cat(tensors)
    return batch


@dataclass(frozen=True)
class _Row:
    """A row of a batch: its job, the candidates that it answers, and the length of its prompt in tokens."""

    job: Job
    candidates: list[int]
    prompt_length: int


def _generate_texts(
    loaded: LoadedModel, jobs: Sequence[Job], inputs: Sequence[dict[str, torch.Tensor]], start: float
) -> bool:
    """Generate the texts of a batch. Returns False, without generating, if padding leaves a job too little room."""
    request, spec, config = jobs[0].request, jobs[0].spec, loaded.model.config
    batch = _collate(loaded, inputs)
    padded_length = batch["input_ids"].shape[1]
    constraint = loaded.constraint if request.skill == "recipe" and spec.grammar_constrained else None
    limit = constraint.max_tokens if constraint else request.max_tokens
    room = _remaining_context(loaded, padded_length, limit if constraint else min(MIN_NEW_TOKENS, limit))
    if len(jobs) > 1 and room < limit:
        return False
    temperature = request.temperature * spec.temperature
    candidates = [[index] for index in range(request.n)] if temperature else [list(range(request.n))]
    prompt_lengths = [row["attention_mask"].shape[1] for row in inputs]
    rows = [_Row(job, indices, length) for job, length in zip(jobs, prompt_lengths) for indices in candidates]
    processors: list[LogitsProcessor] = [constraint.processor(padded_length)] if constraint else []
    if temperature:
        processors.append(TemperatureLogitsWarper(temperature))
        if spec.top_p < 1:
            processors.append(TopPLogitsWarper(spec.top_p))
        processors.append(PerRowSampler([row.job.request.seed + row.candidates[0] for row in rows]))
    # PerRowSampler has sampled the token already, so `generate` must not apply temperature or top-p again. It requires
    # `do_sample` to return several rows.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature and len(rows) > 1:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    callback = StreamCallback(loaded, rows, start)
    loaded.model.generate(
        **batch,
        generation_config=GenerationConfig(
            **sampling,
            num_return_sequences=len(candidates),
            max_new_tokens=min(room, limit),
            eos_token_id=config.eos_id,
            pad_token_id=config.eos_id,
            bos_token_id=config.bos_id,
            suppress_tokens=[token for token in CONTROL_IDS if token != config.eos_id],
        ),
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([callback]),
    )
    callback.finish()
    return True


class PerRowSampler(LogitsProcessor):
    """Samples each row's token with its own generator and masks all others (`generate` supports one generator only).

    Sampling is by the Gumbel-max trick: the argmax of log-probabilities plus Gumbel noise is a sample.

    Args:
        seeds: One seed per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """Mask all but one sampled token per row."""
        samples = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        noise = -torch.stack(samples).clamp(min=torch.finfo(torch.float32).tiny).log()
        tokens = (scores.float() + noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class StreamCallback(StoppingCriteria):
    """Called after each token: emits text updates and answers, and stops when all rows have ended or are cancelled."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[_Row], start: float) -> None:
        self.loaded, self.rows, self.start = loaded, rows, start
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.active = set(range(len(rows)))
        self.first_token_seconds = 0.0
        self.last_update = -1.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        """Process the last token of each row. Returns True for all rows once none is active."""
        seconds = time.perf_counter() - self.start
        self.first_token_seconds = self.first_token_seconds or seconds
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row not in self.active:
                continue
            if token == self.loaded.model.config.eos_id:
                self.active.remove(row)
                self._emit_answer(row, seconds)
            else:
                self.tokens[row].append(token)
                if self.rows[row].job.request.stop and self._text(row)[1]:
                    self.active.remove(row)
                    self._emit_answer(row, seconds)
        if seconds - self.last_update >= 1 / UPDATES_PER_SECOND:
            self.last_update = seconds
            for row in sorted(self.active):
                for index in self.rows[row].candidates:
                    self.rows[row].job.emit(TextUpdate(index, self._text(row)[0]))
        self._drop_cancelled()
        return torch.full((len(input_ids),), not self.active, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Emit the answers that reached the token limit."""
        self._drop_cancelled()
        for row in sorted(self.active):
            self._emit_answer(row, time.perf_counter() - self.start, truncated=True)

    def _drop_cancelled(self) -> None:
        self.active = {row for row in self.active if not self.rows[row].job.is_cancelled()}

    def _emit_answer(self, row: int, seconds: float, truncated: bool = False) -> None:
        job = self.rows[row].job
        for index in self.rows[row].candidates:
            job.emit(
                Answer(
                    index=index,
                    text=self._text(row)[0],
                    tokens_in=self.rows[row].prompt_length,
                    tokens_out=len(self.tokens[row]),
                    seconds=seconds,
                    first_token_seconds=self.first_token_seconds,
                    queue_seconds=job.queue_seconds(self.start),
                    cold_start_seconds=job.cold_start_seconds,
                    truncated=truncated,
                )
            )

    def _text(self, row: int) -> tuple[str, bool]:
        """Decode a row without control tokens, control characters and an incomplete last character.

        Returns:
            The text up to the first stop text, and whether there was one.
        """
        tokens = [token for token in self.tokens[row] if token not in CONTROL_IDS]
        lines = self.loaded.processor.tokenizer.decode(tokens).rstrip("\ufffd").split("\n")
        return self.rows[row].job.request.cut_at_stop("\n".join(clean(line) for line in lines).strip())


def _generate_regions(
    loaded: LoadedModel, jobs: Sequence[Job], inputs: Sequence[dict[str, torch.Tensor]], start: float
) -> bool:
    """Generate the regions of a batch. Returns False, without generating, if padding leaves a job too little room."""
    skill, max_objects = jobs[0].request.skill, jobs[0].request.max_objects
    batch = _collate(loaded, inputs)
    tokens_per_object = TOKENS_PER_OBJECT[skill]
    room = _remaining_context(loaded, batch["input_ids"].shape[1], tokens_per_object + 1) // tokens_per_object
    if len(jobs) > 1 and room < max_objects:
        return False
    max_objects = min(max_objects, room)
    generate = loaded.model.detect if skill == "detect" else loaded.model.point
    results = generate(**batch, max_objects=max_objects, stop=lambda: all(job.is_cancelled() for job in jobs))
    seconds = time.perf_counter() - start
    for job, job_inputs, regions in zip(jobs, inputs, results):
        if job.is_cancelled():
            continue
        boxes = tuple(Box(**_clip(region)) for region in regions if skill == "detect")
        points = tuple(Point(**_clip(region)) for region in regions if skill == "point")
        result = Answer(
            index=0,
            text=_count(len(boxes), "box", "boxes") if skill == "detect" else _count(len(points), "point", "points"),
            boxes=boxes,
            points=points,
            tokens_in=job_inputs["input_ids"].shape[1],
            tokens_out=tokens_per_object * len(regions),
            seconds=seconds,
            first_token_seconds=seconds,
            queue_seconds=job.queue_seconds(start),
            cold_start_seconds=job.cold_start_seconds,
            truncated=len(regions) >= max_objects,
        )
        for index in range(job.request.n):
            job.emit(replace(result, index=index))
    return True


def _clip(region: dict[str, float]) -> dict[str, float]:
    """Clip coordinates to 0..1; the model's boxes may extend beyond the photo."""
    return {name: min(max(float(value), 0.0), 1.0) for name, value in region.items()}


def _count(number: int, singular: str, plural: str) -> str:
    return f"1 {singular}" if number == 1 else f"{number or 'no'} {plural}"
