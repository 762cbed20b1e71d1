"""Initial weights shared by the transformer towers."""

from typing import Literal

from torch import nn

#: `reference`: std 0.02 at any width, as in the published code. `lecun`: 1/sqrt(inputs), which
#: hands a signal on at its own size in narrow towers, too.
Init = Literal["reference", "lecun"]


def linear_std(init: Init, inputs: int) -> float:
    """Standard deviation of the initial weights of a linear map of `inputs` features."""
    return 0.02 if init == "reference" else inputs**-0.5


def init_linear_and_norm(module: nn.Module, init: Init = "reference") -> None:
    """Linear: truncated normal, bias 0. LayerNorm: 1 and 0. For `nn.Module.apply`.

    Runs when a model is built, before ZeRO-3 partitions its parameters.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=linear_std(init, module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
