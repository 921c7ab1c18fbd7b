"""Losses: modules that turn a batch into (summed loss, number of targets), the only thing the loop knows of a task.

Sums and counts, not means: divided by the number of targets of the whole optimizer step, the gradient is the same for
every split into processes and micro-batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfkit.adapters import is_quantized, merge_adapter
from hfkit.attention import isolation_mask, sliding_window, use_training_attention
from hfkit.data.shards import IGNORE_INDEX
from hfkit.products import multiply, use_faster_products

CHUNK = 1 << 22  # logits held at once; 4 M fp32 values are 16 MB, about a last-level cache
LEAST_ROWS = 128  # with fewer, adding to the weight's gradient takes longer than its product
CUDA_CHUNK = 1 << 28  # 1 GB: thousands of rows at a time, so that each product fills the device

Score = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


def score_rows(
    logits: Tensor, targets: Tensor, factor: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of rows of logits, and the gradient of ``factor`` times the objective, in fp32.

    The objective is the cross-entropy plus ``z_loss`` times log²Z, Z the sum of the exponentials of a row's logits: it
    keeps logits from drifting (Chowdhery et al., 2022, PaLM, arXiv:2204.02311, section 5). It is in the gradient alone,
    so that losses with and without it compare.

    Args:
        logits: (rows, vocabulary).
        targets: (rows,); ``IGNORE_INDEX`` where no loss is taken.
        factor: ().
        smoothing: Share of each target's probability that is spread evenly over the vocabulary.
        z_loss: Coefficient of log²Z.
    """
    scores = logits.float()
    counted = targets != IGNORE_INDEX
    wanted = targets.clamp(min=0)[:, None]
    expected = (1 - smoothing) * scores.gather(1, wanted)[:, 0]
    if smoothing:
        expected = expected + smoothing * scores.mean(1)
    gradient = scores.softmax(-1)  # probabilities …
    # The largest of them is 1 / Σ exp(score − largest score): the normaliser, without another pass through exp.
    normaliser = scores.amax(-1) - gradient.amax(-1).log()
    loss = ((normaliser - expected) * counted).sum()
    if z_loss:  # the derivative of log²Z is 2 log Z times the probabilities
        gradient = gradient.mul_((1 + 2 * z_loss * normaliser)[:, None])
    if smoothing:
        gradient = gradient.sub_(smoothing / gradient.shape[1])
    if torch.compiler.is_compiling():  # … minus targets: a comparison is fused with what is around it
        is_target = torch.arange(gradient.shape[1], device=gradient.device) == wanted
        return loss, (gradient - (1 - smoothing) * is_target) * (counted * factor)[:, None]
    gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, smoothing - 1.0))
    return loss, gradient.mul_((counted * factor)[:, None])


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of ``hidden @ weight.T`` against ``targets``, in chunks of rows.

    A share ``smoothing`` of each target's probability may be spread over the vocabulary, and a z-loss be added to the
    gradient. The forward pass makes the gradients as it goes, so that no (rows × vocabulary) tensor outlives its chunk
    and nothing is computed twice; the price is one gradient of ``hidden`` and one of ``weight`` kept until backward.
    Products run in the dtype of ``hidden``; the sum and the weight's gradient are fp32.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        upstream: float,
        smoothing: float,
        z_loss: float,
        with_gradients: bool,
        score: Score,
    ) -> Tensor:
        """See ``chunked_cross_entropy``; ``upstream`` is the factor that backward will receive, give or take."""
        matrix = weight.to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden if with_gradients else hidden[:0])
        make = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills it
        weight_gradient = make(weight if with_gradients else weight[:0], dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        factor = hidden.new_full((), upstream, dtype=torch.float32)
        rows_at_once = max(LEAST_ROWS, CHUNK // len(weight))
        if hidden.is_cuda:
            rows_at_once = max(LEAST_ROWS, CUDA_CHUNK // len(weight) // 128 * 128)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows_at_once):
                rows = hidden[start : start + rows_at_once]
                wanted = targets[start : start + rows_at_once]
                loss, gradient = score(multiply(rows, matrix), wanted, factor, smoothing, z_loss)
                total += loss
                if with_gradients:
                    # Scaled in fp32 before the cast: fp16 holds nothing below 6e-8, where most probabilities lie.
                    gradient = gradient.to(hidden.dtype)
                    hidden_gradient[start : start + rows_at_once] = multiply(gradient, matrix.T)
                    if hidden.dtype == torch.float32:
                        weight_gradient.addmm_(gradient.T, rows, beta=int(start > 0))
                    else:
                        product = (gradient.T @ rows).float()
                        weight_gradient = weight_gradient.add_(product) if start else product
        context.save_for_backward(hidden_gradient, weight_gradient)
        context.weight_dtype, context.upstream = weight.dtype, upstream
        return total

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out the gradients that the forward pass made."""
        hidden_gradient, weight_gradient = context.saved_tensors
        factor = upstream / context.upstream
        unseen = factor.is_cuda or torch.compiler.is_compiling()  # a GPU's host would have to wait for it
        if unseen or factor != 1:
            hidden_gradient, weight_gradient = hidden_gradient * factor, weight_gradient * factor
        return hidden_gradient, weight_gradient.to(context.weight_dtype), *6 * (None,)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: float = 1.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    score: Score = score_rows,
) -> Tensor:
    """Return the summed cross-entropy in nats.

    Args:
        hidden: (rows, width) last hidden states.
        weight: (vocabulary, width) output embedding.
        targets: (rows,) the id that each row should predict; ``IGNORE_INDEX`` where none.
        upstream: What the loss will be multiplied by before backward.
        smoothing: Share of each target's probability that is spread evenly over the vocabulary.
        z_loss: Coefficient of log²Z, whose gradient is added and whose value is not.
        score: ``score_rows``, or the same compiled.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if not hidden.is_cuda and not torch.compiler.is_compiling():  # a GPU's host would have to wait for the count
        counted = targets != IGNORE_INDEX
        if not counted.all():  # prompts and padding: no products for them
            hidden, targets = hidden[counted], targets[counted]
    with_gradients = torch.is_grad_enabled()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, upstream, smoothing, z_loss, with_gradients, score)


class LossModule(nn.Module):
    """A model and its task's loss in one module, so that DDP, FSDP and compile wrap both.

    ``forward`` of a task takes a batch and returns (summed loss in nats, number of targets).
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        use_faster_products(model)
        self.model = model
        self.upstream = 1.0  # set by the loop: what it multiplies the loss by
        self.score_rows: Score = score_rows
        self.own_rates: list[tuple[list[nn.Parameter], float]] = []  # parameters with a peak learning rate of their own
        self._no_split_modules = model._no_split_modules  # what FSDP wraps by; without it only the root is sharded
        # DDP cannot broadcast quantised weights at its start, and need not: every process rounds the same numbers.
        quantized = [f"model.{name}" for name, parameter in model.named_parameters() if is_quantized(parameter)]
        self._ddp_params_and_buffers_to_ignore = quantized

    def tie_weights(self) -> None:
        """Tie input and output embedding again (called when sharding has replaced the parameters)."""
        self.model.tie_weights()

    def finished_model(self) -> PreTrainedModel:
        """Return the model to save: without what only training needs."""
        return merge_adapter(self.model)


class TokenLoss(LossModule):
    """Cross-entropy of a model's next tokens, without ever holding all logits where its head is a plain product."""

    def __init__(self, model: PreTrainedModel, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        """Build the loss of ``model``.

        Args:
            label_smoothing: Share of each target's probability that is spread over the vocabulary, in training only.
            z_loss: Coefficient of log²Z, in the gradient only.
        """
        super().__init__(model)
        self.plain_head = has_plain_head(model)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def score(self, inputs: dict[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return (summed loss in nats, number of targets) of ``targets``, shifted already, given the model's inputs."""
        smoothing = self.label_smoothing if self.training else 0.0
        if self.plain_head:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # (rows, T, width)
            weight = self.model.get_output_embeddings().weight
            rows = hidden.flatten(0, 1)
            score = self.score_rows if self.training else score_rows
            loss = chunked_cross_entropy(rows, weight, targets.flatten(), self.upstream, smoothing, self.z_loss, score)
        else:
            logits = self.model(**inputs, use_cache=False).logits.float().flatten(0, 1)  # (rows * T, vocabulary)
            loss = nn.functional.cross_entropy(
                logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
            )
            if self.z_loss:
                squares = logits.logsumexp(-1)[targets.flatten() != IGNORE_INDEX].square().sum()
                loss = loss + self.z_loss * (squares - squares.detach())  # its gradient, and 0
        return loss, (targets != IGNORE_INDEX).sum()


class CausalLMLoss(TokenLoss):
    """Next-token loss of a causal model on packed or padded rows."""

    def __init__(self, model: PreTrainedModel, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        """See ``TokenLoss``; the model attends as ``hfkit.attention`` says from here on."""
        use_training_attention(model)
        keep_stream_narrow(model)
        super().__init__(model, label_smoothing, z_loss)

    def forward(self, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (summed loss in nats, number of targets).

        Args:
            input_ids: (rows, T).
            targets: (rows, T), shifted already; ``IGNORE_INDEX`` where no loss is taken.
            position_ids: (rows, T); where given, 0 begins a document and attention stays inside it. None is plain
                causal attention, which also suits rows that are padded on the right.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if position_ids is not None:
            config = self.model.config
            mask = isolation_mask(position_ids, config._attn_implementation, sliding_window(config))
            inputs |= {"position_ids": position_ids, "attention_mask": mask}
        return self.score(inputs, targets)


def keep_stream_narrow(model: PreTrainedModel) -> None:
    """Under bf16 autocast, embed into bf16: the residual stream, which else stays fp32, then has half the bytes.

    fp16 keeps it in fp32, since some trained models' streams go beyond 65,504.
    """

    def narrow(module: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        kind = embedded.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            return embedded.to(torch.bfloat16)
        return embedded

    model.get_input_embeddings().register_forward_hook(narrow)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just ``hidden @ weight.T``: tried, since some models scale, cap or shift them.

    The head is fed hidden states a thousand times as large, so that a cap shows however small the logits are now, and
    hidden states of zero, so that what is added shows however small it is.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or head.weight.device.type == "meta":
        return False
    if model.base_model is model:  # T5's, for one, keeps its hidden states to itself
        return False
    ids = torch.arange(4, device=head.weight.device)[None] % model.config.vocab_size
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    training = model.training
    model.eval()
    same = True
    with torch.no_grad():
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        for factor in (1e3, 0.0):
            scale = head.register_forward_pre_hook(lambda module, values, factor=factor: (values[0] * factor,))
            logits = model(**inputs, use_cache=False).logits
            same &= torch.allclose(factor * hidden @ head.weight.T, logits, rtol=1e-3, atol=1e-4 * factor)
            scale.remove()
    model.train(training)
    return same
