"""One run: resume, train with checkpoints and figures, and leave the result; what every training recipe shares.

A recipe gives what differs: the data, the loss, how to evaluate and what to sample.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfkit.card import write_model_card
from hfkit.checkpoint import restore_model, restore_optimizer, save_checkpoint, state_writers, step_folder
from hfkit.compilation import checkpoint_blocks, compile_blocks
from hfkit.config import config_dict, save_config
from hfkit.data.batches import Plan, Reader
from hfkit.data.catalog import describe_named
from hfkit.export import Saved, export_description, export_model, has_weights
from hfkit.facts import Facts
from hfkit.files import digest_of, read_json, write_json
from hfkit.launch import PushFailed, build_accelerator, current_status, stopper
from hfkit.loop import Diverged, Hooks, Loop, Preempted, Progressed, Rhythm
from hfkit.losses import LossModule
from hfkit.model import count_parameters
from hfkit.optim import build_optimizer, build_schedule
from hfkit.passport import write_passport
from hfkit.publisher import Publisher
from hfkit.recorder import Recorder
from hfkit.remote import describe_model
from hfkit.report import write_report
from hfkit.resume import Found, choose_checkpoint, compare_identity, describe_identity, make_way, warmed_up
from hfkit.selection import Selection, steps_to_average
from hfkit.settings import BadInput, OptimConfig, RunConfig
from hfkit.sharding import gathered
from hfkit.status import as_text
from hfkit.tracking import flatten
from hfkit.yaml12 import read_yaml

MAX_FAILED_SAVES = 3  # in a row, before the run stops: it could lose more than it gains
DESCRIPTION = ".description"  # configuration and tokenizer, published beside a checkpoint's weights
NOTHING_HELD_OUT = "Note: nothing is held out for validation, so the figures are those of the training data."
Evaluate = Callable[[nn.Module], dict[str, float]]


class Run:
    """The state of a run that is not the model's: where it is, what it has done, what it writes."""

    def __init__(self, config: RunConfig, facts: Facts, select: str | None = None) -> None:
        """Start where the launcher put this process.

        Args:
            select: The evaluation's figure by which the best state becomes the result (the lower the better where it
                ends in `loss`); None makes it the last state.
        """
        self.config, self.facts, self.select = config, facts, select
        self.chosen: dict[str, Any] = {}
        self.accelerator = build_accelerator(config.train)
        self.output_dir = Path(config.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.progress = Progressed()
        self.start = 0  # step that this process goes on from
        self.began: dict[str, Any] = {}  # the checkpoint whose path `resume` was given, if it was
        self.failed_saves = 0
        self.saved = -1
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.recorder = Recorder(self.accelerator, self.output_dir)
        self.say, self.write_samples = self.recorder.say, self.recorder.write_samples
        if config.model.path and config.model.config_overrides:
            self.say("Note: model.config_overrides shape a new model, so they are not used: model.path has its shape.")
        if config.model.path and config.model.preset != type(config.model).preset:
            self.say(f"Note: model.preset {config.model.preset} is not used: model.path has its own shape.")
        self.hub = config.hub
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

    def set_up(self, module: LossModule, optim: OptimConfig, plan: Plan, tokenizer: Saved) -> None:
        """Prepare module and optimizer for this launch, and load the state that ``resume`` names.

        Args:
            module: The loss module.
        """
        self.plan, self.tokenizer = plan, tokenizer
        self.size = count_parameters(module.model)
        self.identity = describe_identity(
            self.config,
            optim,
            plan,
            shape_of(module.model),
            self.facts.data_key,
            self.facts.tokenizer_hash,
            **self.facts.identity,
        )
        source = self.on_main(lambda: choose_checkpoint(self.config, self.output_dir, self.identity))
        if source is not None:
            compare_identity(source[1]["identity"], self.identity, self.config.resume_accept, self.output_dir)
            self.on_main(lambda: make_way(self.output_dir, source))
            optim = replace(optim, warmup_steps=warmed_up(optim, plan.max_steps, source[1]))
        self.warmup_steps = optim.warmup_of(plan.max_steps)
        self.schedule = build_schedule(optim, plan.max_steps)
        self.recorder.measure(module.model, getattr(self.config.data, "sequence_length", 0))
        if self.config.train.activation_checkpointing:
            checkpoint_blocks(module)
        bf16 = self.accelerator.mixed_precision == "bf16"
        self.module, self.optimizer = self.accelerator.prepare(module, build_optimizer(module, optim, bf16))
        if source is not None:
            self._restore(source)
        if self._compiles():
            compile_blocks(self.accelerator.unwrap_model(self.module))
        self.selection = Selection(self.select or "eval_loss", self.progress)
        self._forget_lost_best()
        self._open_output(source[0] if source else None)

    def _restore(self, source: Found) -> None:
        """Load a checkpoint's weights, moments, counts and loss scale."""
        folder, manifest = source
        restore_model(folder, self.model)
        restore_optimizer(folder, self.model, getattr(self.optimizer, "optimizer", self.optimizer))
        self.progress = Progressed(**manifest["progress"])
        self.start = self.progress.step
        self.began = manifest.get("began", {})
        if self.accelerator.scaler is not None and manifest.get("scaler"):
            self.accelerator.scaler.load_state_dict(manifest["scaler"])

    def _compiles(self) -> bool:
        wanted = self.config.train.compile
        return self.accelerator.device.type == "cuda" if wanted is None else wanted

    def _open_output(self, source: Path | None) -> None:
        """Write what is known before the first step."""
        self.recorder.open(self.progress)
        if not self.is_main:
            return
        if source and (status := current_status()):
            status.update(checkpoint=str(source), step=self.progress.step)
        if self.progress.step < self.plan.max_steps:  # what an earlier end left is not of the steps to come
            (self.output_dir / "result.json").unlink(missing_ok=True)
            self._write_origin(source is not None)
        if self.facts.audit:
            write_json(self.output_dir / "audit.json", self.facts.audit)
        if self.hub.repo_id and self.hub.branch_every:
            export_description(self.model, self.tokenizer, self.output_dir / DESCRIPTION)
        self.recorder.start_trackers(self.config.tracking, config_dict(self.config))
        if source:
            self.say(f"Resuming from {source} at step {self.progress.step}.")
            if self.publisher and self.progress.step < self.plan.max_steps:
                self.publisher.catch_up(self.output_dir / DESCRIPTION, self.checkpoints)

    def _write_origin(self, resumed: bool) -> None:
        """Write settings and passport, which repeat the run: those of the command that makes the result."""
        save_config(self.config, self.output_dir / "config.yaml")
        write_passport(
            self.output_dir,
            data=self.facts.data | describe_named(self.config.data),
            tokenizer=self.facts.tokenizer,
            seed=self.config.seed,
            model=describe_model(self.config.model.path, self.config.model.revision),
            resumed_from=self.progress.step if resumed else None,
            num_processes=self.world_size,
        )

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
        config = self.config.train
        rhythm = Rhythm(
            self.plan.max_steps,
            log_every=config.log_every,
            eval_every=config.eval_every,
            save_every=config.save_every,
            push_every=(self.hub.push_every or 0) if self.hub.repo_id else 0,
            sample_every=config.sample_every,
            max_skipped_steps=config.max_skipped_steps,
        )
        hooks = Hooks(
            log=self.recorder.log_training,
            advance=self.recorder.advance,
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
        with self.recorder.training(self.plan.max_steps):
            if evaluate_first and self.progress.step == 0:
                self._evaluate(0, evaluate)
            stopper.deferred = True
            try:
                loop.run()
            except Preempted:
                self._finish_pushes(None)
                raise
            except Diverged:  # of a sweep, whose next point is a run of its own
                self.recorder.finish_trackers()
                raise

    def _evaluate(self, step: int, evaluate: Evaluate) -> None:
        with self.recorder.pause():
            self.evaluated = (step, self._look(evaluate))
        self.recorder.log_evaluation(*self.evaluated)
        if self.select and self.selection.note(*self.evaluated):
            self._save(step)

    def _sample(self, step: int, sample: Callable[[nn.Module, int], None] | None) -> None:
        if sample is not None:
            with self.recorder.pause(), gathered(self.module):
                sample(self.accelerator.unwrap_model(self.module), step)

    def _look(self, evaluate: Evaluate) -> dict[str, float]:
        """Return an evaluation's figures; it may call the module or what is inside."""
        with gathered(self.module):
            return evaluate(self.module)

    def _save(self, step: int) -> None:
        """Write a checkpoint; a full disk leaves the earlier ones and a warning, three in a row stop the run."""
        if self.saved == step:  # as the best so far, a moment ago
            return
        self.saved = step
        with self.recorder.pause():
            self.progress.seconds = self.recorder.throughput.seconds
            if self.evaluated[0] == step and not self.select:
                self.selection.note(*self.evaluated)
            writers = state_writers(self.model, getattr(self.optimizer, "optimizer", self.optimizer))
            facts = {
                "world_size": self.world_size,
                "data_key": self.facts.data_key,
                "config_hash": digest_of(config_dict(self.config)),
                "identity": self.identity,
                "began": self.began,
                "warmup_steps": self.warmup_steps,
                "progress": asdict(self.progress),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            }
            failed = [False]
            if self.is_main:
                try:
                    needed = [self.progress.best_step, self.began.get("step"), *self._steps_to_average(step)]
                    keep = self.config.train.keep_checkpoints
                    saved = save_checkpoint(self.checkpoints, step, writers, facts, keep, needed)
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

    def choose_result(self, evaluate: Evaluate) -> None:
        """Put the result into the model: the last state or, with ``select``, the best; or the mean of the last ones.

        The mean is tried where `train.average_checkpoints` asks for it, and taken where it is better on validation.
        """
        if not self.select:
            self._average_last(evaluate)
            return
        self._forget_lost_best()
        averaged = self._saved_to_average()
        self.chosen = self.selection.load_best(self.checkpoints, self.model, lambda: self._look(evaluate), averaged)
        self.evaluated = (-1, {})

    def _steps_to_average(self, step: int) -> list[int]:
        train = self.config.train
        return steps_to_average(step, self.plan.max_steps, train.save_every, train.average_checkpoints)

    def _saved_to_average(self) -> list[int]:
        """Return the steps to average whose checkpoints are here, and say where some are not."""
        wanted, average = self._steps_to_average(self.progress.step), self.config.train.average_checkpoints
        saved = self.on_main(lambda: [step for step in wanted if (self.checkpoints / step_folder(step)).is_dir()])
        if len(saved) < average:
            self.say(f"Note: train.average_checkpoints is {average}, and {len(saved)} were saved (train.save_every).")
        return saved

    def _average_last(self, evaluate: Evaluate) -> None:
        """Put the mean of the last checkpoints into the model where it is better than the last state."""
        averaged = self._saved_to_average()
        if len(averaged) < 2:
            return
        step = self.progress.step
        last = self.evaluated[1] if self.evaluated[0] == step else self._look(evaluate)
        self.selection.forget()
        self.selection.note(step, last)  # what the mean has to be better than
        if self.on_main(lambda: self.selection.is_lost(self.checkpoints)):
            self.say(f"warning: no mean of checkpoints, since that of step {step} is not here")
            return
        found = self.selection.load_best(self.checkpoints, self.model, lambda: self._look(evaluate), averaged)
        taken = "averaged_steps" in found
        self.say(f"The mean of the last checkpoints is {'' if taken else 'not '}better than the last state.")
        self.chosen = {"averaged_steps": found["averaged_steps"], "last_eval_loss": last["eval_loss"]} if taken else {}
        self.evaluated = (-1, {}) if taken else (step, last)

    def _forget_lost_best(self) -> None:
        if self.on_main(lambda: self.selection.is_lost(self.checkpoints)):
            self.selection.forget()

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
        same = [("steps", self.progress.step), ("averaged_steps", self.chosen.get("averaged_steps"))]
        complete = [result is not None and all(result.get(k) == v for k, v in same), has_weights(model_folder)]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(complete)
        if not complete[1] or not complete[0]:
            export_model(inner.finished_model(), self.tokenizer, model_folder, write=self.is_main, loader=loader)
        if not complete[0]:
            if self.evaluated[0] != self.progress.step:
                self.evaluated = (self.progress.step, self._look(evaluate))
            self._sample(self.progress.step, sample)
            figures = {"parameters": self.size.parameters, **self.recorder.final_figures()}
            result = {**figures, **self.evaluated[1], **self.chosen, **(extra or {})}
        if not self.is_main:
            return None
        assert result is not None
        if complete[0]:
            self._tell_unused()
        elif self.start == self.progress.step:  # otherwise written before the first step
            self._write_origin(resumed=True)
        write_json(self.output_dir / "result.json", result)
        write_report(self.output_dir)
        said = {"license": self.hub.license, "language": self.hub.language}  # maybe only now, of a finished run
        write_model_card(self.output_dir, self.hub.repo_id, said)
        print(as_text(result))
        self.say(f"The model is in {model_folder}, curves and samples in {self.output_dir / 'report.html'}.")
        self._finish_pushes(model_folder)
        self.recorder.finish_trackers()
        return result

    def _tell_unused(self) -> None:
        """Say which settings are not those of the result that is here, and so had no effect."""
        path, asked = self.output_dir / "config.yaml", flatten(config_dict(self.config))
        used = flatten(read_yaml(path)) if path.exists() else {}
        free = ("output_dir", "resume", "hub.", "tracking.")  # a finished run is published as it is asked for now
        unused = [key for key in used if asked.get(key) not in (None, used[key]) and not key.startswith(free)]
        if unused:
            self.say(f"Note: the run was finished before, so these had no effect: {', '.join(unused)}.")

    def _finish_pushes(self, model_folder: Path | None) -> None:
        """Publish the finished model, if asked to, and note how the pushes ended.

        Raises:
            Preempted: if the run was told to stop before the model was published; run again, it only pushes.
            PushFailed: if a push failed that was required.
        """
        if self.publisher is None:
            return
        outcome = self.publisher.finish(model_folder, must_end=lambda: stopper.requested)
        if status := current_status():
            status.update(push=outcome)
        if outcome != "failed" or model_folder is None:
            return
        if stopper.requested:
            raise Preempted("stopped while the finished model was being pushed")
        if self.hub.required:
            raise PushFailed(f"the push to {self.hub.repo_id} failed; everything is in {self.output_dir}")


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the fields of the model's configuration that a resumed run must share."""
    return {k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "use_cache")}
