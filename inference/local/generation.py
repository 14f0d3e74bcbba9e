"""From a request to answers, token by token: prompts, drawing candidates, streaming and stopping."""

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
from inference.registry import ModelSpec
from inference.types import (
    SKILLS,
    Answer,
    Box,
    Event,
    InferenceError,
    Point,
    Request,
    TextUpdate,
    clean,
    recipe_prompt,
)

CONTROL_IDS = range(15)  # Moondream's end token and its marks around words and regions
MIN_NEW_TOKENS = 16  # less room than this for an answer is none
STEPS_PER_OBJECT = {"detect": 3, "point": 2}
PARTIALS_PER_SECOND = 12


@dataclass(eq=False)
class Job:
    """One request on its way: whether it is still wanted, where its events go and when (by perf_counter) it came.

    taken: it is being computed, or was; shared: in a batch with others. left: so many answers are to come.
    """

    entry: ModelSpec
    request: Request
    stopped: Callable[[], bool]
    emit: Callable[[Event | Exception | None], None]
    arrived: float
    taken: bool = False
    shared: bool = False
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.request.n

    @property
    def over(self) -> bool:
        """Whether every candidate was answered."""
        return self.left == 0

    def tell(self, event: TextUpdate | Answer) -> None:
        """Emits something of an answer; one of a batch ends with its last answer, whatever the others still do."""
        self.left -= isinstance(event, Answer)
        self.emit(event)
        if self.shared and self.over:
            self.emit(None)

    def goes_with(self, other: Job) -> bool:
        """Whether both can be computed in one batch: single answers that differ in photo, words and seed alone."""
        one, two = self.request, other.request
        same = ("skill", "n", "temperature", "max_tokens", "max_objects")
        return self.entry == other.entry and one.n == 1 and all(getattr(one, x) == getattr(two, x) for x in same)


def answer(loaded: LoadedModel, jobs: Sequence[Job]) -> None:
    """Emits the Partial and Answer events of one job, or of several that go with each other, in one batch.

    The caller holds the device. A job that is not wanted any more is not over at the end. Raises InferenceError.

    Candidate i is drawn with a generator of its own, seeded with seed + i: the same request gives the same answers,
    and a candidate does not depend on how many others there are (up to the rounding of batched arithmetic).
    At temperature 0 all candidates are the same, and so are boxes and points at any temperature, since a model's best
    guess is wanted there: one is computed and told n times.
    """
    started = time.perf_counter()
    work = _regions if SKILLS[jobs[0].request.skill].output == "regions" else _texts
    asked = [ask(loaded, job.request, job.entry) for job in jobs]
    if len(jobs) > 1 and not work(loaded, jobs, asked, started):
        for job, inputs in zip(jobs, asked):
            work(loaded, [job], [inputs], started)
    elif len(jobs) == 1:
        work(loaded, jobs, asked, started)


def ask(loaded: LoadedModel, request: Request, entry: ModelSpec) -> dict[str, torch.Tensor]:
    """The model's inputs for a request, on its device: one row of ids with its mask, and the photo's crops."""
    skill, words = request.skill, request.prompt
    if skill == "recipe":
        skill, words = "query", recipe_prompt(words) if entry.grammar_in_prompt else words
    inputs = loaded.processor.prepare(request.photo, skill, words, request.length)
    return {name: tensor.to(loaded.model.device) for name, tensor in inputs.items()}


def _room(loaded: LoadedModel, prompt: int, least: int) -> int:
    """How many tokens fit behind a prompt of that many. Raises InferenceError when that is less than `least`."""
    room = loaded.model.config.text_config.max_context - prompt
    if room < least:
        raise InferenceError(
            "too_long", f"The prompt is too long for this model by {least - room} tokens. Use fewer words."
        )
    return room


