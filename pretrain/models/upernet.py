"""UperNet (arXiv 1807.10221): pyramid pooling over the last map, and an FPN over all four.

The heads are transformers', and so are the names of their parameters. What is added are the dropout
before the classifier and the initial weights of mmsegmentation, with which InternImage was
fine-tuned, and batch norms whose statistics are float32 beside weights of any precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig as HuggingFaceConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from groundwork.pretrain.models.batch_norm import SyncFloatBatchNorm, float_batch_norms


@dataclass(frozen=True)
class UperNetConfig:
    """The defaults are those of InternImage on ADE20K.

    channels: of the head. pool_sizes: sides of the pooled maps. auxiliary_stage: the map from which
    a plain convolutional head predicts as well while training, with auxiliary_channels;
    auxiliary_weight: of its loss, 0 for no such head. dropout: of whole channels, before both
    classifiers.
    """

    channels: int = 512
    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)
    auxiliary_stage: int = 2
    auxiliary_channels: int = 256
    auxiliary_weight: float = 0.4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("channels", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.pool_sizes or min(self.pool_sizes) < 1:
            raise ValueError(
                f"pool_sizes is {self.pool_sizes}; give the sides of at least one pooled map, each "
                "1 or more"
            )
        if not 0 <= self.auxiliary_stage <= 3:
            raise ValueError(f"auxiliary_stage is {self.auxiliary_stage}; the maps are 0 to 3")
        if not 0 <= self.auxiliary_weight < 1e6:
            raise ValueError(f"auxiliary_weight is {self.auxiliary_weight}; give 0 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give 0 <= dropout < 1")


class UperNet(nn.Module):
    """features: four maps (B, C_i, H_i, W_i) -> logits (B, num_classes, H_0, W_0), and others of
    the auxiliary head, as large as its map: None in evaluation, or where there is no such head.

    in_channels: C_i.
    """

    def __init__(self, config: UperNetConfig, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"UperNet: num_classes is {num_classes}; give at least 2")
        settings = HuggingFaceConfig(
            hidden_size=config.channels,
            pool_scales=list(config.pool_sizes),
            auxiliary_channels=config.auxiliary_channels,
            num_labels=num_classes,  # type: ignore[call-arg]
        )
        self.decode_head = UperNetHead(settings, list(in_channels))
        self.auxiliary_head: UperNetFCNHead | None = None
        if config.auxiliary_weight > 0:
            self.auxiliary_head = UperNetFCNHead(
                settings, list(in_channels), in_index=config.auxiliary_stage
            )
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                _initialise(head)
                float_batch_norms(head)
                head.classifier = _DropoutClassifier(head.classifier, config.dropout)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        maps = list(features)
        if self.training and maps[-1].shape[0] == 1 and not self._has_synchronised_norm():
            raise ValueError(
                "UperNet: one picture in a training batch, whose pooled map of 1×1 has no variance "
                "for batch normalisation; train with at least 2 pictures per device, or with "
                "synchronised batch normalisation on several"
            )
        logits = self.decode_head(maps)
        if self.auxiliary_head is None or not self.training:
            return logits, None
        return logits, self.auxiliary_head(maps)

    def _has_synchronised_norm(self) -> bool:
        synchronised = (SyncFloatBatchNorm, nn.SyncBatchNorm)
        return any(isinstance(module, synchronised) for module in self.modules())


class _DropoutClassifier(nn.Conv2d):
    """A 1×1 convolution after dropout of channels, so that its parameters keep their names."""

    def __init__(self, classifier: nn.Conv2d, dropout: float) -> None:
        super().__init__(classifier.in_channels, classifier.out_channels, 1)
        self.dropout = dropout
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, self.dropout, self.training))


def _initialise(head: nn.Module) -> None:
    """As mmcv's ConvModule before a ReLU."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
