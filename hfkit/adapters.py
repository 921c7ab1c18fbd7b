"""What fine-tuning puts on a model while it trains and takes off again: LoRA matrices beside its weights, which may be
quantised, and noise on the embeddings."""

import copy
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from hfkit.settings import AdapterConfig, BadInput

ADAPTER = "default"


def attach_adapter(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Put LoRA matrices beside the model's linear layers, where ``config`` asks for them; they alone are trained.

    LoRA adds (alpha / rank) · B·A to a frozen weight (Hu et al., 2021, arXiv:2106.09685, equation 3). B starts at
    zero, so the model says what it said before. With `quantize`, the frozen weights are rounded to 8 bits each, with a
    scale a row, and the matrices learn beside what is left (QLoRA, with 4: Dettmers et al., 2023, arXiv:2305.14314).

    Raises:
        BadInput: if the model has no layers of the names given, they share their weights with other layers, or they
            cannot be quantised.
    """
    if not config.rank:
        return
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise BadInput("LoRA's frozen weights are not sharded: launch with ddp.yaml, or train without adapter")
    from peft import LoraConfig

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        base_model_name_or_path=model.name_or_path or None,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # refused below, in one line
            model.add_adapter(lora, ADAPTER)
    except ValueError as error:
        raise BadInput(f"adapter.target_modules: {' '.join(str(error).split())[:200]}") from None
    _check_own_weights(model)
    if config.quantize == "int8":
        _quantize_base(model)


def _check_own_weights(model: PreTrainedModel) -> None:
    """Raise BadInput for a layer whose weight another one has too: merged, its matrices would change both."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in _adapted(model):
        if uses[id(layer.get_base_layer().weight)] > 1:
            raise BadInput(
                f"adapter.target_modules: {name} has its weight in common with another layer (tied embeddings), so "
                "that merging would change both; leave it out"
            )


def _quantize_base(model: PreTrainedModel) -> None:
    """Hold in 8 bits the weights that have LoRA matrices beside them."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for name, layer in _adapted(model):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise BadInput(f"adapter.quantize: {name} is a {type(base).__name__}, and only linear layers have 8 bits")
        quantize_(base, Int8WeightOnlyConfig())


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is held as small integers and scales (a DTensor too wraps others, but is sharded)."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def stored_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that hold a parameter: itself, or the integers and scales of a quantised one."""
    if not is_quantized(tensor):
        return {name: tensor}
    parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {f"{name}.{part}": getattr(tensor, part) for part in parts}


def _adapted(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the layers that have LoRA matrices, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether LoRA matrices are on the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the LoRA matrices alone, as peft reads them."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    save_file(
        {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    model.peft_config[ADAPTER].save_pretrained(str(folder))


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with the LoRA matrices added into the weights; the model itself, where it has none.

    Quantised weights are numbers again first: what is saved is a plain model that says what the trained one said.
    """
    if not has_adapter(model):
        return model
    merged = copy.deepcopy(model)
    for name, layer in _adapted(merged):
        base = layer.get_base_layer()
        if is_quantized(base.weight):
            base.weight = nn.Parameter(base.weight.dequantize())
        layer.merge(safe_merge=True)  # refuses a merge that is not finite
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, base)
    merged._hf_peft_config_loaded = False
    del merged.peft_config
    return merged.requires_grad_(True)


def add_embedding_noise(model: PreTrainedModel, alpha: float) -> None:
    """Add uniform noise of ±alpha / sqrt(length · width) to the input embeddings, in training only.

    (NEFTune; Jain et al., 2023, arXiv:2310.05914, algorithm 1.) The length is the packed row's.
    """

    def add(module: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        size = alpha / (embedded.shape[-2] * embedded.shape[-1]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(add)
