"""The running average of a module's trained weights; what is frozen is shared with it, not copied.

In: a module after each step. Out: `Averaged.module`, of the same form, with averaged weights. Knows no loop and no
files.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Averaged:
    """w' = decay * w' + (1 - decay) * w for every weight that requires a gradient; the first update copies.

    Buffers are the module's own of now. `begun` is True once there is something to average with.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        shared = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.module, self.begun = copy.deepcopy(module, shared), False
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of now."""
        mine = [p for p in self.module.parameters() if p.requires_grad]
        theirs = [p for p in module.parameters() if p.requires_grad]
        if self.begun:
            self._update(mine, theirs, None)
        else:
            torch._foreach_copy_(mine, theirs)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)
        self.begun = True
