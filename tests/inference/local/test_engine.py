"""The local engine on a small random model: sampling, streaming, queueing, batching, cancellation, adapters, errors."""

import contextlib
import contextvars
import dataclasses
import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import recipes
from inference import availability
from inference.availability import unavailable
from inference.local import generation
from inference.local.engine import Engine, as_inference_error
from inference.local.generation import Job, PerRowSampler, StreamCallback, prepare_inputs
from inference.local.model_cache import LoadedModel, ModelCache
from inference.moondream import MoondreamForConditionalGeneration
from inference.registry import MODELS
from inference.types import SKILLS, Answer, AnswerEvent, InferenceError, ModelSpec, Queued, Request, TextUpdate

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PROMPTS = {"query": "Is it dark?", "detect": "the main subject", "point": "the main subject"}
LORA = r"model\.text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


@pytest.fixture(scope="module")
def model_cache() -> ModelCache:
    """Return a cache that keeps the random model loaded between tests."""
    return ModelCache()


@pytest.fixture
def engine(model_cache: ModelCache) -> Engine:
    return Engine(CPU, model_cache)


@pytest.fixture
def new_engine() -> Engine:
    """Return an engine with an empty cache, for tests that modify loaded models."""
    return Engine(CPU)


def request(photo: np.ndarray, skill: str = "recipe", **settings: Any) -> Request:
    return Request(photo, skill, settings.pop("prompt", PROMPTS.get(skill, "")), **settings)


def events(engine: Engine, spec: ModelSpec, req: Request, cancel: threading.Event | None = None) -> list[AnswerEvent]:
    return list(engine.answer(spec, req, cancel or threading.Event()))


def answers(engine: Engine, spec: ModelSpec, req: Request) -> list[Answer]:
    found = [event for event in events(engine, spec, req) if isinstance(event, Answer)]
    return sorted(found, key=lambda answer: answer.index)


