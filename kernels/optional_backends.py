"""Optional implementations of AdamW and LayerNorm: which one runs, and why.

The package named `apex` on the Python package index is not NVIDIA's; NVIDIA's is recognised by its
submodules.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import nn

LayerNormBackend = Literal["auto", "torch", "apex"]
AdamWBackend = Literal["auto", "torch", "torch_fused", "apex", "deepspeed"]
APEX_MODULES: Final = ("apex.optimizers", "apex.normalization", "apex.multi_tensor_apply")


class BackendError(ValueError):
    """A backend was asked for by name and cannot run here; says why."""


class AdamWChoice(NamedTuple):
    """backend: its name. reason: why this one. build: (groups, lr, betas, eps) -> optimiser."""

    backend: str
    reason: str
    build: Callable[..., torch.optim.Optimizer]


def choose_adamw(backend: AdamWBackend, device: str) -> AdamWChoice:
    """The implementation for parameters on `device` ("cpu", "cuda", "cuda:1"). Raises BackendError.

    "auto" is torch's: fused on a GPU, plain on the CPU. The others only come when asked for, as all
    of them do the same arithmetic and torch's needs no compilation.
    """
    _check_name("optimizer.backend", backend, get_args(AdamWBackend))
    device = _kind(device)
    if backend == "auto":
        if device == "cuda":
            return AdamWChoice("torch_fused", "torch's own, one kernel per step", _torch_fused)
        return AdamWChoice("torch", "torch's own; the fused ones are for GPUs", _torch)
    if backend == "torch":
        return AdamWChoice("torch", "asked for", _torch)
    if backend == "torch_fused":
        return AdamWChoice("torch_fused", "asked for", _torch_fused)
    if device != "cuda":
        raise BackendError(f"optimizer.backend {backend!r} needs a GPU; use 'auto'")
    if backend == "apex" and (problem := apex_problem()) is not None:
        raise BackendError(f"optimizer.backend 'apex': {problem}; use 'auto'")
    return AdamWChoice(backend, "asked for", _apex if backend == "apex" else _deepspeed)


class LayerNormChoice(NamedTuple):
    """backend: its name. reason: why this one. build: (channels, eps) -> module.

    The modules have the parameters `weight` and `bias`, whichever builds them.
    """

    backend: str
    reason: str
    build: Callable[[int, float], nn.Module]


def choose_layer_norm(backend: LayerNormBackend, device: str) -> LayerNormChoice:
    """The implementation for tensors on `device` ("cpu", "cuda", "cuda:1"). Raises BackendError.

    "auto" is torch's: `torch.compile` fuses it with its neighbours, and it runs anywhere.
    """
    _check_name("layer_norm backend", backend, get_args(LayerNormBackend))
    device = _kind(device)
    if backend != "apex":
        reason = "torch's own" if backend == "auto" else "asked for"
        return LayerNormChoice("torch", reason, _torch_layer_norm)
    if device != "cuda":
        raise BackendError("layer_norm backend 'apex' needs a GPU; use 'auto'")
    if (problem := apex_problem()) is not None:
        raise BackendError(f"layer_norm backend 'apex': {problem}; use 'auto'")
    return LayerNormChoice("apex", "asked for", _apex_layer_norm)


def apex_problem() -> str | None:
    """Why NVIDIA's apex cannot be used; None if it is installed."""
    try:
        if find_spec("apex") is None:
            return "apex is not installed (https://github.com/NVIDIA/apex; not `pip install apex`)"
        missing = [name for name in APEX_MODULES if find_spec(name) is None]
    except Exception as error:  # finding a submodule runs the package, which may raise anything
        return f"apex does not import ({type(error).__name__}: {error})"
    if missing:
        return (
            f"the installed package apex is not NVIDIA's: it has no {missing[0]}; "
            "`pip uninstall apex`, then build https://github.com/NVIDIA/apex"
        )
    return None


def _check_name(what: str, backend: str, known: tuple[str, ...]) -> None:
    if backend not in known:
        raise BackendError(f"{what} {backend!r} is unknown; choose one of {', '.join(known)}")


def _kind(device: str | torch.device) -> str:
    """ "cpu" or "cuda", without a number."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise BackendError(f"device {str(device)!r} is unknown; give 'cpu', 'cuda' or 'cuda:N'")
    return kind


def _torch_layer_norm(channels: int, eps: float) -> nn.Module:
    return nn.LayerNorm(channels, eps=eps)


def _apex_layer_norm(channels: int, eps: float) -> nn.Module:
    from apex.normalization import FusedLayerNorm

    module: nn.Module = FusedLayerNorm(channels, eps=eps)
    return module


def _torch(groups: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **settings)


def _torch_fused(groups: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


def _apex(groups: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
    return optimizer


def _deepspeed(groups: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
    return optimizer
