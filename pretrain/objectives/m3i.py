"""M3I: contrastive, label and self-supervised targets of mixed pictures in one stage.

Su et al., "Towards All-in-one Pre-training via Maximizing Multi-modal Mutual Information" (CVPR
2023, arXiv 2211.09807), which pre-trained InternImage-H and -G; no code was published. The outline
is the paper's: one loss for texts, classes and the pictures themselves, mixtures of two pictures as
input, the targets of both, dense targets by a momentum encoder through a decoder. All that fills it
is ours, and so said in docs/m3i.md.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.klite import Klite
from groundwork.pretrain.models.m3i_decoder import M3iDecoder
from groundwork.pretrain.models.mixed_images import (
    check_mixable,
    draw_masks,
    mix_partners,
    own_cells,
    per_picture,
    swap_partners,
)
from groundwork.pretrain.objectives.contrastive import unicl_loss
from groundwork.pretrain.objectives.pixels import normalise

#: Pixels per token of InternImage with the attention pooling, and per position of its last stage.
TOKEN_STRIDE, LAST_STRIDE = 16, 32
#: Added to the variance of a channel, so that one that never differs is no target.
TARGET_EPS = 1e-3
NEEDS = (
    "model.image is no InternImage that pools its tokens by attention, which objective.kind m3i "
    "needs; set model.image.kind: internimage and model.image.use_clip_projector: true"
)


@dataclass(frozen=True)
class M3iConfig:
    """The objective `m3i`.

    contrastive_weight, dense_weight: of the two parts of the loss; without the dense part there are
        neither teacher nor decoder.
    mix_share: of the cells a picture keeps in its own mixture; its partner has the others.
    mask_cell: side of a cell in pixels, a multiple of 32, so that each position of the last stage
        stands for one picture.
    dense_positions: which of a picture's tokens are predicted: those its mixture does not show, or
        all.
    decoder_*: the blocks, width and heads of the decoder.
    momentum, final_momentum: of the teacher, at the first and at the last step, a cosine between.
    block_rows: rows of the contrastive logits that exist at a time.
    """

    kind: Literal["m3i"] = "m3i"
    contrastive_weight: float = 1.0
    dense_weight: float = 1.0
    mix_share: float = 0.5
    mask_cell: int = 32
    dense_positions: Literal["hidden", "all"] = "hidden"
    decoder_depth: int = 4
    decoder_width: int = 512
    decoder_heads: int = 8
    momentum: float = 0.996
    final_momentum: float = 1.0
    block_rows: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.contrastive_weight < math.inf:
            raise ValueError(
                f"objective.contrastive_weight is {self.contrastive_weight}; it must be above 0"
            )
        if not 0 <= self.dense_weight < math.inf:
            raise ValueError(
                f"objective.dense_weight is {self.dense_weight}; it must not be negative (0 leaves "
                "the dense part out)"
            )
        if not 0 < self.mix_share < 1:
            raise ValueError(
                f"objective.mix_share is {self.mix_share}; each picture of a mixture needs a part, "
                "give a share between 0 and 1"
            )
        if self.mask_cell < LAST_STRIDE or self.mask_cell % LAST_STRIDE:
            raise ValueError(
                f"objective.mask_cell is {self.mask_cell}; it must be a multiple of {LAST_STRIDE} "
                "pixels, the stride of InternImage's last stage"
            )
        for name in ("decoder_depth", "decoder_width", "decoder_heads", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name} is {getattr(self, name)}; give at least 1")
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"objective.decoder_width is {self.decoder_width}; it must be a multiple of 4 (the "
                f"positions) and of decoder_heads, {self.decoder_heads}"
            )
        if not 0 <= self.momentum <= self.final_momentum <= 1:
            raise ValueError(
                f"objective.momentum is {self.momentum} and final_momentum {self.final_momentum}; "
                "give 0 <= momentum <= final_momentum <= 1"
            )

    def check(self, tower: object, image_size: int, batch: int) -> None:
        """Raise ValueError where a recipe's image tower, picture size and batch do not fit.

        batch: train.micro_batch, or train.global_batch.
        """
        if not isinstance(tower, InternImageConfig) or not tower.use_clip_projector:
            raise ValueError(NEEDS)
        check_mixable(batch, image_size, image_size, self.mask_cell)


class M3i(nn.Module):
    """What DeepSpeed wraps: the two towers, decoder, teacher, and the loss over the global batch.

    model: a two-tower model whose image tower, the student, is an InternImage with the attention
    pooling. The teacher, an image tower of the same shape, starts with the student's weights; it is
    never trained, and the engine moves it after each step as `momentum_pairs` and `momentum` say.
    mean, std: of the pixels in [0, 1], per channel.
    """

    def __init__(
        self,
        model: nn.Module,
        config: M3iConfig,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        student = _student(model)
        self.model = model
        self.config = config
        self.mean, self.std = mean, std
        self.teacher: InternImage | None = None
        self.decoder: M3iDecoder | None = None
        if config.dense_weight > 0:
            self.decoder = M3iDecoder(
                student.config.clip_embed_dim,
                config.decoder_width,
                config.decoder_depth,
                config.decoder_heads,
            )
            # from its config and not a deep copy, which ZeRO's partitions would not survive
            self.teacher = InternImage(replace(student.config, drop_rate=0.0, drop_path=0.0))
            self.teacher.requires_grad_(False).eval()
            copy_parameters(student, self.teacher)

    def train(self, mode: bool = True) -> "M3i":
        """The teacher stays in evaluation mode: its targets have no noise of their own."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def momentum_pairs(self) -> list[tuple[str, str]]:
        """(parameter of the teacher, its model in the student), names relative to this module."""
        if self.teacher is None:
            return []
        names = [name for name, _ in self.teacher.named_parameters()]
        return [(f"teacher.{name}", f"model.visual.{name}") for name in names]

    def momentum(self, step: int, total_steps: int) -> float:
        """How much of the teacher a step (0-based) keeps: teacher = m teacher + (1 - m) student."""
        first, last = self.config.momentum, self.config.final_momentum
        progress = min(1.0, step / max(1, total_steps - 1))
        return last - (last - first) * 0.5 * (1 + math.cos(math.pi * progress))

    def normalise(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """image: (B, 3, H, W) uint8 -> normalised pixels."""
        return normalise(image, self.mean, self.std, dtype)

    def forward(self, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """batch: image (B, 3, H, W) uint8, ids (B, N) int64, labels (B,) int64 (-1: unique).

        The masks come from torch's global generator on the CPU, which has a seed per rank and is
        part of checkpoints: a resumed run draws what it would have drawn.
        """
        B, _, H, W = batch["image"].shape
        cell = self.config.mask_cell
        check_mixable(B, H, W, cell)
        masks = draw_masks(B // 2, H // cell, W // cell, self.config.mix_share)
        return self.losses(batch, masks.to(batch["image"].device), dtype)

    def losses(
        self, batch: dict[str, Tensor], masks: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """`forward` with given masks, (B/2, rows, columns) bool."""
        pixels = self.normalise(batch["image"], dtype)
        H, W = pixels.shape[2:]
        mixtures = mix_partners(pixels, per_picture(masks, H, W))
        features = self.model(image=mixtures, ids=batch["ids"], dense=True)
        rows, columns = masks.shape[1:]
        share = own_cells(rows, columns, self.config.mix_share) / (rows * columns)
        # Cross entropy with the soft targets of mixup: each text counts by its picture's area.
        i2t = t2i = torch.zeros((), device=pixels.device)
        for weight, text, labels in (
            (share, features.text, batch["labels"]),
            (1 - share, swap_partners(features.text), swap_partners(batch["labels"])),
        ):
            parts = unicl_loss(features.image, text, features.scale, labels, self.config.block_rows)
            i2t, t2i = i2t + weight * parts[0], t2i + weight * parts[1]
        losses = {
            "loss": self.config.contrastive_weight * (i2t + t2i) / 2,
            "image_to_text": i2t.detach(),
            "text_to_image": t2i.detach(),
            "logit_scale": features.scale.detach(),
        }
        if self.teacher is not None:
            own = per_picture(masks, H // TOKEN_STRIDE, W // TOKEN_STRIDE)
            dense, spread = self._dense(features.tokens, pixels, own)
            losses["loss"] = losses["loss"] + self.config.dense_weight * dense
            losses |= {"dense": dense.detach(), "teacher_spread": spread}
        return losses

    def _dense(self, tokens: Tensor, pixels: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The dense loss, and the spread of its targets, which falls to 0 if they collapse.

        tokens: (B, N, D) of the mixtures; pixels: (B, 3, H, W), unmixed; own: (B, h, w) bool.
        """
        assert self.teacher is not None and self.decoder is not None
        with torch.no_grad():
            targets, spread = dense_targets(self.teacher.forward_tokens(pixels))
        # each mixture is asked for both its pictures
        visible = torch.cat([own, ~own])
        predicted = self.decoder(torch.cat([tokens, tokens]), visible)
        counted = torch.ones_like(visible) if self.config.dense_positions == "all" else ~visible
        loss = dense_loss(predicted, torch.cat([targets, swap_partners(targets)]), counted)
        return loss, spread.mean()


@torch.no_grad()
def dense_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens: (B, N, D) of the teacher -> the targets (B, N, D) and the spread (D,), float32.

    Each token is normalised, as the tokens have no norm of their own. From that the mean of all
    ranks' pictures at the same position is taken, and each channel is divided by what is left of
    its standard deviation, the spread: a target is what sets a picture apart from the others. With
    tokens that are normalised only, student and teacher soon agree on tokens that depend on the
    position alone, which are predicted without looking.
    """
    targets = F.layer_norm(tokens.float(), tokens.shape[-1:])
    pictures = len(targets) * (dist.get_world_size() if dist.is_initialized() else 1)
    targets = targets - _over_ranks(targets.sum(0)) / pictures
    variance = _over_ranks(targets.square().mean(1).sum(0)) / pictures
    return targets * (variance + TARGET_EPS).rsqrt(), variance.sqrt()


def _over_ranks(total: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def dense_loss(predicted: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean smooth L1 distance over the positions that count, in float32.

    predicted, targets: (B, N, D); counted: (B, h, w) bool, h·w = N, at least one True. The square
    of a small distance is the likelihood of a Gaussian; a large one counts by its size only, so
    that a few channels far out do not decide the gradient.
    """
    distance = F.smooth_l1_loss(predicted.float(), targets, reduction="none").mean(-1)
    weight = counted.flatten(1).to(distance.dtype)
    return (distance * weight).sum() / weight.sum()


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the values of the parameters of the same names in `source`.

    Also where `deepspeed.zero.Init` has partitioned them; then every rank must call this.
    """
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            with _gathered([parameter, values[name]]):
                parameter.copy_(values[name])


def _gathered(parameters: Sequence[nn.Parameter]) -> Any:
    """A context in which partitioned parameters are whole, and what is written is kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _student(model: nn.Module) -> InternImage:
    visual = model.visual if isinstance(model, Klite) else None
    if not isinstance(visual, InternImage) or visual.clip_projector is None:
        raise ValueError(NEEDS)
    return visual
