"""Direct preference optimisation: a loss on pairs of answers that raises the chosen one against the rejected one.

−log σ(β · ((log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected)))), where π_ref is the model
before training (Rafailov et al., 2023, arXiv:2305.18290, equation 7). The reference's log-probabilities are computed
once, before the first step, so that training holds one model and not two.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hfkit.chat import Encoded
from hfkit.data.batches import Batch, Reader, Split, Step
from hfkit.data.order import EMPTY, share_of_rank, shuffle
from hfkit.data.shards import IGNORE_INDEX
from hfkit.files import digest_of
from hfkit.losses import LossModule

EncodedPair = tuple[Encoded, Encoded]  # chosen and rejected: conversations of which the last answer alone is learnt


def answer_log_probs(model: PreTrainedModel, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each row's targets together.

    Args:
        input_ids: (rows, T), padded on the right.
        targets: (rows, T), shifted already; ``IGNORE_INDEX`` where none.

    Returns:
        (rows,) fp32.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits.float()  # (rows, T, vocabulary)
    nats = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return -nats.sum(-1)


class PreferenceLoss(LossModule):
    """DPO on rows of which even ones are chosen and odd ones, each after its own, rejected."""

    def __init__(self, model: PreTrainedModel, beta: float) -> None:
        super().__init__(model)
        self.beta = beta

    def margins(self, input_ids: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        """Return (pairs,): how much more than the reference the model prefers each chosen answer, in nats."""
        gains = answer_log_probs(self.model, input_ids, targets) - reference
        return gains[0::2] - gains[1::2]

    def forward(self, input_ids: Tensor, targets: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return (summed loss in nats, number of pairs).

        Args:
            reference: (rows,) log-probability of each row's targets under the reference.
        """
        present = (targets[0::2] != IGNORE_INDEX).any(-1)  # the rows that fill a short last step are no pair
        losses = -functional.logsigmoid(self.beta * self.margins(input_ids, targets, reference))
        return (losses * present).sum(), present.sum()


class PreferencePairs:
    """Pairs as batches, with the reference's log-probabilities once they are known."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        self.pairs = pairs
        self.reference = np.zeros((len(pairs), 2), dtype=np.float32)

    def digest(self) -> str:
        """Return what identifies the pairs: their tokens, and which of them are learnt."""
        return digest_of([[(each.ids.tolist(), each.learnt.tolist()) for each in pair] for pair in self.pairs])

    def compute_reference(self, accelerator: Accelerator, model: PreTrainedModel, batch_size: int = 8) -> None:
        """Fill ``reference`` with what the model says now; each process takes its share of the pairs."""
        model = model.to(accelerator.device).eval()
        found = torch.zeros(len(self.pairs), 2, device=accelerator.device)
        mine = np.arange(accelerator.process_index, len(self.pairs), accelerator.num_processes)
        with torch.no_grad(), accelerator.autocast():
            for start in range(0, len(mine), batch_size):
                numbers = mine[start : start + batch_size]
                batch = self.collate(numbers)
                rows = (batch[name].to(accelerator.device) for name in ("input_ids", "targets"))
                found[torch.from_numpy(numbers)] = answer_log_probs(model, *rows).view(-1, 2)
        self.reference = accelerator.reduce(found, "sum").cpu().numpy()

    def reader(self, split: Split, seed: int, last: int | None = None) -> Reader:
        """Return step → this process's pairs; ``last`` is the total of pairs, where that is no whole step."""

        def read(step: int) -> Step:
            chosen = shuffle(split.positions(step, last), len(self.pairs), seed)
            shares = split.share(len(chosen))
            batches = [self.collate(np.where(slots == EMPTY, EMPTY, chosen[slots])) for slots in shares]
            tokens = sum(len(each.ids) - 1 for number in chosen for each in self.pairs[number])
            return Step(batches, len(chosen), tokens, f"pairs {', '.join(map(str, chosen[:8]))}")

        return read

    def every_pair(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this process's share of all pairs once; every process yields as many batches."""
        for slots in share_of_rank(np.arange(len(self.pairs)), rank, world_size, batch_size):
            yield self.collate(slots)

    def collate(self, numbers: np.ndarray) -> Batch:
        """Return the batch of some pairs; an ``EMPTY`` number gives two rows without targets."""
        nothing = Encoded(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=bool))
        rows = [each for n in numbers for each in (self.pairs[n] if n != EMPTY else (nothing, nothing))]
        shape = (len(rows), max(len(each.ids) for each in rows) - 1)
        ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, (tokens, learnt) in enumerate(rows):
            ids[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = np.where(learnt[1:], tokens[1:], IGNORE_INDEX)
        reference = np.where((numbers == EMPTY)[:, None], 0, self.reference[numbers]).astype(np.float32).reshape(-1)
        arrays = {"input_ids": ids, "targets": targets, "reference": reference}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@torch.no_grad()
def score_preferences(
    accelerator: Accelerator, module: nn.Module, pairs: PreferencePairs, batch_size: int = 8
) -> dict[str, float]:
    """Return the mean loss and margin, and the share of pairs whose chosen answer gained more (ties count half)."""
    inner = accelerator.unwrap_model(module)
    inner.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for batch in pairs.every_pair(batch_size, accelerator.process_index, accelerator.num_processes):
        moved = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        present = (moved["targets"][0::2] != IGNORE_INDEX).any(-1)
        with accelerator.autocast():  # as the reference was read
            margins = inner.margins(**moved)[present].double()
        losses = -functional.logsigmoid(inner.beta * margins)
        won = (margins > 0).double() + (margins == 0).double() / 2
        sums += torch.stack([losses.sum(), won.sum(), margins.sum(), present.sum().double()])
    loss, won, margin, count = accelerator.reduce(sums, "sum").tolist()
    return {"eval_loss": loss / count, "accuracy": won / count, "margin": margin / count, "eval_pairs": round(count)}
