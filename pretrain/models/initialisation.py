"""Initial weights shared by the transformer towers."""

from torch import nn


def init_linear_and_norm(module: nn.Module) -> None:
    """Linear: truncated normal with std 0.02, bias 0. LayerNorm: 1 and 0. For `nn.Module.apply`.

    Runs when a model is built, before ZeRO-3 partitions its parameters.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
