"""What fine-tuning puts on a model while it trains and takes off again: LoRA matrices, noise on the embeddings."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkit.settings import AdapterConfig, BadInput

ADAPTER = "default"


def attach_adapter(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Put LoRA matrices beside the model's linear layers, where ``config`` asks for them; they alone are trained.

    LoRA adds (alpha / rank) · B·A to a frozen weight (Hu et al., 2021, arXiv:2106.09685, equation 3). B starts at
    zero, so the model says what it said before.

    Raises:
        BadInput: if peft is not installed, or the model has no layers of the names given.
    """
    if not config.rank:
        return
    try:
        from peft import LoraConfig
    except ImportError:
        raise BadInput("adapter.rank needs peft: pip install 'hfkit[peft]'") from None
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        base_model_name_or_path=model.name_or_path or None,
    )
    try:
        model.add_adapter(lora, ADAPTER)
    except ValueError as error:
        raise BadInput(f"adapter.target_modules: {' '.join(str(error).split())[:200]}") from None


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
    """Return a copy with the LoRA matrices added into the weights; the model itself, where it has none."""
    if not has_adapter(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses a merge that is not finite
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
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