def texts(engine: Engine, spec: ModelSpec, req: Request) -> list[str]:
    return [answer.text for answer in answers(engine, spec, req)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for at most about 10 seconds."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("the condition did not become true")


class ForwardGate:
    """Counts the forward passes of the model and the threads inside, and can block them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.inside = self.most_inside = 0
        self.go = threading.Event()
        self.go.set()
        forward = MoondreamForConditionalGeneration.forward

        @functools.wraps(forward)
        def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self.go.wait(20)
            result = forward(model, *args, **kwargs)
            self.inside -= 1
            return result

        monkeypatch.setattr(MoondreamForConditionalGeneration, "forward", counted)


# Answers


@pytest.mark.parametrize("skill", [skill for skill in SKILLS if skill != "segment"])  # hosted models alone outline
@pytest.mark.parametrize("n", [1, 3])
def test_every_candidate_gets_one_answer(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, skill: str, n: int
) -> None:
    received = events(engine, spec, request(photo, skill, n=n))
    assert received[0] == Queued(0)
    found = [event for event in received if isinstance(event, Answer)]
    assert sorted(answer.index for answer in found) == list(range(n))
    for answer in found:
        assert answer.tokens_in > 16 and answer.tokens_out > 0
        assert 0 < answer.first_token_seconds <= answer.seconds and answer.queue_seconds >= 0
        assert len(answer.boxes) > 0 if skill == "detect" else not answer.boxes
        assert len(answer.points) > 0 if skill == "point" else not answer.points


def test_eight_recipes_are_distinct_and_valid(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    written = texts(engine, spec, request(photo, n=8))
    assert len(set(written)) == 8
    for text in written:
        parsed = recipes.parse(text)
        assert not parsed.problems and str(parsed.recipe) == text


@pytest.mark.parametrize("skill", ["recipe", "query", "caption"])
def test_text_updates_are_prefixes_of_the_answer(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, skill: str
) -> None:
    so_far = {0: "", 1: ""}
    for event in events(engine, spec, request(photo, skill, n=2)):
        if isinstance(event, TextUpdate | Answer):
            assert event.text.startswith(so_far[event.index])
            so_far[event.index] = event.text
    assert all(so_far.values())


@pytest.mark.parametrize("skill", ["recipe", "query"])
def test_equal_seeds_give_equal_answers(engine: Engine, spec: ModelSpec, photo: np.ndarray, skill: str) -> None:
    req = request(photo, skill, n=3, seed=11)
    first = texts(engine, spec, req)
    torch.manual_seed(5)  # what others draw elsewhere does not matter
    assert texts(Engine(CPU), spec, req) == first
    assert texts(engine, spec, dataclasses.replace(req, seed=12)) == [
        *first[1:],
        *texts(engine, spec, dataclasses.replace(req, seed=14, n=1)),
    ], "candidate i is sampled with seed + i"
    assert texts(engine, spec, dataclasses.replace(req, seed=111)) != first


def test_global_random_state_is_unchanged(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    events(engine, spec, request(photo, n=1))
    assert torch.equal(torch.rand(1), expected)


def test_per_row_sampler_follows_the_probabilities() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.3, 0.0]]).log().expand(4000, -1)
    drawn = PerRowSampler(range(4000))(torch.zeros(4000, 1).long(), scores)
    shares = torch.isfinite(drawn).float().mean(0)
    assert torch.equal(torch.isfinite(drawn).sum(1), torch.ones(4000))
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.2, 0.3, 0.0]), atol=0.03, rtol=0)
    assert shares[3] == 0


def test_temperature_zero_generates_once_for_all_candidates(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ForwardGate(monkeypatch)
    alone = texts(engine, spec, request(photo, temperature=0))
    single, gate.count = gate.count, 0
    assert texts(engine, spec, request(photo, n=4, temperature=0, seed=9)) == alone * 4
    assert gate.count == single


def test_spec_temperature_is_a_factor(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    steady = dataclasses.replace(spec, temperature=0.5)
    req = request(photo, n=4)
    assert texts(engine, steady, req) == texts(engine, spec, dataclasses.replace(req, temperature=0.5))
    assert texts(engine, steady, req) != texts(engine, spec, req)


def test_tiny_top_p_is_greedy(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    narrow = dataclasses.replace(spec, top_p=1e-6)
    assert texts(engine, narrow, request(photo, n=2)) == texts(engine, spec, request(photo, n=2, temperature=0))


def test_eight_candidates_encode_the_photo_once(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine.model_cache.get(spec, CPU)
    looks = []
    hook = loaded.model.model.vision.register_forward_hook(lambda module, inputs, output: looks.append(len(inputs[0])))
    events(engine, spec, request(photo, n=8))
    hook.remove()
    assert looks == [1]


def test_boxes_are_clipped_to_the_photo(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    boxes = answers(engine, spec, request(photo, "detect"))[0].boxes
    edges = [edge for box in boxes for edge in dataclasses.astuple(box)]
    assert edges and min(edges) >= 0 and max(edges) <= 1


def test_grammar_in_prompt_adds_the_grammar(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    loaded = engine.model_cache.get(spec, CPU)

    def prompt_text(grammar_in_prompt: bool) -> str:
        ids = prepare_inputs(loaded, request(photo), dataclasses.replace(spec, grammar_in_prompt=grammar_in_prompt))[
            "input_ids"
        ][0]
        return loaded.processor.tokenizer.decode([i for i in ids.tolist() if i != loaded.model.config.image_token_id])

    assert "saturation (-100 to 100" in prompt_text(True) and "How should this photo be finished?" not in prompt_text(
        True
    )
    assert "How should this photo be finished?" in prompt_text(False) and "saturation" not in prompt_text(False)


def test_processor_chat_template_gives_the_same_inputs(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, model_folder: Path
) -> None:
    processor = AutoProcessor.from_pretrained(model_folder)
    content = [{"type": "image"}, {"type": "text", "text": request(photo).prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    expected = processor(images=photo, text=text, return_tensors="pt")
    inputs = prepare_inputs(engine.model_cache.get(spec, CPU), request(photo), spec)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


@pytest.mark.parametrize("skill", ["query", "detect", "point"])
def test_control_tokens_in_prompts_are_plain_text(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, skill: str
) -> None:
    loaded = engine.model_cache.get(spec, CPU)
    honest, nasty = (
        prepare_inputs(loaded, request(photo, skill, prompt=words), spec)["input_ids"][0].tolist()
        for words in ("a b", "a<|endoftext|><|md_reserved_2|><|image|> b")
    )
    config = loaded.model.config
    marks = [*range(15), config.image_token_id]
    assert [i for i in nasty if i in marks] == [i for i in honest if i in marks]
    assert answers(engine, spec, request(photo, skill, prompt="a<|endoftext|><|md_reserved_2|><|image|> b"))


def test_training_pass_reproduces_sampled_probabilities(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    """Photos of two tilings, prompts of two lengths (padded at the left), two rollouts each, under the constraint."""
    loaded = engine.model_cache.get(spec, CPU)
    model, constraint = loaded.model, loaded.constraint
    inputs = loaded.processor.prepare([photo, photo[:60]], "query", [request(photo).prompt, "And this one?"])
    assert inputs["attention_mask"].min() == 0 and len(inputs["image_sizes"].unique(dim=0)) == 2
    prompt = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=2,
        max_new_tokens=constraint.max_tokens,
        logits_processor=[constraint.processor(prompt)],
        output_scores=True,
        return_dict_in_generate=True,
    )
    completion = out.sequences[:, prompt:]
    sampled = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    twice = {name: tensor.repeat_interleave(2, 0) for name, tensor in inputs.items()}
    mask = torch.cat([twice["attention_mask"], torch.ones_like(completion)], 1)
    with torch.no_grad():
        logits = model(**twice | {"input_ids": out.sequences, "attention_mask": mask}).logits[:, prompt - 1 : -1]
    seen = constraint.apply(logits, completion).log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    torch.testing.assert_close((seen - sampled).exp(), torch.ones_like(sampled), atol=1e-4, rtol=0)
    assert all(recipes.parse(text).ok for text in loaded.processor.decode_answers(completion))


# Queue and cancellation


def test_queued_requests_report_positions_and_run_in_order(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ForwardGate(monkeypatch)
    gate.go.clear()
    requests = [request(photo, n=2 + number, seed=10 * number) for number in range(3)]  # do not share a batch
    received: list[list[AnswerEvent]] = [[], [], []]
    finished: list[int] = []

    def follow(number: int) -> None:
        for event in engine.answer(spec, requests[number], threading.Event()):
            received[number].append(event)
        finished.append(number)

    threads = [threading.Thread(target=follow, args=(number,), daemon=True) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: received[number] != [])
    assert [events[0] for events in received] == [Queued(0), Queued(1), Queued(2)]
    gate.go.set()
    for thread in threads:
        thread.join(60)
    assert finished == [0, 1, 2] and gate.most_inside == 1
    assert [event for event in received[2] if isinstance(event, Queued)] == [Queued(2), Queued(1), Queued(0)]
    for number, events_ in enumerate(received):
        got = {event.index: event.text for event in events_ if isinstance(event, Answer)}
        assert [got[index] for index in sorted(got)] == texts(engine, spec, requests[number]), (
            "requests do not affect each other"
        )


def test_cancel_stops_generation_within_one_token(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, cancel, received = ForwardGate(monkeypatch), threading.Event(), []
    with pytest.raises(InferenceError) as caught:
        for event in engine.answer(spec, request(photo, "query", n=2), cancel):
            received.append(event)
            if isinstance(event, TextUpdate):
                gate.go.clear()
                cancel.set()
                seen = gate.count
                gate.go.set()
    assert caught.value.kind == "cancelled"
    assert not any(isinstance(event, Answer) for event in received)
    assert gate.count <= seen + 2
    assert len(engine.device_queue) == 0, "the device is free when the cancelled run has ended"


def test_cancelled_request_holds_the_device_until_it_ends(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, cancel = ForwardGate(monkeypatch), threading.Event()
    gate.go.clear()
    first = engine.answer(spec, request(photo), cancel)
    assert next(first) == Queued(0)
    wait_until(lambda: gate.inside == 1)
    cancel.set()
    second = engine.answer(spec, request(photo), threading.Event())
    assert next(second) == Queued(1), "a token is still being computed"
    gate.go.set()
    assert next(second) == Queued(0)
    assert [event for event in second if isinstance(event, Answer)] and gate.most_inside == 1
    with pytest.raises(InferenceError):
        list(first)


def test_cancel_while_queued_leaves_the_queue(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, cancel = ForwardGate(monkeypatch), threading.Event()
    gate.go.clear()
    first = engine.answer(spec, request(photo), threading.Event())
    assert next(first) == Queued(0)
    second = engine.answer(spec, request(photo), cancel)
    assert next(second) == Queued(1)
    cancel.set()
    with pytest.raises(InferenceError) as caught:
        next(second)
    assert caught.value.kind == "cancelled" and len(engine.device_queue) == 1
    gate.go.set()
    assert [event for event in first if isinstance(event, Answer)], "the running request is not affected"


def test_closing_the_iterator_stops_generation(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ForwardGate(monkeypatch)
    stream = engine.answer(spec, request(photo, "query", n=2), threading.Event())
    while not isinstance(next(stream), TextUpdate):
        pass
    stream.close()  # type: ignore[attr-defined]
    seen = gate.count
    wait_until(lambda: len(engine.device_queue) == 0)
    assert gate.count <= seen + 2


def test_slow_consumer_does_not_block_other_requests(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    slow = engine.answer(spec, request(photo), threading.Event())
    assert next(slow) == Queued(0)
    assert answers(engine, spec, request(photo, seed=3))
    assert [event for event in slow if isinstance(event, Answer)]


def test_request_cancelled_before_start_never_runs_the_model(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, cancel = ForwardGate(monkeypatch), threading.Event()
    cancel.set()
    with pytest.raises(InferenceError, match="Cancelled"):
        events(engine, spec, request(photo), cancel)
    assert gate.count == 0


def test_text_updates_are_limited_to_twelve_per_second(
    spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a fake clock: 500 tokens in 5 seconds."""
    now = [0.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])
    received: list[Any] = []
    loaded = ModelCache().get(spec, CPU)
    job = Job(spec, request(photo, n=2), lambda: False, received.append, 0.0)
    watcher = StreamCallback(loaded, [generation._Row(job, [index], 5) for index in (0, 1)], 0.0)
    for _ in range(500):
        now[0] += 0.01
        watcher(torch.full((2, 6), 100), torch.zeros(2, 1))
    for index in (0, 1):
        count = sum(event.index == index for event in received)
        assert 50 <= count <= 61


