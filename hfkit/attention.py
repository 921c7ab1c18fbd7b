"""How a model attends while it trains: causally without a mask, and documents of one row apart from each other.

transformers builds a causal mask whenever a model is compiled, because a traced graph cannot look at ``position_ids``
to see that none is needed. A mask costs the causal kernels: half of the work that they skip, and on a GPU the flash
kernel itself. The attention registered here is SDPA that takes no mask where rows are plain; padding, sliding windows
and caches, which generation meets, get the mask that SDPA would get.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hfkit_sdpa"  # never saved: a configuration keeps no attention implementation


def use_training_attention(model: PreTrainedModel) -> None:
    """Let a causal model that attends through SDPA take no mask for plain rows, compiled or not."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **rest: Any
) -> tuple[Tensor, None]:
    """Return what the heads read, (rows, T, heads, head size), in the form that transformers' models call."""
    scaling, window = rest.get("scaling"), rest.get("sliding_window")  # this layer's: full layers have none
    if isinstance(attention_mask, BlockMask):
        windowed = getattr(attention_mask, "windowed", attention_mask) if window else attention_mask
        return _attend_in_blocks(query, key, value, windowed, scaling), None
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return _attend_apart(query, key, value, attention_mask, scaling, rest.get("dropout", 0.0), window), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)


@torch.compiler.disable
def _attend_apart(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attend causally within one document after the other: nothing that a mask would hide is computed."""
    lengths = borders.flatten().diff().tolist()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    documents = zip(*(each.transpose(1, 2).flatten(0, 1).split(lengths) for each in (query, key, value)), strict=True)
    read = []
    for document in documents:
        q, k, v = (part.transpose(0, 1)[None] for part in document)  # (1, heads, tokens, head size)
        mask = _window_mask(q.shape[2], window, q.device) if window and q.shape[2] > window else None
        own = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout
        )
        read.append(own[0].transpose(0, 1))
    rows, heads, length, _ = query.shape
    return torch.cat(read).view(rows, length, heads, value.shape[-1])


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return where a token is among the ``window`` last ones, itself included: (length, length) bool."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    # Autocast narrows what SDPA is given, but knows nothing of this function; rotated queries may be wider than values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    alone = query.is_cuda and not torch.compiler.is_compiling()  # uncompiled it would hold (rows, heads, T, T)
    flex = _compiled_flex_attention() if alone else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return flex(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped).transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def mask_unless_plain(
    q_length: int, kv_length: int, attention_mask: Tensor | None = None, local_size: int | None = None, **rest: Any
) -> Tensor | None:
    """Return no mask for plain causal rows, and SDPA's for every other use."""
    if attention_mask is None and local_size is None and q_length == kv_length:
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, local_size=local_size, **rest
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_unless_plain)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens the model's sliding layers see, the current one included; None where all layers see all.

    >>> from transformers import LlamaConfig, MistralConfig, Qwen3Config
    >>> [sliding_window(kind()) for kind in (MistralConfig, LlamaConfig, Qwen3Config)]  # Qwen3's is off by default
    [4096, None, None]
    """
    return getattr(config, "sliding_window", None)


def isolation_mask(position_ids: Tensor, attention: str, window: int | None = None) -> Tensor | BlockMask:
    """Return the mask under which a token sees its own document's earlier tokens and itself.

    Args:
        position_ids: (rows, T); 0 begins a document.
        attention: The implementation's name. Ours takes, on CUDA, a block mask, whose kernel skips what is masked, and
            on a CPU the documents' borders; SDPA takes a bool mask (rows, 1, T, T); ``eager`` adds the mask to its
            scores, so it needs −inf.
        window: How far back the model's sliding layers see, this token included. Ours alone tells these layers from
            full ones: see ``hfkit.model.check_isolation``.
    """
    document = (position_ids == 0).cumsum(-1)  # (rows, T)
    if attention == NAME:
        return block_masks(document, window) if position_ids.is_cuda else document_borders(position_ids)
    length = position_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


def document_borders(position_ids: Tensor) -> Tensor:
    """Return where documents begin in the rows laid end to end, and where the last one ends.

    Returns:
        (1, 1, 1, documents + 1) int64: transformers hands on whatever has a mask's four dimensions.
    """
    begins = position_ids == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])])[None, None, None]


def block_masks(document: Tensor, window: int | None, *, compiled: bool = True) -> BlockMask:
    """Return the mask of full layers, which carries that of sliding layers where rows are longer than the window.

    Every layer is handed the one mask that the model is given; transformers hands on whatever has four dimensions.

    Args:
        document: (rows, T) number of each token's document within its row.
        window: As in ``isolation_mask``.
        compiled: Whether to compile the search for blocks, which else holds a (rows, T, T) tensor.
    """
    mask = block_mask(document, compiled=compiled)
    if window and window < document.shape[1]:
        mask.windowed = block_mask(document, window, compiled=compiled)  # type: ignore[attr-defined]
    return mask


def block_mask(document: Tensor, window: int | None = None, *, compiled: bool = True) -> BlockMask:
    """Return causal attention inside documents, as blocks of which the kernel visits only those that hold something."""
    rows, length = document.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (query >= key) & (document[row, query] == document[row, key])
        return own & (query - key < window) if window else own

    mask = create_block_mask(sees, rows, None, length, length, device=document.device, _compile=compiled)
    mask.ndim = 4  # type: ignore[attr-defined]  # GPT-2 asks
    return mask
