"""`python -m training.grpo <run folder>`: a GRPO fine-tune with TRL, on the rewards that score on screen.

The folder's config.json says what to do; a run that was interrupted goes on from its last whole checkpoint. The last
line on standard output is one JSON object: base and tuned means on held-out photos, interval, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from inference import availability as weights
from inference.local.constraint import RecipeConstraint
from inference.moondream import MoondreamProcessor
from inference.moondream.processing_moondream import load_tokenizer
from inference.registry import ModelSpec
from inference.types import RECIPE_QUESTION, recipe_prompt
from recipes import Recipe, grammar, save_picture
from training.data.sources import CollectError, PhotoSet, train_eval_split
from training.evaluate import EvaluateError, Judged, entry_of, judge, totals
from training.grpo.plot import draw_curve
from training.grpo.policy import CachingImageProcessor, Policy, greedy
from training.grpo.result import log_line, result
from training.grpo.reward import Scorer
from training.runs import hf_jobs as jobs
from training.runs.run import WHERE, Run, RunAborted, RunConfig, RunError, write_whole
from training.targets import TARGETS

WATCHED = 8  # held-out photos that are answered along the way
LOCK_PATIENCE = 10.0  # seconds: somebody may just be looking whether the run is alive
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors")


@dataclass
class PolicyBundle:
    """What learns: the policy under PEFT, its processor, how it is asked, and the entry that it comes from."""

    model: Any
    policy: Policy
    processor: MoondreamProcessor
    question: str
    entry: ModelSpec

    def answer(self, photos: Sequence[np.ndarray]) -> list[str]:
        """Its likeliest recipe for each photo."""
        training = self.model.training
        self.model.eval()
        texts = greedy(self.model, self.processor, photos, self.question)
        self.model.train(training)
        return texts

    def judged(self, photos: Sequence[np.ndarray]) -> list[Judged]:
        """Its likeliest recipes, scored as in `training.evaluate`."""
        return [judge(photo, text) for photo, text in zip(photos, self.answer(photos), strict=True)]


def learner(config: RunConfig) -> PolicyBundle:
    """The base with a new adapter, or with that of the run it goes on from. Raises Stop."""
    try:
        entry = entry_of(config.base)
    except EvaluateError as error:
        raise RunAborted(str(error)) from None
    missing = weights.missing_files(entry)
    folder, words = weights.model_folder(entry), weights.tokenizer_folder(entry)
    if missing or folder is None or words is None:
        raise RunAborted(f"{entry.title} cannot be trained: {missing}")
    large = torch.cuda.is_available() and entry.needs_gpu
    if entry.needs_gpu and not torch.cuda.is_available():
        raise RunAborted(f"{entry.title} cannot be trained here: it needs a GPU, and PyTorch cannot use one.")
    policy = Policy.from_pretrained(folder, dtype=torch.bfloat16 if large else torch.float32, local_files_only=True)
    tokenizer = load_tokenizer(str(words), policy.config.templates)
    cutter = CachingImageProcessor.from_config(policy.config)
    processor = MoondreamProcessor(
        cutter, tokenizer, templates=policy.config.templates, image_token_id=policy.config.image_token_id
    )
    policy.prepare(RecipeConstraint(tokenizer, grammar(), end_id=policy.config.eos_id), config.temperature)
    if torch.cuda.is_available():
        policy.to("cuda")  # type: ignore[arg-type]
    model = _adapted(policy, entry, config)
    return PolicyBundle(
        model, policy, processor, recipe_prompt() if entry.grammar_in_prompt else RECIPE_QUESTION, entry
    )


def _adapted(policy: Policy, entry: ModelSpec, config: RunConfig) -> Any:
    if entry.adapter:
        return PeftModel.from_pretrained(policy, entry.adapter, is_trainable=True)
    torch.manual_seed(config.seed)
    settings = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=TARGETS)
    return get_peft_model(policy, settings)


class RunCallback(TrainerCallback):
    """Writes metrics, probe answers and progress into the run's folder, and stops the trainer when it is asked to."""

    def __init__(self, run: Run, config: RunConfig, learner: PolicyBundle, scorer: Scorer, held_out: PhotoSet) -> None:
        self.run, self.config, self.learner, self.scorer = run, config, learner, scorer
        self.photos, self.names = held_out.photos[:WATCHED], held_out.names[:WATCHED]
        self.began = time.monotonic()
        self.held: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """One line of metrics per step."""
        if not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        line = {"step": state.global_step, "seconds": round(time.monotonic() - self.began, 2)}
        named = {"reward": "reward", "kl": "kl", "entropy": "entropy", "learning_rate": "learning_rate"}
        line |= {name: logs[key] for name, key in named.items() if key in logs}
        line |= {"no_signal": logs.get("frac_reward_zero_std"), **self.scorer.parts}
        if self.held is not None:
            line["held_out"], self.held = self.held, None
        self.run.add("metrics", line)
        print(log_line(line, state.max_steps), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Probes, progress, cancelling."""
        if self.run.cancelled:
            control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        if state.global_step % self.config.probe_every == 0:
            self.probe(state.global_step)
        self.run.set_status(step=state.global_step)

    def probe(self, step: int) -> None:
        """The likeliest answers to the first held-out photos; the first photo's is shown."""
        judged = self.learner.judged(self.photos)
        self.held = float(np.nanmean(totals(judged, self.scorer.function)))
        first = judged[0]
        line = {"step": step, "photo": self.names[0], "recipe": str(first.recipe), "scores": first.scores}
        self.run.add("probes", line | {"total": self.scorer.function.total(first.scores), "held_out": self.held})


def rows(photos: Sequence[np.ndarray], question: str, least: int) -> Dataset:
    """One row per photo: the question, the photo and its number. The photos themselves stay in memory.

    Where there are fewer than `least`, the photos of a step, they come more than once: less than a step is none at all.
    """
    pictures = [Image.fromarray(photo) for photo in photos]

    def fill(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        prompts = [[{"role": "user", "content": question}] for _ in batch["photo"]]
        return {**batch, "prompt": prompts, "image": [pictures[place] for place in batch["photo"]]}

    numbers = list(range(len(photos))) * math.ceil(least / len(photos))
    return Dataset.from_dict({"photo": numbers}).with_transform(fill)


def settings(run: Run, config: RunConfig, entry: ModelSpec, steps: int, longest: int) -> GRPOConfig:
    """TRL's settings."""
    large = torch.cuda.is_available() and entry.needs_gpu
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = config.photos_per_step * config.rollouts
    if config.photos_per_step % world:
        raise RunAborted(
            f"{config.photos_per_step} photos a step cannot be shared by {world} processes. Change the number."
        )
    return GRPOConfig(
        output_dir=str(run.folder),
        per_device_train_batch_size=batch // world,
        num_generations=config.rollouts,
        max_completion_length=longest,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, steps),
        beta=config.beta,
        temperature=config.temperature,
        max_grad_norm=1.0,
        seed=config.seed,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=large,
        gradient_checkpointing=large,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def trainer(run: Run, config: RunConfig, learner: PolicyBundle, scorer: Scorer, steps: int) -> GRPOTrainer:
    """The stock trainer, whose log-probabilities come from the policy."""
    longest = learner.policy.constraint.max_tokens if learner.policy.constraint else 64
    made = GRPOTrainer(
        model=learner.model,
        reward_funcs=[scorer],  # type: ignore[list-item]
        args=settings(run, config, learner.entry, steps, longest),
        train_dataset=rows(scorer.photos, learner.question, config.photos_per_step),
        processing_class=learner.processor,
    )
    made.remove_callback(PrinterCallback)
    # The trainer has laid its own log-probability pass, which knows no grammar, over the policy's.
    learner.policy.__dict__.pop("forward", None)
    return made


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what a killed process left half done is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2] or 0))
    while found:
        newest = found.pop()
        if all((newest / name).is_file() for name in CHECKPOINT_FILES) and _is_json(newest / CHECKPOINT_FILES[0]):
            return newest
        shutil.rmtree(newest, ignore_errors=True)
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def steps_of(config: RunConfig, photos: int) -> int:
    """Updates: as asked, or as many as the epochs take."""
    if config.epochs is None:
        return config.steps
    return max(1, round(config.epochs * photos / config.photos_per_step))


