"""One run: resume, train with checkpoints and figures, and leave the result; what every training recipe shares.

A recipe gives what differs: the data, the loss, how to evaluate and what to sample.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hfkit.card import write_model_card
from hfkit.checkpoint import (
    average_models,
    list_checkpoints,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    state_writers,
    step_folder,
)
from hfkit.config import config_dict, save_config
from hfkit.data.batches import Plan, Reader
from hfkit.data.prepare import Prepared
from hfkit.export import export_description, export_model, has_weights
from hfkit.files import digest_of, read_json, write_atomic, write_json
from hfkit.launch import PushFailed, build_accelerator, current_status, stopper
from hfkit.loop import Hooks, Loop, Preempted, Progressed, Rhythm
from hfkit.losses import LossModule
from hfkit.model import count_parameters, flops_per_token
from hfkit.optim import build_optimizer, build_schedule
from hfkit.passport import write_passport
from hfkit.progress import Progress
from hfkit.publisher import FINISH_TIMEOUT, Publisher
from hfkit.report import write_report
from hfkit.resume import choose_checkpoint, compare_identity, describe_identity
from hfkit.settings import BadInput, HubConfig, OptimConfig, TrainConfig
from hfkit.status import describe
from hfkit.tracking import (
    MetricsLog,
    Throughput,
    compute_mfu,
    log_to_trackers,
    peak_flops,
    read_metrics,
    start_trackers,
)

MAX_FAILED_SAVES = 3  # in a row, before the run stops: it could lose more than it gains
DESCRIPTION = ".description"  # configuration and tokenizer, published beside a checkpoint's weights
PREEMPTED_PUSH = 10.0  # seconds for a push on its way when the run must stop
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass
class Facts:
    """What a run is, besides its settings: compared at resume, and written into its passport."""

    data_key: str
    tokenizer_hash: str
    identity: dict[str, Any] = field(default_factory=dict)
    """Task-specific settings that a resumed run must share."""
    data: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Prepared, **identity: Any) -> "Facts":
        """Return the facts of prepared text."""
        passport = {name: data.audit[name] for name in ("key", "sources", "splits", "removed", "provenance")}
        tokenizer = {"sha256": data.tokenizer_hash, **data.audit["tokenizer"]}
        if len(data.weights) > 1:
            identity = {"data.weights": data.weights, **identity}
        return cls(data.key, data.tokenizer_hash, identity, passport, tokenizer, data.audit)


class Run:
    """The state of a run that is not the model's: where it is, what it has done, what it writes."""

    def __init__(self, config: Any, facts: Facts, select: str | None = None) -> None:
        """Start where the launcher put this process.

        Args:
            select: The evaluation's figure by which the best state becomes the result (the lower the better where it
                ends in `loss`); None makes it the last state.
        """
        self.config, self.facts, self.select = config, facts, select
        self.chosen: dict[str, Any] = {}
        self.train_config: TrainConfig = config.train
        self.accelerator = build_accelerator(config.train)
        self.output_dir = Path(config.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.progress = Progressed()
        self.throughput = Throughput()
        self.failed_saves = 0
        self.saved = -1
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.log: MetricsLog | None = None
        self.bar: Progress | None = None
        self.hub: HubConfig = getattr(config, "hub", HubConfig())
        self.publisher = Publisher(self.hub, self.output_dir) if self.is_main else None

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """This process's number among those that share the data."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Processes that share the data."""
        return self.accelerator.num_processes

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside the loss module."""
        return self.accelerator.unwrap_model(self.module).model

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Return what ``action`` gives on the main process, on every process; bad input is raised on every one."""
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = action()
            except BadInput as error:
                found[1] = str(error)
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        if found[1]:
            raise BadInput(found[1])
        return found[0]

    def say(self, text: str) -> None:
        """Tell the person at the console."""
        if self.is_main:
            print(text, file=sys.stderr) if self.bar is None else self.bar.write(text)

    def set_up(self, module: LossModule, optim: OptimConfig, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare module and optimizer for this launch, and load the state that ``resume`` names.

        Args:
            module: The loss module.
        """
        self.plan, self.tokenizer = plan, tokenizer
        self.schedule = build_schedule(optim, plan.max_steps)
        self.size = count_parameters(module.model)
        self.flops = flops_per_token(module.model, getattr(self.config.data, "sequence_length", 0))
        shape = {
            k: v for k, v in module.model.config.to_dict().items() if k not in ("transformers_version", "use_cache")
        }
        self.identity = describe_identity(
            self.config, optim, plan, shape, self.facts.data_key, self.facts.tokenizer_hash, **self.facts.identity
        )
        source = self.on_main(lambda: choose_checkpoint(self.config, self.output_dir))
        if source is not None:
            compare_identity(source[1]["identity"], self.identity, self.config.resume_accept, self.output_dir)
        optimizer = build_optimizer(module, optim)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        if source is not None:
            restore_model(source[0], self.model)
            restore_optimizer(source[0], self.model, getattr(self.optimizer, "optimizer", self.optimizer))
            self.progress = Progressed(**source[1]["progress"])
            if self.accelerator.scaler is not None and source[1].get("scaler"):
                self.accelerator.scaler.load_state_dict(source[1]["scaler"])
        if self._compiles():
            self.accelerator.unwrap_model(self.module).compile()
        self._open_output(source[0] if source else None)

    def _compiles(self) -> bool:
        wanted = self.train_config.compile
        return self.accelerator.device.type == "cuda" if wanted is None else wanted

    def _open_output(self, source: Path | None) -> None:
        """Write what is known before the first step."""
        self.peak = peak_flops(self.accelerator.device)
        if not self.is_main:
            return
        if source and (status := current_status()):
            status.update(checkpoint=str(source), step=self.progress.step)
        if self.progress.step < self.plan.max_steps:  # figures of an earlier end are not those of the steps to come
            (self.output_dir / "result.json").unlink(missing_ok=True)
        save_config(self.config, self.output_dir / "config.yaml")
        write_passport(
            self.output_dir,
            data=self.facts.data,
            tokenizer=self.facts.tokenizer,
            seed=self.config.seed,
            resumed_from=self.progress.step if source else None,
            num_processes=self.world_size,
        )
        if self.facts.audit:
            write_json(self.output_dir / "audit.json", self.facts.audit)
        if self.hub.repo_id and self.hub.push_every:
            export_description(self.model, self.tokenizer, self.output_dir / DESCRIPTION)
        self.log = MetricsLog(self.output_dir / "metrics.jsonl", self.progress.step)
        start_trackers(
            self.accelerator, self.config.tracking, config_dict(self.config), self.output_dir, self.progress.step
        )
        if source:
            self.say(f"Resuming from {source} at step {self.progress.step}.")

    def train(
        self,
        read: Reader,
        evaluate: Evaluate,
        sample: Callable[[nn.Module, int], None] | None = None,
        evaluate_first: bool = False,
    ) -> None:
        """Train to the last step, evaluating, sampling and saving when due.

        Args:
            evaluate_first: Evaluate before the first step too: what fine-tuning is measured against.
        """
        config = self.train_config
        rhythm = Rhythm(
            self.plan.max_steps,
            log_every=config.log_every,
            eval_every=config.eval_every,
            save_every=config.save_every,
            push_every=(self.hub.push_every or 0) if self.hub.repo_id else 0,
            sample_every=config.sample_every,
            max_skipped_steps=config.max_skipped_steps,
        )
        self.throughput = Throughput(self.progress.seconds, self.progress.logged_at)
        hooks = Hooks(
            log=self._log_training,
            advance=self._advance,
            evaluate=lambda step: self._evaluate(step, evaluate),
            save=self._save,
            sample=lambda step: self._sample(step, sample),
            should_stop=lambda: stopper.requested,
        )
        loop = Loop(
            self.accelerator,
            self.module,
            self.optimizer,
            read,
            self.schedule,
            rhythm,
            self.progress,
            hooks,
            self.config.seed,
            self.config.optim.max_grad_norm,
        )
        if evaluate_first and self.progress.step == 0:
            self._evaluate(0, evaluate)
        stopper.deferred = True
        with Progress(self.plan.max_steps, "train", "step", self.progress.step, enabled=self.is_main) as self.bar:
            try:
                loop.run()
            except Preempted:
                self._finish_pushes(None, timeout=PREEMPTED_PUSH)
                raise
        self.bar = None

    def _advance(self, step: int, loss: float) -> None:
        if self.bar is not None:
            self.bar.update(1, loss=loss)
        if status := current_status():
            status.update(step=step)

    def _log_training(self, figures: dict[str, Any]) -> None:
        window = figures.pop("window_tokens")
        self.throughput.add(window)
        speed, seconds = self.throughput.read(), self.throughput.seconds
        self.progress.seconds = self.progress.logged_at = seconds
        line = {**figures, "tokens": self.progress.tokens, "tokens_per_second": speed, "seconds": seconds}
        if (mfu := compute_mfu(self.flops, speed, self.peak, self.world_size)) is not None:
            line["mfu"] = mfu
        self._write(line)
        if self.bar is not None:
            self.bar.update(0, learning_rate=figures["learning_rate"], tokens_per_second=speed)

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(line)
            log_to_trackers(self.accelerator, line)

    def _evaluate(self, step: int, evaluate: Evaluate) -> None:
        with self.throughput.pause():
            figures = evaluate(self.module)
        self.evaluated = (step, figures)
        self._write({"step": step, **figures})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))
        self.say(f"Evaluation after step {step}: {shown}")
        if self.select and self._note_best():
            self._save(step)

    def _note_best(self) -> bool:
        """Remember the step just evaluated if it is the best so far."""
        step, figures = self.evaluated
        value = figures.get(self.select or "eval_loss")
        if value is None or not self._beats_best(value):
            return False
        self.progress.best, self.progress.best_step = value, step
        return True

    def _beats_best(self, value: float) -> bool:
        best = self.progress.best
        return best is None or (value < best if (self.select or "eval_loss").endswith("loss") else value > best)

    def _sample(self, step: int, sample: Callable[[nn.Module, int], None] | None) -> None:
        if sample is not None:
            with self.throughput.pause():
                sample(self.accelerator.unwrap_model(self.module), step)

    def _save(self, step: int) -> None:
        """Write a checkpoint; a full disk leaves the earlier ones and a warning, three in a row stop the run."""
        if self.saved == step:  # as the best so far, a moment ago
            return
        self.saved = step
        with self.throughput.pause():
            self.progress.seconds = self.throughput.seconds
            if self.evaluated[0] == step and not self.select:
                self._note_best()
            writers = state_writers(self.model, getattr(self.optimizer, "optimizer", self.optimizer))
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            failed = [False]
            if self.is_main:
                facts = {
                    "world_size": self.world_size,
                    "data_key": self.facts.data_key,
                    "config_hash": digest_of(config_dict(self.config)),
                    "identity": self.identity,
                    "progress": asdict(self.progress),
                    "scaler": scaler,
                }
                try:
                    keep = self.train_config.keep_checkpoints
                    saved = save_checkpoint(self.checkpoints, step, writers, facts, keep, self.progress.best_step)
                    self.failed_saves = 0
                    if status := current_status():
                        status.update(checkpoint=str(saved))
                    if self.publisher and self.publisher.due(step):
                        self.publisher.submit(self.output_dir / DESCRIPTION, step, saved)
                except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
                    self.failed_saves += 1
                    self.say(f"warning: no checkpoint at step {step}: {error}; the one before it stays")
                    failed[0] = self.failed_saves >= MAX_FAILED_SAVES
            if self.world_size > 1:
                torch.distributed.broadcast_object_list(failed)
            if failed[0]:
                raise OSError(f"{MAX_FAILED_SAVES} checkpoints in a row could not be written; see the warnings above")

    def write_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        """Print what the model says after ``step`` steps, and keep it for the report."""
        if not self.is_main:
            return
        path = self.output_dir / "samples.jsonl"
        rows = [row for row in read_lines(path) if row["step"] < step]
        rows += [{"step": step, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for prompt, text in zip(prompts, texts, strict=True):
            self.say(f"\n  {prompt} → {text.strip()}")

    def choose_best(self, evaluate: Evaluate, average: int = 0) -> None:
        """Put the best state on validation into the model, or the mean of the last checkpoints where that is better.

        Args:
            average: How many of the last checkpoints to average; 0 tries no mean.
        """
        best = self.checkpoints / step_folder(self.progress.best_step or 0)
        self.chosen = {"best_step": self.progress.best_step, f"best_{self.select}": self.progress.best}
        last = list_checkpoints(self.checkpoints)[-average:] if average else []
        if last:
            average_models(last, self.model)
            mean = evaluate(self.module)[str(self.select)]
            if self._beats_best(mean):
                self.chosen = {"averaged_steps": [int(path.name[5:]) for path in last], f"best_{self.select}": mean}
        if "best_step" in self.chosen and best.is_dir():
            restore_model(best, self.model)
        self.evaluated = (-1, {})

    def finish(
        self,
        evaluate: Evaluate,
        sample: Callable[[nn.Module, int], None] | None = None,
        extra: dict[str, Any] | None = None,
        loader: Any = AutoModelForCausalLM,
    ) -> dict[str, Any] | None:
        """Export the model and write the result and the report; return the result on the main process.

        On a run that was finished before, only what is missing is made again.
        """
        result = read_json(self.output_dir / "result.json")
        model_folder = self.output_dir / "model"
        inner = self.accelerator.unwrap_model(self.module)
        complete = [bool(result and result.get("steps") == self.progress.step), has_weights(model_folder)]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(complete)
        if not complete[1] or not complete[0]:
            export_model(inner.finished_model(), self.tokenizer, model_folder, write=self.is_main, loader=loader)
        if not complete[0]:
            if self.evaluated[0] != self.progress.step:
                self.evaluated = (self.progress.step, evaluate(self.module))
            self._sample(self.progress.step, sample)
            result = {**self._figures(), **self.evaluated[1], **self.chosen, **(extra or {})}
        if not self.is_main:
            return None
        assert result is not None
        write_json(self.output_dir / "result.json", result)
        write_report(self.output_dir)
        write_model_card(self.output_dir, self.hub.repo_id)
        print(describe(result))
        self.say(f"The model is in {model_folder}, curves and samples in {self.output_dir / 'report.html'}.")
        self._finish_pushes(model_folder)
        self.accelerator.end_training()
        return result

    def _finish_pushes(self, model_folder: Path | None, timeout: float = FINISH_TIMEOUT) -> None:
        """Publish the finished model, if asked to, and note how the pushes ended.

        Raises:
            PushFailed: if one failed that was required.
        """
        if self.publisher is None:
            return
        outcome = self.publisher.finish(model_folder, timeout)
        if status := current_status():
            status.update(push=outcome)
        if outcome == "failed" and self.hub.required and model_folder is not None:
            raise PushFailed(f"the push to {self.hub.repo_id} failed; everything is in {self.output_dir}")

    def _figures(self) -> dict[str, Any]:
        lines = [line for line in self._lines() if "loss" in line]
        seconds = self.progress.seconds
        return {
            "parameters": self.size.parameters,
            "tokens": self.progress.tokens,
            "steps": self.progress.step,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(self.progress.tokens / seconds, 1) if seconds else None,
            "train_loss": lines[-1]["loss"] if lines else None,
            "skipped_steps": self.progress.skipped,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.output_dir / "metrics.jsonl") if self.is_main else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file of our own; none where it is missing."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
