"""Local answers from a random little model: what is asked, drawn, streamed, cancelled, adapted, and what goes wrong."""

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
from inference import availability as weights
from inference.local import generation as decoding
from inference.local.engine import Engine, explain
from inference.local.generation import Job, ask
from inference.local.model_cache import LoadedModel, ModelCache
from inference.moondream import MoondreamForConditionalGeneration
from inference.registry import MODELS, ModelSpec
from inference.types import (
    SKILLS,
    Answer,
    Event,
    InferenceError,
    Queued,
    Request,
    TextUpdate,
)

CPU = torch.device("cpu")
PROMPTS = {"query": "Is it dark?", "detect": "the main subject", "point": "the main subject"}
LORA = r"model\.text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


@pytest.fixture(scope="module")
def shelf() -> ModelCache:
    """Keeps the random model loaded between tests."""
    return ModelCache()


@pytest.fixture
def engine(shelf: ModelCache) -> Engine:
    return Engine(CPU, shelf)


@pytest.fixture
def fresh() -> Engine:
    """An engine for tests that change what is loaded."""
    return Engine(CPU)


def request(photo: np.ndarray, skill: str = "recipe", **settings: Any) -> Request:
    return Request(photo, skill, settings.pop("prompt", PROMPTS.get(skill, "")), **settings)


def events(engine: Engine, entry: ModelSpec, asked: Request, cancel: threading.Event | None = None) -> list[Event]:
    return list(engine.answer(entry, asked, cancel or threading.Event()))


def answers(engine: Engine, entry: ModelSpec, asked: Request) -> list[Answer]:
    found = [event for event in events(engine, entry, asked) if isinstance(event, Answer)]
    return sorted(found, key=lambda answer: answer.index)


def texts(engine: Engine, entry: ModelSpec, asked: Request) -> list[str]:
    return [answer.text for answer in answers(engine, entry, asked)]


def until(what: Callable[[], bool]) -> None:
    """Waits for something that must come, however slow the machine is."""
    for _ in range(2000):
        if what():
            return
        time.sleep(0.005)
    pytest.fail("it did not come")


class Steps:
    """Counts the passes of the language model, tells whether two threads ever met in one, and can hold them up."""

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


# What is asked and answered


@pytest.mark.parametrize("skill", [skill for skill in SKILLS if skill != "segment"])  # hosted models alone outline
@pytest.mark.parametrize("n", [1, 3])
def test_each_candidate_is_answered_once(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, skill: str, n: int
) -> None:
    told = events(engine, entry, request(photo, skill, n=n))
    assert told[0] == Queued(0)
    found = [event for event in told if isinstance(event, Answer)]
    assert sorted(answer.index for answer in found) == list(range(n))
    for answer in found:
        assert answer.tokens_in > 16 and answer.tokens_out > 0
        assert 0 < answer.first_token_seconds <= answer.seconds and answer.queue_seconds >= 0
        assert len(answer.boxes) > 0 if skill == "detect" else not answer.boxes
        assert len(answer.points) > 0 if skill == "point" else not answer.points


