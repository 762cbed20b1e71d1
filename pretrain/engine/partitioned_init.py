"""Models built in parts: under ZeRO-3 no rank ever holds all weights of a large one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

#: Parameters above which a model is built in parts unless the recipe says otherwise: whole, on each
#: rank of a node, its float32 weights and their copy would take 4 GB.
LARGE = 500_000_000


def parameter_count(build: Callable[[], nn.Module]) -> int:
    """Parameters of what `build` makes, without their memory: it is built on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def build_partitioned(build: Callable[[], nn.Module], settings: Mapping[str, Any]) -> nn.Module:
    """`build()`, with each parameter cut into the ranks' parts once its module is made. Collective.

    settings: DeepSpeed's configuration, of ZeRO-3. Parameters are of the precision that it trains
    in (the masters start from values rounded to it), buffers stay as they were made. All ranks get
    the numbers of the first one. What initialises parameters after their module was made does so in
    `nn.Module.apply`, or gathers them itself.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    class PartitionedInit(deepspeed.zero.Init):
        """Casts the parameters only; DeepSpeed's own casts every tensor made meanwhile."""

        def _post_init_method(self, module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.dtype)
            super()._post_init_method(module)

    with PartitionedInit(
        config_dict_or_path=dict(settings), tensor_overrides=(DeepSpeedTensorOverride.device,)
    ):
        return build()
