"""Initial weights of the models' layers.

`Linear` and `Conv2d` start in their constructors and draw in float32. Under `deepspeed.zero.Init` a
layer's parameters are partitioned as soon as its constructor ends, so a later walk over the model
would find them empty, and they may be bfloat16 there, in which a truncated normal has its tails at
the limits.
"""

import math
from typing import Literal

import torch
from torch import nn

#: `reference`: std 0.02 at any width, as in the published code. `lecun`: 1/sqrt(inputs), which
#: hands a signal on at its own size in narrow towers, too.
Init = Literal["reference", "lecun"]

#: Of a `Linear`: truncated normal of std 0.02, Glorot's uniform distribution, or zeros.
Start = Literal["normal", "xavier", "zeros"]


class Linear(nn.Linear):
    """A linear map whose weight starts as `start` says, and its bias at 0."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, start: Start = "normal"
    ) -> None:
        self.start = start  # read by reset_parameters, which nn.Linear's constructor calls
        super().__init__(in_features, out_features, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        weight = self.weight.float()
        if self.start == "normal":
            nn.init.trunc_normal_(weight, std=0.02)
        elif self.start == "xavier":
            nn.init.xavier_uniform_(weight)
        else:
            nn.init.zeros_(weight)
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.zero_()


class Conv2d(nn.Conv2d):
    """nn.Conv2d with its own initial weights, drawn in float32 whatever their dtype."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                values = parameter.float()
                nn.init.uniform_(values, -bound, bound)
                parameter.copy_(values)


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
