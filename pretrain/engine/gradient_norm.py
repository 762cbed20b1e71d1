"""The norm of the gradient where DeepSpeed does not tell it."""

from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm


def note_gradient_norm(engine: Any) -> None:
    """Make `engine.get_global_grad_norm()` tell the norm before clipping at every stage.

    DeepSpeed's own optimisers know it. At stage 0 in float32 the optimiser is torch's, and the norm
    that DeepSpeed clips by is forgotten.
    """
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            engine.module.parameters(), engine.gradient_clipping()
        )

    def note(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if not engine.gradient_clipping():
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            engine._global_grad_norm = get_total_norm(gradients)

    engine.clip_fp32_gradients = clip
    engine.optimizer.register_step_pre_hook(note)