def test_eight_recipes_are_distinct_and_without_a_flaw(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    written = texts(engine, entry, request(photo, n=8))
    assert len(set(written)) == 8
    for text in written:
        parsed = recipes.parse(text)
        assert not parsed.problems and str(parsed.recipe) == text


@pytest.mark.parametrize("skill", ["recipe", "query", "caption"])
def test_partial_texts_grow_into_the_answer(engine: Engine, entry: ModelSpec, photo: np.ndarray, skill: str) -> None:
    so_far = {0: "", 1: ""}
    for event in events(engine, entry, request(photo, skill, n=2)):
        if isinstance(event, TextUpdate | Answer):
            assert event.text.startswith(so_far[event.index])
            so_far[event.index] = event.text
    assert all(so_far.values())


@pytest.mark.parametrize("skill", ["recipe", "query"])
def test_the_same_seed_gives_the_same_answers(engine: Engine, entry: ModelSpec, photo: np.ndarray, skill: str) -> None:
    asked = request(photo, skill, n=3, seed=11)
    first = texts(engine, entry, asked)
    torch.manual_seed(5)  # what others draw elsewhere does not matter
    assert texts(Engine(CPU), entry, asked) == first
    assert texts(engine, entry, dataclasses.replace(asked, seed=12)) == [
        *first[1:],
        *texts(engine, entry, dataclasses.replace(asked, seed=14, n=1)),
    ], "candidate i is drawn with seed + i"
    assert texts(engine, entry, dataclasses.replace(asked, seed=111)) != first


def test_no_global_randomness_is_consumed_or_set(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    events(engine, entry, request(photo, n=1))
    assert torch.equal(torch.rand(1), expected)


def test_drawing_follows_the_probabilities() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.3, 0.0]]).log().expand(4000, -1)
    drawn = decoding._Draw(range(4000))(torch.zeros(4000, 1).long(), scores)
    shares = torch.isfinite(drawn).float().mean(0)
    assert torch.equal(torch.isfinite(drawn).sum(1), torch.ones(4000))
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.2, 0.3, 0.0]), atol=0.03, rtol=0)
    assert shares[3] == 0