def keep_adapter(learner: PolicyBundle, run: Run) -> None:
    """Writes the adapter beside its place and moves it there whole."""
    part = run.folder / ".adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    learner.model.save_pretrained(part)
    shutil.rmtree(run.adapter, ignore_errors=True)
    os.replace(part, run.adapter)


def work(run: Run, config: RunConfig, phase: Callable[[str], None]) -> dict[str, Any] | None:
    """The whole run; None when it was cancelled. Raises Stop, and what rewards, trainer and disk raise."""
    phase("loading the model")
    learns = learner(config)
    phase("looking at the photos")
    try:
        photos, held_out = train_eval_split(config.photos, config.held_out, config.max_photos, config.seed)
    except CollectError as error:
        raise RunAborted(str(error)) from None
    print(f"Training on {photos.words()}. Judging by {held_out.words()}.", flush=True)
    steps = steps_of(config, len(photos.photos))
    function = config.reward_function
    scorer = Scorer(photos.photos, function, config.rollouts)
    teaches = trainer(run, config, learns, scorer, steps)
    first = teaches.accelerator.is_main_process
    phase("measuring the base")
    with learns.model.disable_adapter():
        base = learns.judged(held_out.photos) if first else []
    watch = RunCallback(run, config, learns, scorer, held_out)
    checkpoint = last_checkpoint(run.folder)
    if first:
        start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        run.forget_after(start)
        run.set_status(step=start, steps=steps)
        save_picture(held_out.photos[0], Recipe(), run.folder / "probe.png")
        if not checkpoint:
            watch.probe(0)
    teaches.add_callback(watch)
    phase("training")
    teaches.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    phase("writing")
    if first:
        keep_adapter(learns, run)
        draw_curve(run.metrics(), run.folder / "reward.png")
    if run.cancelled or not first:
        return None
    phase("measuring the tuned model")
    tuned = learns.judged(held_out.photos)
    return result(run, learns.entry.name, function, held_out, base, tuned)


