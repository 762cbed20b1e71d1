"""DINO (arXiv 2203.03605): a detector without anchors and without suppression of doubles.

The cells of a pyramid look at each other; the most promising ones become the boxes of 900 learned
queries (mixed query selection), which six layers correct one after the other. A layer's error also
reaches the box that it began with (look forward twice). Boxes are centre x, centre y, width and
height in parts of the picture without its padding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from groundwork.pretrain.models.deformable_attention import DeformableAttention, Shapes
from groundwork.pretrain.models.dino_denoising import Denoising, blocked_attention
from groundwork.pretrain.models.dino_layers import (
    DecoderLayer,
    EncoderLayer,
    Perceptron,
    box_positions,
    cell_positions,
)

#: Groups of the normalisation after the channel mapper.
NORM_GROUPS = 32
#: Boxes this near to 0 or 1 are as far as their logits go.
LOGIT_EPS = 1e-3
#: Side of the box proposed for a cell of the finest level, in parts of the picture.
PROPOSAL_SIDE = 0.05
#: Probability of an object that the classifiers begin with (focal loss, arXiv 1708.02002).
PRIOR = 0.01


@dataclass(frozen=True)
class DinoConfig:
    """The defaults are DINO with four scales: three of the backbone, and one more below them.

    queries: at most as many objects are found. width: of all layers; hidden: of their MLPs.
    points: that a head looks at, per level. denoising_queries: with little noise, for the picture
    with the most objects; 0 trains without. label_noise, box_noise: see `make_denoising`.
    activation_checkpointing: recompute the layers in the backward pass.
    """

    queries: int = 900
    width: int = 256
    heads: int = 8
    points: int = 4
    levels: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    hidden: int = 2048
    dropout: float = 0.0
    denoising_queries: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (
            *("queries", "heads", "points", "levels"),
            *("encoder_layers", "decoder_layers", "hidden"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.width % NORM_GROUPS or self.width % self.heads or self.width < 1:
            raise ValueError(
                f"width is {self.width}; give a multiple of {NORM_GROUPS} (groups of the "
                f"normalisation) and of heads ({self.heads})"
            )
        if self.denoising_queries < 0:
            raise ValueError(f"denoising_queries is {self.denoising_queries}; 0 is none")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is {self.label_noise}; give 0 to 1")
        if not 0 <= self.box_noise < math.inf:
            raise ValueError(f"box_noise is {self.box_noise}; give 0 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give 0 <= dropout < 1")


class Detections(NamedTuple):
    """logits: (layers, B, N, classes), the classes are independent. boxes: (layers, B, N, 4)."""

    logits: Tensor
    boxes: Tensor


class DinoOutputs(NamedTuple):
    """matched: of the queries. proposals: of the chosen cells, layers is 1. denoising: of the noisy
    boxes, N is G·2·M; None without them."""

    matched: Detections
    proposals: Detections
    denoising: Detections | None


class Dino(nn.Module):
    """features: maps (B, C_i, H_i, W_i), from fine to coarse -> DinoOutputs.

    in_channels: C_i, of at most `levels` maps; further levels are made from the last.
    inside: (B, H, W), bool, of the padded pictures, False in the padding.
    """

    def __init__(self, config: DinoConfig, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if not 1 <= len(in_channels) <= config.levels:
            raise ValueError(
                f"Dino: {len(in_channels)} maps for {config.levels} levels; give 1 to "
                f"{config.levels}"
            )
        if num_classes < 1:
            raise ValueError(f"Dino: num_classes is {num_classes}; give at least 1")
        self.config = config
        self.num_classes = num_classes
        width = config.width
        sizes = (width, config.heads, config.levels, config.points, config.hidden, config.dropout)
        self.mapper = ChannelMapper(in_channels, width, config.levels)
        self.level_embeds = nn.Parameter(torch.empty(config.levels, width))
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(config.encoder_layers))
        self.proposal = nn.Linear(width, width)
        self.proposal_norm = nn.LayerNorm(width)
        self.query_embedding = nn.Embedding(config.queries, width)
        self.label_embedding: nn.Embedding | None = None
        if config.denoising_queries:
            self.label_embedding = nn.Embedding(num_classes, width)
        self.reference_embed = Perceptron(2 * width, width, width)
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        # one of each per layer, and the last ones for the proposals
        heads = config.decoder_layers + 1
        self.class_heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(Perceptron(width, width, width, 4) for _ in range(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        for classifier in self.class_heads:
            nn.init.constant_(classifier.bias, -math.log(1 / PRIOR - 1))  # type: ignore[arg-type]
        for regressor in self.box_heads:
            nn.init.zeros_(regressor.layers[-1].weight)  # type: ignore[union-attr, index]
        nn.init.normal_(self.level_embeds)

    def forward(
        self, features: Sequence[Tensor], inside: Tensor, denoising: Denoising | None = None
    ) -> DinoOutputs:
        maps = self.mapper(features)
        pyramid = _flatten(maps, inside)
        memory = self._encode(torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1), pyramid)
        proposals, boxes = self._propose(memory, pyramid)
        queries = self.query_embedding(torch.arange(boxes.shape[1], device=boxes.device))
        queries = queries.expand(len(boxes), -1, -1)
        blocked, count = None, 0
        if denoising is not None and self.label_embedding is not None:
            _, G, _, M = denoising.labels.shape
            count = G * 2 * M
            known = self.label_embedding(denoising.labels)  # (B, G, 2, M, width)
            known = known * denoising.present[:, None, None, :, None]
            queries = torch.cat([known.flatten(1, 3), queries.to(known.dtype)], 1)
            boxes = torch.cat([denoising.boxes.flatten(1, 3), boxes], 1)
            blocked = blocked_attention(G, 2 * M, boxes.shape[1] - count, boxes.device)
        found = self._decode(queries, boxes, memory, pyramid, blocked)
        if count == 0:
            return DinoOutputs(found, proposals, None)
        return DinoOutputs(
            Detections(*(x[:, :, count:] for x in found)),
            proposals,
            Detections(*(x[:, :, :count] for x in found)),
        )

    def _encode(self, x: Tensor, pyramid: "_Pyramid") -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        placed = [
            cell_positions(inside, x.shape[-1]) + embed
            for inside, embed in zip(pyramid.inside, self.level_embeds, strict=True)
        ]
        positions = torch.cat(placed, 1).to(x.dtype)
        reference = pyramid.centres[:, :, None] * pyramid.ratios[:, None]  # (B, S, levels, 2)
        for layer in self.encoder:
            x = self._run(layer, x, positions, reference, pyramid.shapes, pyramid.padding)
        return x

    def _propose(self, memory: Tensor, pyramid: "_Pyramid") -> tuple[Detections, Tensor]:
        """-> what the chosen cells say, and their boxes (B, N, 4), without gradients."""
        sides = [
            pyramid.centres.new_full((height * width, 2), PROPOSAL_SIDE * 2**level)
            for level, (height, width) in enumerate(pyramid.shapes)
        ]
        side = torch.cat(sides).expand_as(pyramid.centres)
        anchors = torch.cat([pyramid.centres, side], -1)  # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~pyramid.padding
        x = self.proposal_norm(self.proposal(memory.masked_fill(~usable[..., None], 0)))
        logits = self.class_heads[-1](x).float()
        score = logits.amax(-1).masked_fill(~usable, -math.inf)
        count = min(self.config.queries, score.shape[1])
        chosen = score.topk(count, 1).indices[..., None]  # (B, N, 1)
        # a box is asked for of the chosen cells only
        x = x.gather(1, chosen.expand(-1, -1, x.shape[-1]))
        anchors = anchors.gather(1, chosen.expand(-1, -1, 4))
        boxes = (self.box_heads[-1](x).float() + torch.logit(anchors, LOGIT_EPS)).sigmoid()
        logits = logits.gather(1, chosen.expand(-1, -1, logits.shape[-1]))
        return Detections(logits[None], boxes[None]), boxes.detach()

    def _decode(
        self,
        x: Tensor,
        boxes: Tensor,
        memory: Tensor,
        pyramid: "_Pyramid",
        blocked: Tensor | None,
    ) -> Detections:
        """x: (B, N, width), what the queries are; boxes: (B, N, 4), where they begin."""
        ratios = pyramid.ratios.repeat(1, 1, 2)  # (B, levels, 4)
        previous = boxes  # with the gradient of the layer before
        logits, refined = [], []
        for layer, classify, regress in zip(
            self.decoder, self.class_heads[:-1], self.box_heads[:-1], strict=True
        ):
            reference = boxes[:, :, None] * ratios[:, None]  # (B, N, levels, 4)
            positions = self.reference_embed(box_positions(reference[:, :, 0], x.shape[-1]))
            x = self._run(
                layer, x, positions, reference, memory, pyramid.shapes, pyramid.padding, blocked
            )
            normed = self.decoder_norm(x)
            logits.append(classify(normed).float())
            found = regress(normed).float() + torch.logit(previous, LOGIT_EPS)
            refined.append(found.sigmoid())
            # as in the official code, the next layer's boxes come from what is not normed
            previous = (regress(x).float() + torch.logit(boxes, LOGIT_EPS)).sigmoid()
            boxes = previous.detach()
        return Detections(torch.stack(logits), torch.stack(refined))

    def _run(self, layer: nn.Module, *inputs: object) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class ChannelMapper(nn.Module):
    """Maps of different depth -> `levels` maps of one width, the last ones from the coarsest."""

    def __init__(self, in_channels: Sequence[int], width: int, levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_MapperConv(channels, width, 1, 1) for channels in in_channels)
        before = in_channels[-1]
        self.extra_convs = nn.ModuleList()
        for _ in range(levels - len(in_channels)):
            self.extra_convs.append(_MapperConv(before, width, 3, 2))
            before = width

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.convs, features, strict=True)]
        x = features[-1]
        for conv in self.extra_convs:
            x = conv(x)
            maps.append(x)
        return maps


class _MapperConv(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, width)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class _Pyramid(NamedTuple):
    """The geometry of a batch's levels, S cells in all.

    inside: of each level (B, H, W), bool.
    padding: (B, S), bool. ratios: (B, levels, 2), part of the width and of the height that is not
    padding. centres: (B, S, 2), of the cells, x and y in parts of the picture without padding.
    """

    shapes: Shapes
    inside: list[Tensor]
    padding: Tensor
    ratios: Tensor
    centres: Tensor


def _flatten(maps: Sequence[Tensor], inside: Tensor) -> _Pyramid:
    shapes = [(m.shape[2], m.shape[3]) for m in maps]
    levels = [F.interpolate(inside[:, None].float(), shape)[:, 0].bool() for shape in shapes]
    ratios, centres = [], []
    for (height, width), level in zip(shapes, levels, strict=True):
        rows, columns = level[:, :, 0].sum(1), level[:, 0].sum(1)  # (B,)
        ratios.append(torch.stack([columns / width, rows / height], -1))
        y = (torch.arange(height, device=level.device) + 0.5) / rows[:, None]  # (B, H)
        x = (torch.arange(width, device=level.device) + 0.5) / columns[:, None]
        grid = [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)]
        centres.append(torch.stack(grid, -1).flatten(1, 2))
    return _Pyramid(
        shapes=shapes,
        inside=levels,
        padding=~torch.cat([level.flatten(1) for level in levels], 1),
        ratios=torch.stack(ratios, 1),
        centres=torch.cat(centres, 1),
    )