def _together(loaded: LoadedModel, asked: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Several inputs as the rows of one batch, padded at the left."""
    longest = max(inputs["input_ids"].shape[1] for inputs in asked)
    fills = {"input_ids": loaded.model.config.eos_id, "attention_mask": 0}

    def rows(name: str) -> torch.Tensor:
        if name not in fills:
            return torch.cat([inputs[name] for inputs in asked])
        padded = [pad(inputs[name], (longest - inputs[name].shape[1], 0), value=fills[name]) for inputs in asked]
        return torch.cat(padded)

    return asked[0] if len(asked) == 1 else {name: rows(name) for name in asked[0]}


@dataclass(frozen=True)
class _Row:
    """A row of a batch: whose it is, the candidates that it stands for, and the tokens of its prompt."""

    job: Job
    places: list[int]
    prompt: int


def _texts(loaded: LoadedModel, jobs: Sequence[Job], asked: Sequence[dict[str, torch.Tensor]], started: float) -> bool:
    """False, and nothing done, where a batch's padding would leave one of them less room than it has alone."""
    request, entry = jobs[0].request, jobs[0].entry
    inputs = _together(loaded, asked)
    prompt = inputs["input_ids"].shape[1]
    constraint = loaded.constraint if request.skill == "recipe" and entry.grammar_constrained else None
    limit = constraint.max_tokens if constraint else request.max_tokens
    room = _room(loaded, prompt, constraint.max_tokens if constraint else min(MIN_NEW_TOKENS, limit))
    if len(jobs) > 1 and room < limit:
        return False
    temperature = request.temperature * entry.temperature
    prompts = [inputs["attention_mask"].shape[1] for inputs in asked]
    places = [[i] for i in range(request.n)] if temperature else [list(range(request.n))]
    rows = [_Row(job, stands_for, prompt) for job, prompt in zip(jobs, prompts) for stands_for in places]
    processors = [constraint.processor(prompt)] if constraint else []
    if temperature:
        processors += _drawing(temperature, entry.top_p, [row.job.request.seed + row.places[0] for row in rows])
    watcher = _Watcher(loaded, rows, started)
    loaded.model.generate(
        **inputs,
        generation_config=_generation(loaded, len(places), bool(temperature) and len(rows) > 1, min(room, limit)),
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([watcher]),
    )
    watcher.finish()
    return True


def _generation(loaded: LoadedModel, each: int, sample: bool, new_tokens: int) -> GenerationConfig:
    """Takes whatever the processors leave, without warping of its own; never a control token but the end.

    Several rows need `do_sample`, which then has nothing left to choose: the processors leave one token per row.
    """
    config = loaded.model.config
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    return GenerationConfig(
        **plain,
        num_return_sequences=each,
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
    """Sees every token: tells the texts so far, tells an answer when its row has ended, stops when nobody listens."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[_Row], started: float) -> None:
        self.loaded, self.rows, self.started = loaded, rows, started
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
        self._forget_stopped()
        return torch.full((len(input_ids),), not self.open, dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Tells the answers that were cut off by the limit of tokens."""
        self._forget_stopped()
        for row in sorted(self.open):
            self._answer(row, time.perf_counter() - self.started, cut=True)

    def _forget_stopped(self) -> None:
        self.open = {row for row in self.open if not self.rows[row].job.stopped()}

    def _take(self, row: int, token: int, now: float) -> None:
        if token == self.loaded.model.config.eos_id:
            self.open.remove(row)
            self._answer(row, now)
        else:
            self.ids[row].append(token)

    def _tell(self) -> None:
        for row in sorted(self.open):
            for index in self.rows[row].places:
                self.rows[row].job.tell(TextUpdate(index, self._text(row)))

    def _answer(self, row: int, seconds: float, cut: bool = False) -> None:
        mine = self.rows[row]
        for index in mine.places:
            mine.job.tell(
                Answer(
                    index=index,
                    text=self._text(row),
                    tokens_in=mine.prompt,
                    tokens_out=len(self.ids[row]),
                    seconds=seconds,
                    first_token_seconds=self.first,
                    queue_seconds=self.started - mine.job.arrived,
                    cut=cut,
                )
            )

    def _text(self, row: int) -> str:
        """The row's text, without control tokens and characters, and without a letter that is only half there."""
        ids = [token for token in self.ids[row] if token not in CONTROL_IDS]
        lines = self.loaded.processor.tokenizer.decode(ids).rstrip("\ufffd").split("\n")
        return "\n".join(clean(line) for line in lines).strip()


def _regions(
    loaded: LoadedModel, jobs: Sequence[Job], asked: Sequence[dict[str, torch.Tensor]], started: float
) -> bool:
    """False, and nothing done, where a batch's padding would leave one of them less room than it has alone."""
    skill, wanted = jobs[0].request.skill, jobs[0].request.max_objects
    inputs = _together(loaded, asked)
    steps = STEPS_PER_OBJECT[skill]
    objects = _room(loaded, inputs["input_ids"].shape[1], steps + 1) // steps
    if len(jobs) > 1 and objects < wanted:
        return False
    find = loaded.model.detect if skill == "detect" else loaded.model.point
    found = find(**inputs, max_objects=min(wanted, objects), stop=lambda: all(job.stopped() for job in jobs))
    seconds = time.perf_counter() - started
    for job, alone, regions in zip(jobs, asked, found):
        if not job.stopped():
            first = _regions_answer(skill, regions, seconds)
            first = replace(first, tokens_in=alone["input_ids"].shape[1], queue_seconds=started - job.arrived)
            for index in range(job.request.n):
                job.tell(replace(first, index=index, cut=len(regions) >= min(wanted, objects)))
    return True


def _regions_answer(skill: str, regions: Sequence[dict[str, float]], seconds: float) -> Answer:
    boxes = tuple(Box(**_clipped(region)) for region in regions if skill == "detect")
    points = tuple(Point(**_clipped(region)) for region in regions if skill == "point")
    return Answer(
        index=0,
        text=_count(len(boxes), "box", "boxes") if skill == "detect" else _count(len(points), "point", "points"),
        boxes=boxes,
        points=points,
        tokens_out=STEPS_PER_OBJECT[skill] * len(regions),
        seconds=seconds,
        first_token_seconds=seconds,
    )


def _clipped(region: dict[str, float]) -> dict[str, float]:
    """A box may reach beyond the photo, as the model gives it; what is shown does not."""
    return {name: min(max(float(value), 0.0), 1.0) for name, value in region.items()}


def _count(number: int, one: str, many: str) -> str:
    return f"1 {one}" if number == 1 else f"{number or 'no'} {many}"