def main() -> None:
    """Works on one run's folder, from its config to its result."""
    args = _arguments()
    run = Run(args.folder)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    try:
        _alone(run, _config(run, args), psutil.Process().create_time())
    except RunError as error:
        sys.exit(str(error))


def inside(run: Run) -> None:
    """Works on a run in this process, which has other things to do as well. The run's state says how it ended.

    What the process prints meanwhile is in the run's log, for Python can send it to one place only.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(run.folder / "log.txt", "a", encoding="utf-8"))
        for context in (contextlib.suppress(SystemExit), redirect_stdout(log), redirect_stderr(log)):
            stack.enter_context(context)
        _alone(run, run.config(), time.time())


def _alone(run: Run, config: RunConfig, since: float) -> None:
    """Does the run unless somebody else does it. `since`: when it began, as the clock has it. Raises SystemExit."""
    main_process = int(os.environ.get("RANK", "0")) == 0
    lock = FileLock(run.folder / "lock", timeout=LOCK_PATIENCE)
    try:
        if main_process:
            lock.acquire()
        _live(run, config, main_process, _way(config), since)
    except Timeout:
        sys.exit("Another process is working on this run already.")
    finally:
        lock.release()


def _way(config: RunConfig) -> Callable[..., dict[str, Any] | None]:
    """What does a run, by where it works."""
    if config.where == "hosted":
        from training.hosted import trainer as hosted

        return hosted.work
    return jobs.follow if config.where == "jobs" else work


def _live(
    run: Run,
    config: RunConfig,
    main_process: bool,
    do: Callable[..., dict[str, Any] | None] = work,
    since: float | None = None,
) -> None:
    """Does the run, here or on Hugging Face Jobs, and writes how it ended."""

    def phase(words: str) -> None:
        if main_process:
            run.set_status(phase=words)
            print(f"[{time.monotonic() - began:5.1f} s] {words}", flush=True)

    began = time.monotonic()
    if main_process:
        run.set_status(state="running", started=time.time(), ended=0.0, steps=config.steps, message="")
    try:
        found = do(run, config, phase)
    except BaseException as error:
        if main_process:
            _fail(run, error)
        raise SystemExit(1) from None
    if not main_process:
        return
    spent = {"seconds": time.time() - (since or psutil.Process().create_time()), "peak_memory_bytes": _peak_memory()}
    if found is None:
        run.set_status(state="cancelled", phase="", ended=time.time(), message="Cancelled. What it learned is kept.")
        print(json.dumps({"run": run.id, "state": "cancelled", "step": run.status().step, **spent}))
        return
    found = spent | found  # a job has measured itself
    write_whole(run.folder / "result.json", json.dumps(found, indent=1))
    run.set_status(state="done", phase="", ended=time.time(), message=found["alarm"])
    told = {"run": run.id, "state": "done", "base": found["base"]["total"], "tuned": found["tuned"]["total"]}
    told |= {key: found[key] for key in ("difference", "wins", *spent)}
    print(json.dumps(told))


def _fail(run: Run, error: BaseException) -> None:
    """Says in the run's state why it ended; on a full disk that may not be possible either."""
    if isinstance(error, RunAborted | RunError):
        words = str(error)
    elif isinstance(error, OSError) and error.errno == 28:
        words = "The disk is full. Free some space and resume: the last whole checkpoint is kept."
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        words = "It ran out of memory. Take fewer photos per step or fewer rollouts."
    elif isinstance(error, KeyboardInterrupt):
        words = "It was interrupted. Resume it."
    else:
        words = f"It failed ({type(error).__name__}). The log has the details."
        traceback.print_exception(error)
    print(words, file=sys.stderr)
    try:
        run.set_status(state="failed", phase="", ended=time.time(), message=words)
    except OSError:
        print("This could not be written to the run's folder either.", file=sys.stderr)


def _config(run: Run, args: argparse.Namespace) -> RunConfig:
    said = {key: value for key in ("base", "where", "hardware") if (value := getattr(args, key)) is not None}
    return RunConfig.make(**(run.config().model_dump() | said))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the run's folder, with its config.json")
    parser.add_argument("--base", help="another model to start from than the config says")
    parser.add_argument(
        "--where", choices=WHERE, help="on this machine, on Hugging Face Jobs, or hosted by Moondream's tuning API"
    )
    parser.add_argument("--hardware", help="of the job, by its name on the Hub (default: l4x1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def _peak_memory() -> int:
    """Bytes of main memory that this process held at most."""
    try:
        import resource
    except ImportError:  # not on Windows
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
