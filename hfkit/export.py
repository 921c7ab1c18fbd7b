"""The result of a run: a model folder that loads with plain transformers, and nothing else."""

import copy
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfkit.checkpoint import model_tensors
from hfkit.files import replace_folder, sync


class Saved(Protocol):
    """A tokenizer, or what holds several."""

    def save_pretrained(self, folder: Any, /) -> Any:
        """Write all files into a model's folder."""


def export_model(
    model: PreTrainedModel,
    tokenizer: Saved,
    folder: Path,
    *,
    write: bool,
    loader: Any = AutoModelForCausalLM,
) -> None:
    """Replace ``folder`` by the model as ``save_pretrained`` writes it, once it has loaded back with equal weights.

    Args:
        model: Unwrapped; its parameters may be sharded, so every process calls this.
        write: Whether this process writes.
        loader: The Auto class that users will load it with.
    """
    tensors = model_tensors(model)
    if not write:
        return
    temporary = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    config = copy.deepcopy(model.config)
    saved = _with_tied(model, tensors)
    model.config.use_cache = True  # off while training; a loaded model should generate with its cache
    try:
        model.save_pretrained(temporary, state_dict=saved)
    finally:
        model.config.use_cache = config.use_cache
    tokenizer.save_pretrained(temporary)
    loaded = loader.from_pretrained(temporary, dtype=torch.float32, trust_remote_code=False)
    for name, parameter in loaded.named_parameters():
        if not torch.equal(parameter, tensors[name].to(parameter.dtype)):
            raise RuntimeError(f"{name} did not come back from the saved model as it was")
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    replace_folder(temporary, folder)


def has_weights(folder: Path) -> bool:
    """Whether a model folder is there with its configuration and weights."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def export_description(model: PreTrainedModel, tokenizer: Saved, folder: Path) -> None:
    """Write everything of a model folder but its weights."""
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(model.config)
    config.use_cache = True
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _with_tied(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict with every tied name pointing at the one full tensor."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: tensors[first.get(id(value), name)] for name, value in model.state_dict(keep_vars=True).items()}