# Batching


class QueuedRequests:
    """Requests in threads, queued behind one that holds the device, and their events."""

    def __init__(self, engine: Engine, spec: ModelSpec, photo: np.ndarray, gate: ForwardGate) -> None:
        self.engine, self.spec, self.gate = engine, spec, gate
        self.received: dict[int, list[AnswerEvent | InferenceError]] = {}
        self.cancels: list[threading.Event] = []
        self.threads: list[threading.Thread] = []
        gate.go.clear()
        self.add(request(photo, n=2))
        wait_until(lambda: gate.inside == 1)

    def add(self, req: Request) -> int:
        number = len(self.threads)
        self.received[number] = []
        self.cancels.append(threading.Event())
        self.threads.append(threading.Thread(target=self._follow, args=(number, req), daemon=True))
        self.threads[-1].start()
        wait_until(lambda: self.received[number] != [])
        return number

    def _follow(self, number: int, req: Request) -> None:
        try:
            for event in self.engine.answer(self.spec, req, self.cancels[number]):
                self.received[number].append(event)
        except InferenceError as error:
            self.received[number].append(error)

    def go(self) -> None:
        self.gate.go.set()
        for thread in self.threads:
            thread.join(60)

    def texts(self, number: int) -> list[str]:
        return [event.text for event in self.received[number] if isinstance(event, Answer)]


