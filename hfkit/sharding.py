"""What a sharded model (FSDP2) needs so that its inside can be called, as sampling and prediction do."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold the root's own weights (embedding, last norm, head) whole inside a ``with`` block; every process enters it.

    A layer gathers its weights by itself when it is called, the root only when the call goes through it. A module that
    is not sharded is left alone.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module._get_fsdp_state()._lazy_init()  # or a layer that is called before the root was takes itself for the root
    module.set_reshard_after_forward(False, recurse=False)  # or the first pass through the root would scatter them
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