def test_at_temperature_zero_one_answer_is_computed_and_told_n_times(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    alone = texts(engine, entry, request(photo, temperature=0))
    single, steps.count = steps.count, 0
    assert texts(engine, entry, request(photo, n=4, temperature=0, seed=9)) == alone * 4
    assert steps.count == single


def test_an_entrys_temperature_is_a_factor(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    steady = dataclasses.replace(entry, temperature=0.5)
    asked = request(photo, n=4)
    assert texts(engine, steady, asked) == texts(engine, entry, dataclasses.replace(asked, temperature=0.5))
    assert texts(engine, steady, asked) != texts(engine, entry, asked)


def test_top_p_of_nearly_nothing_is_greedy(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    narrow = dataclasses.replace(entry, top_p=1e-6)
    assert texts(engine, narrow, request(photo, n=2)) == texts(engine, entry, request(photo, n=2, temperature=0))


def test_eight_candidates_cost_one_look(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine.shelf.get(entry, CPU)
    looks = []
    hook = loaded.model.model.vision.register_forward_hook(lambda module, inputs, output: looks.append(len(inputs[0])))
    events(engine, entry, request(photo, n=8))
    hook.remove()
    assert looks == [1]


def test_regions_stay_inside_the_photo(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    boxes = answers(engine, entry, request(photo, "detect"))[0].boxes
    edges = [edge for box in boxes for edge in dataclasses.astuple(box)]
    assert edges and min(edges) >= 0 and max(edges) <= 1


def test_a_model_that_never_learned_recipes_is_told_the_grammar(
    engine: Engine, entry: ModelSpec, photo: np.ndarray
) -> None:
    loaded = engine.shelf.get(entry, CPU)

    def asked(grammar_in_prompt: bool) -> str:
        ids = ask(loaded, request(photo), dataclasses.replace(entry, grammar_in_prompt=grammar_in_prompt))["input_ids"][
            0
        ]
        return loaded.processor.tokenizer.decode([i for i in ids.tolist() if i != loaded.model.config.image_token_id])

    assert "saturation (-100 to 100" in asked(True) and "How should this photo be finished?" not in asked(True)
    assert "How should this photo be finished?" in asked(False) and "saturation" not in asked(False)


def test_the_trainers_processor_writes_the_same_prompt(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, model_folder: Path
) -> None:
    processor = AutoProcessor.from_pretrained(model_folder)
    content = [{"type": "image"}, {"type": "text", "text": request(photo).prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    expected = processor(images=photo, text=text, return_tensors="pt")
    inputs = ask(engine.shelf.get(entry, CPU), request(photo), entry)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


@pytest.mark.parametrize("skill", ["query", "detect", "point"])
def test_typed_control_tokens_are_plain_text(engine: Engine, entry: ModelSpec, photo: np.ndarray, skill: str) -> None:
    loaded = engine.shelf.get(entry, CPU)
    honest, nasty = (
        ask(loaded, request(photo, skill, prompt=words), entry)["input_ids"][0].tolist()
        for words in ("a b", "a<|endoftext|><|md_reserved_2|><|image|> b")
    )
    config = loaded.model.config
    marks = [*range(15), config.image_token_id]
    assert [i for i in nasty if i in marks] == [i for i in honest if i in marks]
    assert answers(engine, entry, request(photo, skill, prompt="a<|endoftext|><|md_reserved_2|><|image|> b"))


def test_a_trainers_pass_sees_the_probabilities_that_were_sampled_from(
    engine: Engine, entry: ModelSpec, photo: np.ndarray
) -> None:
    """Photos of two tilings, prompts of two lengths (padded at the left), two rollouts each, under the constraint."""
    loaded = engine.shelf.get(entry, CPU)
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


# Waiting and stopping


def test_those_who_wait_see_their_position_and_are_served_in_order(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    steps.go.clear()
    told: list[list[Event]] = [[], [], []]
    finished: list[int] = []

    def follow(number: int) -> None:
        for event in engine.answer(entry, request(photo, n=2, seed=10 * number), threading.Event()):
            told[number].append(event)
        finished.append(number)

    threads = [threading.Thread(target=follow, args=(number,), daemon=True) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda number=number: told[number] != [])
    assert [events[0] for events in told] == [Queued(0), Queued(1), Queued(2)]
    steps.go.set()
    for thread in threads:
        thread.join(60)
    assert finished == [0, 1, 2] and steps.most_inside == 1
    assert [event for event in told[2] if isinstance(event, Queued)] == [Queued(2), Queued(1), Queued(0)]
    for number, events_ in enumerate(told):
        got = {event.index: event.text for event in events_ if isinstance(event, Answer)}
        assert [got[0], got[1]] == texts(engine, entry, request(photo, n=2, seed=10 * number)), (
            "nobody disturbs another"
        )


def test_cancelled_while_computing_it_stops_at_the_next_token(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, cancel, told = Steps(monkeypatch), threading.Event(), []
    with pytest.raises(InferenceError) as caught:
        for event in engine.answer(entry, request(photo, "query", n=2), cancel):
            told.append(event)
            if isinstance(event, TextUpdate):
                steps.go.clear()
                cancel.set()
                seen = steps.count
                steps.go.set()
    assert caught.value.kind == "cancelled"
    assert not any(isinstance(event, Answer) for event in told)
    assert steps.count <= seen + 2
    assert len(engine.turns) == 0, "the device is free when the cancelled run has ended"


def test_the_device_is_kept_until_the_cancelled_run_really_ends(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, cancel = Steps(monkeypatch), threading.Event()
    steps.go.clear()
    first = engine.answer(entry, request(photo), cancel)
    assert next(first) == Queued(0)
    until(lambda: steps.inside == 1)
    cancel.set()
    second = engine.answer(entry, request(photo), threading.Event())
    assert next(second) == Queued(1), "a token is still being computed"
    steps.go.set()
    assert next(second) == Queued(0)
    assert [event for event in second if isinstance(event, Answer)] and steps.most_inside == 1
    with pytest.raises(InferenceError):
        list(first)


def test_cancelled_while_waiting_it_leaves_the_queue_at_once(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, cancel = Steps(monkeypatch), threading.Event()
    steps.go.clear()
    first = engine.answer(entry, request(photo), threading.Event())
    assert next(first) == Queued(0)
    second = engine.answer(entry, request(photo), cancel)
    assert next(second) == Queued(1)
    cancel.set()
    with pytest.raises(InferenceError) as caught:
        next(second)
    assert caught.value.kind == "cancelled" and len(engine.turns) == 1
    steps.go.set()
    assert [event for event in first if isinstance(event, Answer)], "the one who computes is not disturbed"


def test_a_listener_that_goes_away_stops_the_computing(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    stream = engine.answer(entry, request(photo, "query", n=2), threading.Event())
    while not isinstance(next(stream), TextUpdate):
        pass
    stream.close()  # type: ignore[attr-defined]
    seen = steps.count
    until(lambda: len(engine.turns) == 0)
    assert steps.count <= seen + 2


def test_a_listener_that_dawdles_keeps_nobody_waiting(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    slow = engine.answer(entry, request(photo), threading.Event())
    assert next(slow) == Queued(0)
    assert answers(engine, entry, request(photo, seed=3))
    assert [event for event in slow if isinstance(event, Answer)]


def test_one_that_is_cancelled_before_it_starts_never_computes(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, cancel = Steps(monkeypatch), threading.Event()
    cancel.set()
    with pytest.raises(InferenceError, match="Cancelled"):
        events(engine, entry, request(photo), cancel)
    assert steps.count == 0


def test_partials_come_at_most_twelve_times_a_second(
    entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of our own: 500 tokens in 5 seconds."""
    now = [0.0]
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now[0])
    told: list[Any] = []
    loaded = ModelCache().get(entry, CPU)
    job = Job(entry, request(photo, n=2), lambda: False, told.append, 0.0)
    watcher = decoding._Watcher(loaded, [decoding._Row(job, [index], 5) for index in (0, 1)], 0.0)
    for _ in range(500):
        now[0] += 0.01
        watcher(torch.full((2, 6), 100), torch.zeros(2, 1))
    for index in (0, 1):
        count = sum(event.index == index for event in told)
        assert 50 <= count <= 61


# Single answers that wait are computed together


class Crowd:
    """Requests that wait behind one that holds the device, each in a thread; what they were told, in the end."""

    def __init__(self, engine: Engine, entry: ModelSpec, photo: np.ndarray, steps: Steps) -> None:
        self.engine, self.entry, self.steps = engine, entry, steps
        self.told: dict[int, list[Event | InferenceError]] = {}
        self.cancels: list[threading.Event] = []
        self.threads: list[threading.Thread] = []
        steps.go.clear()
        self.add(request(photo, n=2))
        until(lambda: steps.inside == 1)

    def add(self, asked: Request) -> int:
        number = len(self.threads)
        self.told[number] = []
        self.cancels.append(threading.Event())
        self.threads.append(threading.Thread(target=self._follow, args=(number, asked), daemon=True))
        self.threads[-1].start()
        until(lambda: self.told[number] != [])
        return number

    def _follow(self, number: int, asked: Request) -> None:
        try:
            for event in self.engine.answer(self.entry, asked, self.cancels[number]):
                self.told[number].append(event)
        except InferenceError as error:
            self.told[number].append(error)

    def go(self) -> None:
        self.steps.go.set()
        for thread in self.threads:
            thread.join(60)

    def texts(self, number: int) -> list[str]:
        return [event.text for event in self.told[number] if isinstance(event, Answer)]


@pytest.mark.parametrize("skill", ["recipe", "query", "detect"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_batch_gives_each_what_it_would_get_alone(
    engine: Engine,
    entry: ModelSpec,
    photo: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    skill: str,
    temperature: float,
) -> None:
    words = ["Is it dark?", "And is it warm or cold?", "Is it dark?", "Sharp?"]
    asked = [
        request(
            photo[: 90 - 9 * i], skill, prompt=words[i], seed=i, temperature=temperature, max_tokens=24, max_objects=5
        )
        for i in range(4)
    ]
    alone = [answers(engine, entry, one)[0] for one in asked]
    looks: list[int] = []
    vision = engine.shelf.get(entry, CPU).model.model.vision
    crowd = Crowd(engine, entry, photo, Steps(monkeypatch))
    hook = vision.register_forward_hook(lambda module, inputs, output: looks.append(len(inputs[0])))
    for one in asked:
        crowd.add(one)
    crowd.go()
    hook.remove()
    assert looks[-1] == 4, "one look at four photos"
    for number, expected in enumerate(alone, start=1):
        (got,) = [event for event in crowd.told[number] if isinstance(event, Answer)]
        assert (got.text, got.tokens_in, got.tokens_out) == (expected.text, expected.tokens_in, expected.tokens_out)
        assert [round(box.x_min, 3) for box in got.boxes] == [round(box.x_min, 3) for box in expected.boxes]


def test_what_differs_in_more_than_words_is_not_batched(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(engine, entry, photo, Steps(monkeypatch))
    sizes: list[int] = []
    answer = decoding.answer
    monkeypatch.setattr(decoding, "answer", lambda loaded, jobs: (sizes.append(len(jobs)), answer(loaded, jobs)))
    for settings in ({}, {"temperature": 0.5}, {"seed": 3}, {"n": 2}, {"skill": "query"}):
        crowd.add(request(photo, **settings))
    crowd.go()
    assert sorted(sizes) == [1, 1, 1, 2]
    assert all(crowd.texts(number) for number in crowd.told)


def test_one_of_a_batch_that_is_cancelled_ends_alone(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    crowd = Crowd(engine, entry, photo, steps)
    first, second, third = (crowd.add(request(photo, "query", seed=seed)) for seed in range(3))
    steps.go.set()
    until(lambda: isinstance(crowd.told[second][-1], TextUpdate))
    steps.go.clear()
    crowd.cancels[second].set()
    crowd.go()
    assert crowd.texts(first) and crowd.texts(third) and not crowd.texts(second)
    assert isinstance(crowd.told[second][-1], InferenceError)
    until(lambda: len(engine.turns) == 0)


def test_a_batch_that_fails_is_asked_one_by_one(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(engine, entry, photo, Steps(monkeypatch))
    answer = decoding.answer

    def narrow(loaded: LoadedModel, jobs: list[Job]) -> None:
        if len(jobs) > 1:
            raise torch.OutOfMemoryError("no room for several")
        answer(loaded, jobs)

    monkeypatch.setattr(decoding, "answer", narrow)
    good, other = crowd.add(request(photo, "query")), crowd.add(request(photo, "query", seed=1))
    long = crowd.add(request(photo, "query", prompt="word " * 200))
    crowd.go()
    assert crowd.texts(good) and crowd.texts(other)
    (error,) = [event for event in crowd.told[long] if isinstance(event, InferenceError)]
    assert error.kind == "too_long"


def test_the_callers_context_goes_along(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    visitor: contextvars.ContextVar[str] = contextvars.ContextVar("visitor", default="nobody")
    visitor.set("somebody")
    seen: list[str] = []
    shelf = engine.shelf

    class Recording:
        def get(self, *args: Any) -> LoadedModel:
            seen.append(visitor.get())
            return shelf.get(*args)

    engine.shelf = Recording()  # type: ignore[assignment]
    events(engine, entry, request(photo))
    assert seen == ["somebody"]


# Adapters


def save_adapter(model_folder: Path, folder: Path, seed: int, **changes: Any) -> str:
    base = AutoModelForImageTextToText.from_pretrained(model_folder)
    config = LoraConfig(r=4, target_modules=LORA, init_lora_weights=False, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tuned(entry: ModelSpec, model_folder: Path, tmp_path: Path) -> list[ModelSpec]:
    """Two entries with random adapters on the same base."""
    folders = [save_adapter(model_folder, tmp_path / f"lora{seed}", seed) for seed in (1, 2)]
    return [dataclasses.replace(entry, name=Path(folder).name, adapter=folder) for folder in folders]


def test_adapters_are_switched_on_one_base(
    fresh: Engine, entry: ModelSpec, tuned: list[ModelSpec], photo: np.ndarray, model_folder: Path
) -> None:
    asked = request(photo, n=3)
    base = texts(fresh, entry, asked)
    one, two = (texts(fresh, model, asked) for model in tuned)
    assert base != one != two != base
    assert [texts(fresh, model, asked) for model in (tuned[1], entry, tuned[0], entry)] == [two, base, one, base]
    assert len(fresh.shelf._kept) == 1, "there is one copy of the base"
    expected = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model_folder), tuned[0].adapter)
    inputs = ask(fresh.shelf.get(entry, CPU), asked, entry)
    with torch.no_grad(), fresh.shelf.get(entry, CPU).adapted(tuned[0].adapter):
        switched = fresh.shelf.get(entry, CPU).model(**inputs).logits
        torch.testing.assert_close(switched, expected(**inputs).logits, atol=1e-5, rtol=0)


def test_an_adapter_that_was_trained_further_is_loaded_again(
    fresh: Engine, tuned: list[ModelSpec], photo: np.ndarray, model_folder: Path
) -> None:
    before = texts(fresh, tuned[0], request(photo))
    save_adapter(model_folder, Path(str(tuned[0].adapter)), seed=3)
    assert texts(fresh, tuned[0], request(photo)) != before


def test_only_so_many_adapters_are_kept(
    fresh: Engine, entry: ModelSpec, tuned: list[ModelSpec], photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.local.model_cache.MAX_ADAPTERS", 1)
    asked = request(photo)
    one, two = (texts(fresh, model, asked) for model in tuned)
    assert [texts(fresh, model, asked) for model in tuned] == [one, two]
    assert len(fresh.shelf.get(entry, CPU)._adapters) == 1


@pytest.mark.parametrize("flaw", ["shape", "names", "garbage"])
def test_an_adapter_that_does_not_fit_is_refused_and_harms_nothing(
    fresh: Engine, entry: ModelSpec, model_folder: Path, photo: np.ndarray, tmp_path: Path, flaw: str
) -> None:
    before = texts(fresh, entry, request(photo))
    folder = Path(save_adapter(model_folder, tmp_path / "lora", 1))
    config = folder / "adapter_config.json"
    if flaw == "garbage":
        (folder / "adapter_model.safetensors").write_bytes(b"not a tensor")
    else:
        old, new = ('"r": 4', '"r": 8') if flaw == "shape" else ("(attn", "(elsewhere|attn")
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new) if flaw == "shape" else text.replace("|mlp", "|nothing"))
    broken = dataclasses.replace(entry, adapter=str(folder))
    with pytest.raises(InferenceError, match="adapter of Random does not fit") as caught:
        events(fresh, broken, request(photo))
    assert caught.value.kind == "bad_weights"
    assert texts(fresh, entry, request(photo)) == before


# What goes wrong


def copied(model_folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(model_folder, to))


def fails(engine: Engine, entry: ModelSpec, asked: Request) -> InferenceError:
    with pytest.raises(InferenceError) as caught:
        events(engine, entry, asked)
    assert len(engine.turns) == 0
    return caught.value


def test_too_long_a_prompt_is_told_with_how_much(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    for skill in ("query", "detect", "recipe"):
        error = fails(engine, entry, request(photo, skill, prompt="strange " * 200))
        assert error.kind == "too_long" and "Use fewer words" in error.message
    assert answers(engine, entry, request(photo))


def test_an_answer_that_fills_the_context_is_cut_off(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    long = answers(engine, entry, request(photo, "query", prompt="s " * 40))[0]
    assert long.tokens_in + long.tokens_out == engine.shelf.get(entry, CPU).model.config.text_config.max_context


@pytest.mark.parametrize("flaw", ["cut", "garbage", "sizes"])
def test_corrupt_weights_are_told_without_the_path(
    engine: Engine, entry: ModelSpec, model_folder: Path, photo: np.ndarray, tmp_path: Path, flaw: str
) -> None:
    folder = copied(model_folder, tmp_path / "broken")
    file = folder / "model.safetensors"
    if flaw == "sizes":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"n_layers": 2', '"n_layers": 3'))
    else:
        file.write_bytes(file.read_bytes()[:5000] if flaw == "cut" else b"\x00" * 5000)
    error = fails(engine, dataclasses.replace(entry, source=str(folder)), request(photo))
    assert error.kind == "bad_weights" and "Random" in error.message and str(tmp_path) not in error.message


def test_weights_that_vanish_are_missing_weights(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, tmp_path: Path
) -> None:
    error = fails(engine, dataclasses.replace(entry, source=str(tmp_path / "gone")), request(photo))
    assert error.kind == "missing_weights"


def test_a_bug_is_told_by_its_kind_alone(
    engine: Engine, entry: ModelSpec, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(MoondreamForConditionalGeneration.forward)
    def burst(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret at /home/somebody")

    monkeypatch.setattr(MoondreamForConditionalGeneration, "forward", burst)
    error = fails(engine, entry, request(photo))
    assert error.kind == "failed" and "secret" not in error.message and "RuntimeError" in error.message


def test_little_memory_is_told_with_what_to_do(entry: ModelSpec) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA")):
        told = explain(error, entry)
        assert told.kind == "out_of_memory" and "fewer candidates" in told.message


def test_a_model_for_a_gpu_does_not_crawl_on_a_processor(engine: Engine, entry: ModelSpec, photo: np.ndarray) -> None:
    assert fails(engine, dataclasses.replace(entry, needs_gpu=True), request(photo)).kind == "unavailable"


# Models kept, and the layout of the released one


def test_the_model_that_was_not_asked_for_the_longest_gives_way(
    entry: ModelSpec, model_folder: Path, photo: np.ndarray, tmp_path: Path
) -> None:
    engine = Engine(CPU, ModelCache(limit=2))
    entries = [dataclasses.replace(entry, source=str(copied(model_folder, tmp_path / name))) for name in "abc"]
    a, b, c = (lambda at=at: engine.shelf.get(entries[at], CPU) for at in range(3))
    first, second = a(), b()
    assert a() is first, "it is kept"
    c()
    assert a() is first and len(engine.shelf._kept) == 2
    assert b() is not second, "it was let go"
    assert texts(engine, entries[2], request(photo)) == texts(engine, entries[0], request(photo))


def test_entries_with_the_same_weights_share_them(engine: Engine, entry: ModelSpec) -> None:
    steady = dataclasses.replace(entry, name="steady", temperature=0.4)
    assert engine.shelf.get(entry, CPU) is engine.shelf.get(steady, CPU)


@pytest.fixture
def downloaded(
    entry: ModelSpec, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_the_released_layout_answers_from_the_cache(
    engine: Engine, downloaded: tuple[ModelSpec, Path, Path], photo: np.ndarray
) -> None:
    entry, _, _ = downloaded
    assert entry.unavailable() is None
    for skill in ("query", "caption", "detect", "point"):
        assert answers(engine, entry, request(photo, skill))


def test_the_stale_tokenizer_beside_the_released_weights_is_not_used(
    engine: Engine, downloaded: tuple[ModelSpec, Path, Path], photo: np.ndarray
) -> None:
    entry, weights_folder, tokenizer_folder = downloaded
    stale = (tokenizer_folder / "tokenizer.json").read_text().replace("<|md_reserved_2|>", "<|stale|>")
    (weights_folder / "tokenizer.json").write_text(stale)
    assert answers(engine, entry, request(photo, "query"))
    (tokenizer_folder / "tokenizer.json").write_text(stale)
    error = fails(Engine(CPU), entry, request(photo, "query"))
    assert error.kind == "wrong_tokenizer" and "moondream/starmie-v1" in error.message


def test_nothing_is_downloaded(
    downloaded: tuple[ModelSpec, Path, Path], monkeypatch: pytest.MonkeyPatch, photo: np.ndarray
) -> None:
    entry, weights_folder, _ = downloaded

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert answers(Engine(CPU), entry, request(photo, "query"))
    (weights_folder / "model.safetensors").unlink()
    assert "hf download" in str(weights.unavailable(entry))
    assert fails(Engine(CPU), entry, request(photo, "query")).kind == "missing_weights"


def test_the_engine_of_the_app_is_reached_through_models(entry: ModelSpec, photo: np.ndarray) -> None:
    from inference.registry import answer

    with contextlib.closing(answer(entry, request(photo))) as stream:  # type: ignore[type-var]
        assert any(isinstance(event, Answer) for event in stream)