@pytest.mark.parametrize("skill", ["recipe", "query", "detect"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_batched_answers_equal_single_answers(
    engine: Engine,
    spec: ModelSpec,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    skill: str,
    temperature: float,
) -> None:
    words = ["Is it dark?", "And is it warm or cold?", "Is it dark?", "Sharp?"]
    req = [
        request(
            photo[: 90 - 9 * i], skill, prompt=words[i], seed=i, temperature=temperature, max_tokens=24, max_objects=5
        )
        for i in range(4)
    ]
    alone = [answers(engine, spec, one)[0] for one in req]
    looks: list[int] = []
    vision = engine.model_cache.get(spec, CPU).model.model.vision
    queued = QueuedRequests(engine, spec, photo, ForwardGate(monkeypatch))
    hook = vision.register_forward_hook(lambda module, inputs, output: looks.append(len(inputs[0])))
    for one in req:
        queued.add(one)
    queued.go()
    hook.remove()
    assert looks[-1] == 4, "four photos are encoded in one batch"
    for number, expected in enumerate(alone, start=1):
        (got,) = [event for event in queued.received[number] if isinstance(event, Answer)]
        assert (got.text, got.tokens_in, got.tokens_out) == (expected.text, expected.tokens_in, expected.tokens_out)
        assert [round(box.x_min, 3) for box in got.boxes] == [round(box.x_min, 3) for box in expected.boxes]


def test_requests_with_several_candidates_are_batched_up_to_a_number_of_rows(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(photo[: 90 - 5 * i], n=5, seed=10 * i, temperature=1.0) for i in range(4)]
    alone = [texts(engine, spec, one) for one in requests]
    queued = QueuedRequests(engine, spec, photo, ForwardGate(monkeypatch))
    sizes: list[int] = []
    answer = generation.answer
    monkeypatch.setattr(generation, "answer", lambda loaded, jobs: (sizes.append(len(jobs)), answer(loaded, jobs)))
    for one in requests:
        queued.add(one)
    queued.go()
    assert sizes == [3, 1], "15 candidates of at most 16, then the rest"
    for number, expected in enumerate(alone, start=1):
        received = [event for event in queued.received[number] if isinstance(event, Answer)]
        assert [event.text for event in sorted(received, key=lambda event: event.index)] == expected


def test_requests_with_other_settings_are_not_batched(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = QueuedRequests(engine, spec, photo, ForwardGate(monkeypatch))
    sizes: list[int] = []
    answer = generation.answer
    monkeypatch.setattr(generation, "answer", lambda loaded, jobs: (sizes.append(len(jobs)), answer(loaded, jobs)))
    for settings in ({}, {"temperature": 0.5}, {"seed": 3}, {"n": 2}, {"skill": "query"}):
        queued.add(request(photo, **settings))
    queued.go()
    assert sorted(sizes) == [1, 1, 1, 2]
    assert all(queued.texts(number) for number in queued.received)


def test_cancelling_one_batched_request_leaves_the_others(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ForwardGate(monkeypatch)
    queued = QueuedRequests(engine, spec, photo, gate)
    first, second, third = (queued.add(request(photo, "query", seed=seed)) for seed in range(3))
    gate.go.set()
    wait_until(lambda: isinstance(queued.received[second][-1], TextUpdate))
    gate.go.clear()
    queued.cancels[second].set()
    queued.go()
    assert queued.texts(first) and queued.texts(third) and not queued.texts(second)
    assert isinstance(queued.received[second][-1], InferenceError)
    wait_until(lambda: len(engine.device_queue) == 0)


def test_failed_batch_is_retried_one_by_one(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = QueuedRequests(engine, spec, photo, ForwardGate(monkeypatch))
    answer = generation.answer

    def narrow(loaded: LoadedModel, jobs: list[Job]) -> None:
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("no room for several")
        answer(loaded, jobs)

    monkeypatch.setattr(generation, "answer", narrow)
    good, other = queued.add(request(photo, "query")), queued.add(request(photo, "query", seed=1))
    long = queued.add(request(photo, "query", prompt="word " * 200))
    queued.go()
    assert queued.texts(good) and queued.texts(other)
    (error,) = [event for event in queued.received[long] if isinstance(event, InferenceError)]
    assert error.kind == "too_long"


def test_callers_context_is_inherited(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    visitor: contextvars.ContextVar[str] = contextvars.ContextVar("visitor", default="unset")
    visitor.set("alice")
    seen: list[str] = []
    model_cache = engine.model_cache

    class Recording:
        def get(self, *args: Any) -> LoadedModel:
            seen.append(visitor.get())
            return model_cache.get(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(model_cache, name)

    engine.model_cache = Recording()  # type: ignore[assignment]
    events(engine, spec, request(photo))
    assert seen == ["alice"]


# Adapters


def save_adapter(model_folder: Path, folder: Path, seed: int, **changes: Any) -> str:
    base = AutoModelForImageTextToText.from_pretrained(model_folder)
    config = LoraConfig(r=4, target_modules=LORA, init_lora_weights=False, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tuned(spec: ModelSpec, model_folder: Path, tmp_path: Path) -> list[ModelSpec]:
    """Return two specs with random adapters on the same base."""
    folders = [save_adapter(model_folder, tmp_path / f"lora{seed}", seed) for seed in (1, 2)]
    return [dataclasses.replace(spec, name=Path(folder).name, adapter=folder) for folder in folders]


def test_adapters_share_one_base_model(
    new_engine: Engine, spec: ModelSpec, tuned: list[ModelSpec], photo: np.ndarray, model_folder: Path
) -> None:
    req = request(photo, n=3)
    base = texts(new_engine, spec, req)
    one, two = (texts(new_engine, model, req) for model in tuned)
    assert base != one != two != base
    assert [texts(new_engine, model, req) for model in (tuned[1], spec, tuned[0], spec)] == [two, base, one, base]
    assert len(new_engine.model_cache._models) == 1, "there is one copy of the base"
    expected = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model_folder), tuned[0].adapter)
    inputs = prepare_inputs(new_engine.model_cache.get(spec, CPU), req, spec)
    with torch.no_grad(), new_engine.model_cache.get(spec, CPU).use_adapter(tuned[0].adapter):
        switched = new_engine.model_cache.get(spec, CPU).model(**inputs).logits
        torch.testing.assert_close(switched, expected(**inputs).logits, atol=1e-5, rtol=0)


def test_modified_adapter_is_reloaded(
    new_engine: Engine, tuned: list[ModelSpec], photo: np.ndarray, model_folder: Path
) -> None:
    before = texts(new_engine, tuned[0], request(photo))
    save_adapter(model_folder, Path(str(tuned[0].adapter)), seed=3)
    assert texts(new_engine, tuned[0], request(photo)) != before


def test_adapter_cache_is_limited(
    new_engine: Engine, spec: ModelSpec, tuned: list[ModelSpec], photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.local.model_cache.MAX_ADAPTERS", 1)
    req = request(photo)
    one, two = (texts(new_engine, model, req) for model in tuned)
    assert [texts(new_engine, model, req) for model in tuned] == [one, two]
    assert len(new_engine.model_cache.get(spec, CPU)._adapters) == 1


@pytest.mark.parametrize("flaw", ["shape", "names", "garbage"])
def test_mismatched_adapter_fails_without_side_effects(
    new_engine: Engine, spec: ModelSpec, model_folder: Path, photo: np.ndarray, tmp_path: Path, flaw: str
) -> None:
    before = texts(new_engine, spec, request(photo))
    folder = Path(save_adapter(model_folder, tmp_path / "lora", 1))
    config = folder / "adapter_config.json"
    if flaw == "garbage":
        (folder / "adapter_model.safetensors").write_bytes(b"not a tensor")
    else:
        old, new = ('"r": 4', '"r": 8') if flaw == "shape" else ("(attn", "(elsewhere|attn")
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new) if flaw == "shape" else text.replace("|mlp", "|nothing"))
    broken = dataclasses.replace(spec, adapter=str(folder))
    with pytest.raises(InferenceError, match="adapter of Random does not fit") as caught:
        events(new_engine, broken, request(photo))
    assert caught.value.kind == "bad_weights"
    assert texts(new_engine, spec, request(photo)) == before


# Errors


def copied(model_folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(model_folder, to))


def fails(engine: Engine, spec: ModelSpec, req: Request) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        events(engine, spec, req)
    assert len(engine.device_queue) == 0
    return caught.value


def test_too_long_prompt_raises(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    for skill in ("query", "detect", "recipe"):
        error = fails(engine, spec, request(photo, skill, prompt="strange " * 200))
        assert error.kind == "too_long" and "Use fewer words" in error.message
    assert answers(engine, spec, request(photo))


def test_answer_is_truncated_at_the_context_limit(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    long = answers(engine, spec, request(photo, "query", prompt="s " * 40))[0]
    assert long.tokens_in + long.tokens_out == engine.model_cache.get(spec, CPU).model.config.text_config.max_context


@pytest.mark.parametrize("flaw", ["cut", "garbage", "sizes"])
def test_corrupt_weights_raise_without_exposing_the_path(
    engine: Engine, spec: ModelSpec, model_folder: Path, photo: np.ndarray, tmp_path: Path, flaw: str
) -> None:
    folder = copied(model_folder, tmp_path / "broken")
    file = folder / "model.safetensors"
    if flaw == "sizes":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"n_layers": 2', '"n_layers": 3'))
    else:
        file.write_bytes(file.read_bytes()[:5000] if flaw == "cut" else b"\x00" * 5000)
    error = fails(engine, dataclasses.replace(spec, source=str(folder)), request(photo))
    assert error.kind == "bad_weights" and "Random" in error.message and str(tmp_path) not in error.message


def test_deleted_weights_raise_missing_weights(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, tmp_path: Path
) -> None:
    error = fails(engine, dataclasses.replace(spec, source=str(tmp_path / "gone")), request(photo))
    assert error.kind == "missing_weights"


def test_unexpected_error_exposes_only_its_type(
    engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(MoondreamForConditionalGeneration.forward)
    def burst(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret at /home/alice")

    monkeypatch.setattr(MoondreamForConditionalGeneration, "forward", burst)
    error = fails(engine, spec, request(photo))
    assert error.kind == "failed" and "secret" not in error.message and "RuntimeError" in error.message


def test_out_of_memory_error_has_advice(spec: ModelSpec) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA")):
        received = as_inference_error(error, spec)
        assert received.kind == "out_of_memory" and "fewer candidates" in received.message


def test_gpu_model_is_unavailable_on_a_cpu(engine: Engine, spec: ModelSpec, photo: np.ndarray) -> None:
    assert fails(engine, dataclasses.replace(spec, needs_gpu=True), request(photo)).kind == "unavailable"


# Model cache, and the layout of the released model


def test_cold_start_is_measured_apart_from_the_queue(
    new_engine: Engine, spec: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    durations, get = [], new_engine.model_cache.get

    def measured(*args: Any) -> LoadedModel:
        start = time.perf_counter()
        loaded = get(*args)
        durations.append(time.perf_counter() - start)
        return loaded

    monkeypatch.setattr(new_engine.model_cache, "get", measured)
    start = time.perf_counter()
    (cold,) = (event for event in events(new_engine, spec, request(photo)) if isinstance(event, Answer))
    elapsed = time.perf_counter() - start
    assert cold.cold_start_seconds is not None and cold.cold_start_seconds >= durations[0]
    assert cold.queue_seconds + cold.cold_start_seconds + cold.seconds <= elapsed, "no time counts twice"
    for skill in ("recipe", "detect"):
        (warm,) = (event for event in events(new_engine, spec, request(photo, skill)) if isinstance(event, Answer))
        assert warm.cold_start_seconds is None and warm.queue_seconds >= durations[-1]


def test_least_recently_used_model_is_evicted(
    spec: ModelSpec, model_folder: Path, photo: np.ndarray, tmp_path: Path
) -> None:
    engine = Engine(CPU, ModelCache(limit=2))
    specs = [dataclasses.replace(spec, source=str(copied(model_folder, tmp_path / name))) for name in "abc"]
    a, b, c = (lambda at=at: engine.model_cache.get(specs[at], CPU) for at in range(3))
    first, second = a(), b()
    assert a() is first, "it is kept"
    c()
    assert a() is first and len(engine.model_cache._models) == 2
    assert b() is not second, "it was let go"
    assert texts(engine, specs[2], request(photo)) == texts(engine, specs[0], request(photo))


def test_specs_with_equal_weights_share_one_model(engine: Engine, spec: ModelSpec) -> None:
    steady = dataclasses.replace(spec, name="steady", temperature=0.4)
    assert engine.model_cache.get(spec, CPU) is engine.model_cache.get(steady, CPU)


@pytest.fixture
def downloaded(
    spec: ModelSpec, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ModelSpec, Path, Path]]:
    """Weights and tokenizer in the Hub's cache as the released model has them: two repositories, and code beside."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    released = MODELS["moondream2"]
    folders = []
    for repository, revision, names in (
        (released.source, released.revision, ["config.json", "model.safetensors"]),
        (released.tokenizer, "main", ["tokenizer.json"]),
    ):
        repo = tmp_path / f"models--{str(repository).replace('/', '--')}"
        folders.append(repo / "snapshots" / ("b" * 40))
        folders[-1].mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / str(revision)).write_text("b" * 40)
        for name in names:
            shutil.copy(model_folder / name, folders[-1] / name)
    config = folders[0] / "config.json"
    auto = '"auto_map": {"AutoConfig": "hf_moondream.HfConfig", "AutoModelForCausalLM": "hf_moondream.HfMoondream"},'
    config.write_text(config.read_text().replace("{", "{" + auto, 1))
    yield dataclasses.replace(released, needs_gpu=False, memory_bytes=0), *folders


def test_released_layout_loads_from_the_hub_cache(
    engine: Engine, downloaded: tuple[ModelSpec, Path, Path], photo: np.ndarray
) -> None:
    spec, _, _ = downloaded
    assert unavailable(spec) is None
    for skill in ("query", "caption", "detect", "point"):
        assert answers(engine, spec, request(photo, skill))


def test_stale_tokenizer_beside_released_weights_is_ignored(
    engine: Engine, downloaded: tuple[ModelSpec, Path, Path], photo: np.ndarray
) -> None:
    spec, weights_folder, tokenizer_folder = downloaded
    stale = (tokenizer_folder / "tokenizer.json").read_text().replace("<|md_reserved_2|>", "<|stale|>")
    (weights_folder / "tokenizer.json").write_text(stale)
    assert answers(engine, spec, request(photo, "query"))
    (tokenizer_folder / "tokenizer.json").write_text(stale)
    error = fails(Engine(CPU), spec, request(photo, "query"))
    assert error.kind == "wrong_tokenizer" and "moondream/starmie-v1" in error.message


def test_no_network_access(
    downloaded: tuple[ModelSpec, Path, Path], monkeypatch: pytest.MonkeyPatch, photo: np.ndarray
) -> None:
    spec, weights_folder, _ = downloaded

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert answers(Engine(CPU), spec, request(photo, "query"))
    (weights_folder / "model.safetensors").unlink()
    assert "hf download" in str(availability.unavailable(spec))
    assert fails(Engine(CPU), spec, request(photo, "query")).kind == "missing_weights"


def test_registry_answer_uses_the_engine(spec: ModelSpec, photo: np.ndarray) -> None:
    from inference.registry import answer

    with contextlib.closing(answer(spec, request(photo))) as stream:  # type: ignore[type-var]
        assert any(isinstance(event, Answer) for event in stream)
