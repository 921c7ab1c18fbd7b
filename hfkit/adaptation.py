"""Further pretraining of a language model on a task's own text, before it gets its head (Gururangan et al., 2020,
arXiv:2004.10964): labels are not looked at, so unlabelled texts count as much as labelled ones."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

from hfkit.data.batches import packed_rows, plan_steps
from hfkit.data.prepare import prepare_data
from hfkit.evaluation import score_held_out
from hfkit.export import export_model
from hfkit.facts import Facts
from hfkit.files import write_atomic
from hfkit.losses import CausalLMLoss
from hfkit.model import build_causal_lm, check_isolation, loading, set_length
from hfkit.remote import resolve_model
from hfkit.run import Run
from hfkit.settings import BadInput, DataConfig, ModelConfig, RunConfig
from hfkit.tracking import read_metrics


def adapt_model(config: Any, texts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Train `config.adapt` steps of language modelling on the texts.

    Args:
        config: A recipe's settings: model, tokenizer, optim, train, adapt, output_dir, resume and seed.

    Returns:
        The folder of the adapted model, and what to report of it.

    Raises:
        BadInput: for an encoder, which reads both ways and so cannot learn to predict the next token.
    """
    if config.model.path is not None:
        _check_causal(config.model)
    folder = config.output_dir / "adapt"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    length = config.data.sequence_length
    text = DataConfig(train_files=str(folder / "texts.jsonl"), sequence_length=length, cache_dir=config.data.cache_dir)
    warm = config.optim.warmup_steps or 0  # chosen for the longer run that follows; one that fits holds for both
    own = RunConfig(
        data=text,
        tokenizer=config.tokenizer,
        model=config.model,
        optim=replace(config.optim, warmup_steps=None) if warm > config.adapt else config.optim,
        train=replace(
            config.train,
            max_steps=config.adapt,
            epochs=None,
            batch_stages=[],
            eval_every=0,
            save_every=0,
            average_checkpoints=0,
        ),
        output_dir=folder,
        resume="never" if config.resume == "never" else "auto",
        seed=config.seed,
    )
    base = resolve_model(own.model.path, own.model.revision) if own.model.path else None
    data = prepare_data(text, own.tokenizer, base)
    run = Run(own, Facts.of(data))
    model = build_causal_lm(own.model, data.tokenizer, own.seed)
    set_length(model.config, length)
    check_isolation(model, length)
    rows = sum(stream.num_rows(length) for stream in data.train)
    plan = plan_steps(own.train, rows, length, run.rank, run.world_size)
    run.set_up(CausalLMLoss(model), own.optim, plan, data.tokenizer)

    def evaluate(module: nn.Module) -> dict[str, float]:
        return score_held_out(run.accelerator, module, data, length)

    run.say(f"Adapting the language model to {len(texts)} texts of the task: {plan.max_steps} steps.")
    read = packed_rows(data.train, data.weights, length, plan.split, own.seed, last=plan.last)
    run.train(read, evaluate, evaluate_first=True)
    export_model(run.model, data.tokenizer, folder / "model", write=run.is_main)
    run.accelerator.wait_for_everyone()
    # Read back, since a run that was adapted earlier and resumed has evaluated nothing.
    lines = run.on_main(lambda: [line for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line])
    losses = {"eval_loss_before": lines[0]["eval_loss"], "eval_loss_after": lines[-1]["eval_loss"]}
    return str(folder / "model"), {"steps": plan.max_steps, "texts": len(texts), **losses}


def _check_causal(model: ModelConfig) -> None:
    """Raise BadInput for a model that is made to fill in masked tokens."""
    folder = resolve_model(str(model.path), model.revision)
    with loading(f"model.path {model.path}"):
        shape = AutoConfig.from_pretrained(folder)
    if type(shape) in MODEL_FOR_MASKED_LM_MAPPING:
        raise BadInput(
            f"adapt trains a model to predict the next token, and {model.path} is an encoder ({shape.model_type}); "
            "leave adapt out, or give a causal model"
        )
