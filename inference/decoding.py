"""From a request to answers, token by token: prompts, drawing candidates, streaming and stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from inference.answers import (
    SKILLS,
    Answer,
    Box,
    Event,
    InferenceError,
    Partial,
    Point,
    Request,
    clean,
    recipe_prompt,
)
from inference.loading import Loaded
from inference.models import ModelEntry
from inference.turns import Stopped

CONTROL_IDS = range(15)  # Moondream's end token and its marks around words and regions
MAX_NEW_TOKENS = 768
MIN_NEW_TOKENS = 16  # less room than this for an answer is none
MAX_OBJECTS = 50
STEPS_PER_OBJECT = {"detect": 3, "point": 2}
PARTIALS_PER_SECOND = 12


@dataclass
class Job:
    """One request on its way: whether it is still wanted, where its events go and when (by perf_counter) it came."""

    entry: ModelEntry
    request: Request
    stopped: Callable[[], bool]
    emit: Callable[[Event | Exception | None], None]
    arrived: float


def answer(loaded: Loaded, job: Job) -> None:
    """Emits the Partial and Answer events of a job; the caller holds the device. Raises InferenceError or Stopped.

    Candidate i is drawn with a generator of its own, seeded with seed + i: the same request gives the same answers,
    and a candidate does not depend on how many others there are (up to the rounding of batched arithmetic).
    At temperature 0 all candidates are the same, and so are boxes and points at any temperature, since a model's best
    guess is wanted there: one is computed and told n times.
    """
    started = time.perf_counter()
    if SKILLS[job.request.skill].output == "regions":
        _regions(loaded, job, started)
    else:
        _texts(loaded, job, started)


def ask(loaded: Loaded, request: Request, entry: ModelEntry) -> dict[str, torch.Tensor]:
    """The model's inputs for a request, on its device: one row of ids with its mask, and the photo's crops."""
    skill, words = request.skill, request.prompt
    if skill == "recipe":
        skill, words = "query", recipe_prompt(words) if entry.explained else words
    inputs = loaded.processor.prepare(request.photo, skill, words, request.length)
    return {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}


def _room(loaded: Loaded, prompt: int, least: int) -> int:
    """How many tokens fit behind a prompt of that many. Raises InferenceError when that is less than `least`."""
    room = loaded.model.config.text_config.max_context - prompt
    if room < least:
        raise InferenceError(
            "too_long", f"The prompt is too long for this model by {least - room} tokens. Use fewer words."
        )
    return room


def _texts(loaded: Loaded, job: Job, started: float) -> None:
    request, entry = job.request, job.entry
    inputs = ask(loaded, request, entry)
    prompt = inputs["input_ids"].shape[1]
    constraint = loaded.constraint if request.skill == "recipe" and entry.constrained else None
    least = constraint.max_tokens if constraint else MIN_NEW_TOKENS
    room = min(_room(loaded, prompt, least), constraint.max_tokens if constraint else MAX_NEW_TOKENS)
    temperature = request.temperature * entry.temperature
    rows = [[i] for i in range(request.n)] if temperature else [list(range(request.n))]
    processors = [constraint.processor(prompt)] if constraint else []
    if temperature:
        processors += _drawing(temperature, entry.top_p, [request.seed + i for i in range(request.n)])
    watcher = _Watcher(loaded, job, rows, prompt, started)
    loaded.model.generate(
        **inputs,
        generation_config=_generation(loaded, len(rows), room),
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([watcher]),
    )
    watcher.finish()


def _generation(loaded: Loaded, rows: int, new_tokens: int) -> GenerationConfig:
    """Takes whatever the processors leave, without warping of its own; never a control token but the end.

    Several rows need `do_sample`, which then has nothing left to choose: the processors leave one token per row.
    """
    config = loaded.model.config
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if rows > 1 else {"do_sample": False}
    return GenerationConfig(
        **plain,
        num_return_sequences=rows,
        max_new_tokens=new_tokens,
        eos_token_id=config.eos_id,
        pad_token_id=config.eos_id,
        bos_token_id=config.bos_id,
        suppress_tokens=[i for i in CONTROL_IDS if i != config.eos_id],
    )


def _drawing(temperature: float, top_p: float, seeds: Sequence[int]) -> list[LogitsProcessor]:
    cut = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return [TemperatureLogitsWarper(temperature), *cut, _Draw(seeds)]


class _Draw(LogitsProcessor):
    """Draws each row's token with the row's own generator and forbids all others (`generate` knows but one generator).

    The likeliest token after adding Gumbel noise to the log-probabilities is a sample of them.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        waits = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        noise = -torch.stack(waits).clamp(min=torch.finfo(torch.float32).tiny).log()
        drawn = (scores.float() + noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class _Watcher(StoppingCriteria):
    """Sees every token: tells the texts so far, tells an answer when its row has ended, stops when nobody listens.

    rows: for each row of the batch the candidates that it stands for.
    """

    def __init__(self, loaded: Loaded, job: Job, rows: list[list[int]], prompt_length: int, started: float) -> None:
        self.loaded, self.job, self.rows = loaded, job, rows
        self.prompt_length, self.started = prompt_length, started
        self.ids: list[list[int]] = [[] for _ in rows]
        self.open = set(range(len(rows)))
        self.first = 0.0
        self.told = -1.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        now = time.perf_counter() - self.started
        self.first = self.first or now
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row in self.open:
                self._take(row, token, now)
        if now - self.told >= 1 / PARTIALS_PER_SECOND:
            self.told = now
            self._tell()
        stop = not self.open or self.job.stopped()
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Tells the answers that were cut off by the limit of tokens. Raises Stopped when that was not the reason."""
        if self.open and self.job.stopped():
            raise Stopped
        for row in sorted(self.open):
            self._answer(row, time.perf_counter() - self.started)

    def _take(self, row: int, token: int, now: float) -> None:
        if token == self.loaded.model.config.eos_id:
            self.open.remove(row)
            self._answer(row, now)
        else:
            self.ids[row].append(token)

    def _tell(self) -> None:
        for row in sorted(self.open):
            for index in self.rows[row]:
                self.job.emit(Partial(index, self._text(row)))

    def _answer(self, row: int, seconds: float) -> None:
        for index in self.rows[row]:
            self.job.emit(
                Answer(
                    index=index,
                    text=self._text(row),
                    tokens_in=self.prompt_length,
                    tokens_out=len(self.ids[row]),
                    seconds=seconds,
                    first_token_seconds=self.first,
                    queue_seconds=self.started - self.job.arrived,
                )
            )

    def _text(self, row: int) -> str:
        """The row's text, without control tokens and characters, and without a letter that is only half there."""
        ids = [token for token in self.ids[row] if token not in CONTROL_IDS]
        lines = self.loaded.processor.tokenizer.decode(ids).rstrip("\ufffd").split("\n")
        return "\n".join(clean(line) for line in lines).strip()


def _regions(loaded: Loaded, job: Job, started: float) -> None:
    request, skill = job.request, job.request.skill
    inputs = ask(loaded, request, job.entry)
    prompt = inputs["input_ids"].shape[1]
    steps = STEPS_PER_OBJECT[skill]
    objects = min(MAX_OBJECTS, _room(loaded, prompt, steps + 1) // steps)
    find = loaded.model.detect if skill == "detect" else loaded.model.point
    found = find(**inputs, max_objects=objects, stop=job.stopped)[0]
    if job.stopped():
        raise Stopped
    seconds = time.perf_counter() - started
    boxes = tuple(Box(**_clipped(region)) for region in found if skill == "detect")
    points = tuple(Point(**_clipped(region)) for region in found if skill == "point")
    first = Answer(
        index=0,
        text=_count(len(boxes), "box", "boxes") if skill == "detect" else _count(len(points), "point", "points"),
        boxes=boxes,
        points=points,
        tokens_in=prompt,
        tokens_out=steps * len(found),
        seconds=seconds,
        first_token_seconds=seconds,
        queue_seconds=started - job.arrived,
    )
    for index in range(request.n):
        job.emit(replace(first, index=index))


def _clipped(region: dict[str, float]) -> dict[str, float]:
    """A box may reach beyond the photo, as the model gives it; what is shown does not."""
    return {name: min(max(float(value), 0.0), 1.0) for name, value in region.items()}


def _count(number: int, one: str, many: str) -> str:
    return f"1 {one}" if number == 1 else f"{number or 'no'} {many}"
