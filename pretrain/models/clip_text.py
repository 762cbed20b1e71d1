"""CLIP-style text transformer with the parameter names of the K-LITE / UniCL checkpoints.

Differs from transformers' CLIPTextModel in names (fused `in_proj`), in the LayerNorm epsilon
(1e-12) and in the bidirectional option; `pretrain/weights/huggingface.py` converts to it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundwork.pretrain.models.initialisation import Init, init_linear_and_norm, linear_std

#: LayerNorm epsilon of the official text encoder. Embeddings start with std 0.02, so it is visible.
EPSILON = 1e-12


@dataclass(frozen=True)
class TextConfig:
    """The text tower; defaults are those of both published K-LITE models.

    vocab_size: null takes the tokenizer's.
    autoregressive: False lets every token see all others but padding (id 0).
    init: of the weights and of their projection. `reference` has std 0.02, which barely lets a
        text through a narrow tower; `lecun` has 1/sqrt(inputs).
    """

    vocab_size: int | None = None
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    drop_path: float = 0.0
    autoregressive: bool = True
    init: Init = "reference"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise ValueError(
                f"model.text.context_length is {self.context_length}; start token, end token and "
                "one token of text need at least 3"
            )
        for name in ("vocab_size", "width", "layers", "heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.text.{name} is {value}; it must be at least 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.text.drop_path is {self.drop_path}; it must be in [0, 1)")
        if self.width % self.heads:
            raise ValueError(
                f"model.text: width {self.width} is not divisible by {self.heads} heads"
            )


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and returned in x.dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU approximation of CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with torch's fused parameter names.

    nn.MultiheadAttention itself reads `out_proj.weight` without calling `out_proj`, which ZeRO-3
    would find partitioned.
    """

    def __init__(self, width: int, heads: int, init: Init) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.in_proj_weight, std=linear_std(init, width))

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """x: (B, N, D); mask: (B, 1, 1, N) bool, True where a key counts -> (B, N, D)."""
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).reshape(B, N, D))


class ResidualBlock(nn.Module):
    """Pre-norm transformer block. x: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, drop_path: float, init: Init) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, init)
        self.ln_1 = LayerNorm(width, eps=EPSILON)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width, eps=EPSILON)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        x = x + self.drop_path(self.attn(self.ln_1(x), mask, causal))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class TextTransformer(nn.Module):
    """ids: (B, N) int64, N at most context_length -> (B, width): the final state at the end token.

    The end token has the highest id, so it stands at argmax(ids): a text that was cut must end with
    it, or the state is read at the start token, which has seen nothing of the text.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        drop_path: float = 0.0,
        autoregressive: bool = True,
        init: Init = "reference",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.autoregressive = autoregressive
        self.activation_checkpointing = activation_checkpointing
        self.out_dim = width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        rates = torch.linspace(0, drop_path, layers, device="cpu").tolist()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, rate, init) for rate in rates)
        self.ln_final = LayerNorm(width, eps=EPSILON)
        nn.init.trunc_normal_(self.token_embedding.weight, std=0.02)
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        self.apply(partial(init_linear_and_norm, init=init))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.positional_embedding):
            raise ValueError(
                f"TextTransformer: texts of {ids.shape[1]} ids, but context_length is "
                f"{len(self.positional_embedding)}; give both from one setting"
            )
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = None if self.autoregressive else (ids != 0)[:, None, None, :]
        for block in self.resblocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, self.autoregressive, use_reentrant=False)
            else:
                x = block(x, mask, self.autoregressive)
        x = self.ln_final(x)
        return x[torch.arange(len(ids), device=ids.device), ids.argmax(1)]


def build_text(config: TextConfig) -> TextTransformer:
    if config.vocab_size is None:
        raise ValueError(
            "model.text.vocab_size is not set and no tokenizer was given to take it from"
        )
    return TextTransformer(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        drop_path=config.drop_path,
        autoregressive=config.autoregressive,
        init=config.init,
        activation_checkpointing=config.activation_checkpointing,
    )
