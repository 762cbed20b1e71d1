"""Official InternImage checkpoints: every published container, read strictly into a model.

Our parameter names are the official ones, so there is nothing to rename but what wrappers add. What
a checkpoint lacks or has besides is an error, as the official code's silence about it has cost its
users many a training from scratch.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

#: What becomes of a head that does not fit. `same`: an error. `skip`: parts of a head that one side
#: lacks, or that have another shape, are left out. `zeros`, `scaled`: so, too, and a classifier
#: that is not loaded starts at 0, or at a thousandth of its initial weights, as in the official
#: fine-tuning.
HeadRule = Literal["same", "skip", "zeros", "scaled"]

#: Under these keys the containers hold the weights: the official code, DeepSpeed, mm-style tools.
CONTAINERS: Final = ("model", "module", "state_dict")

HEAD_PARTS: Final = (
    *("head.", "conv_head.", "fc_norm.", "meta_"),
    *("clip_projector.", "dcnv3_head_x3.", "dcnv3_head_x4."),
)

#: Names of the classifier of the joint pre-training -> ours.
JOINT_HEAD: Final[Mapping[str, str]] = {
    "clip.classifier_ln.": "fc_norm.0.",
    "clip.classifier.": "head.",
}


class OfficialWeightsError(ValueError):
    """A checkpoint that does not fit the model, with everything that does not."""


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint held besides what was copied; nothing else was left out.

    dropped: parts that are no backbone or head (necks, teachers, text towers), by their names in
        the checkpoint. skipped: parts of a head, by ours, left out by the `HeadRule`. initial:
        tensors of the model that keep the values they had before.
    """

    dropped: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    head: HeadRule = "same",
    class_indices: Sequence[int] | None = None,
    optional: Container[str] = (),
) -> LoadReport:
    """Copy a checkpoint's weights into an InternImage; raises OfficialWeightsError, then untouched.

    class_indices: for each class of the model its row of the checkpoint's head, as when a head of
        21841 classes is to serve ImageNet-1K.
    optional: names of the model's that a checkpoint may lack; and one without layer scales fits a
        model that starts them at 1.

    Works on parameters that `deepspeed.zero.Init` has partitioned, where all ranks must call it.
    """
    if head not in get_args(HeadRule):
        raise ValueError(f"head is {head!r}; choose from: {', '.join(get_args(HeadRule))}")
    state, dropped = official_names(checkpoint)
    is_meta = all(parameter.is_meta for parameter in model.parameters())
    _require_numbers(state, is_meta=is_meta)
    own = _shapes(model)
    if class_indices is not None:
        _select_classes(state, own, class_indices)
    if _config(model, "remove_center"):
        _remove_centres(state, own)
    missing = [n for n in own if n not in state and n not in optional]
    missing = [n for n in missing if not _has_default(model, n, state)]
    unexpected = [name for name in state if name not in own]
    misshapen = [n for n, v in state.items() if n in own and tuple(v.shape) != own[n]]
    skipped: list[str] = []
    if head != "same":
        skipped = [n for n in (*unexpected, *misshapen) if n.startswith(HEAD_PARTS)]
        missing, unexpected, misshapen = (
            [n for n in names if not n.startswith(HEAD_PARTS)]
            for names in (missing, unexpected, misshapen)
        )
    _require_fit(state, own, missing, unexpected, misshapen)
    loaded = {name: value for name, value in state.items() if name not in set(skipped)}
    _copy(model, loaded)
    if head in ("zeros", "scaled"):
        classifier = [n for n in ("head.weight", "head.bias") if n in own and n not in loaded]
        _scale(model, classifier, 0.0 if head == "zeros" else 0.001)
    initial = tuple(name for name in own if name not in loaded)
    return LoadReport(tuple(dropped), tuple(skipped), initial)


def official_names(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone and the head of a checkpoint by their official names; and what is neither.

    Takes apart containers and wrappers: `model`, `module`, `state_dict`; `module.` of data
    parallelism; `backbone.` of detectors; `model.` and the layer scales of Hugging Face; the
    student, or the image tower and the classifier, of the joint pre-training.
    """
    values: Any = checkpoint
    if not isinstance(values, Mapping):
        raise OfficialWeightsError(
            f"not a state dict but a {type(values).__name__}; expected parameter names and tensors"
        )
    while True:
        inner = [k for k in CONTAINERS if isinstance(values.get(k), Mapping)]
        if not inner:
            break
        values = values[inner[0]]
    strange = [
        str(name)
        for name, value in values.items()
        if not isinstance(value, Tensor) or not isinstance(name, str)
    ]
    if strange or not values:
        raise OfficialWeightsError(
            f"not a state dict: {listed(strange) or 'it'} holds no tensors; expected one alone or "
            f"under one of the keys {', '.join(CONTAINERS)}"
        )
    ours: dict[str, Tensor] = {}
    dropped: list[str] = []
    prefix = _prefix([_without(name, "module.") for name in values])
    for name, value in values.items():
        new = _our_name(_without(name, "module."), prefix)
        if new is None:
            dropped.append(name)
        elif new in ours:
            raise OfficialWeightsError(f"two tensors of the checkpoint are named {new}: {name}")
        else:
            ours[new] = value
    return ours, dropped


def _require_numbers(state: Mapping[str, Tensor], *, is_meta: bool) -> None:
    """Weights are dense and real, and there unless the model's are not (is_meta)."""
    wrong = [
        f"{name} ({value.dtype}, {value.layout}, {value.device.type})"
        for name, value in state.items()
        if (value.is_meta and not is_meta)
        or value.layout != torch.strided
        or not (value.is_floating_point() or name.endswith("num_batches_tracked"))
    ]
    if wrong:
        raise OfficialWeightsError(
            f"{len(wrong)} tensors of the checkpoint are no weights: {listed(wrong)}; expected "
            "dense tensors of floating-point numbers"
        )


def _prefix(names: Sequence[str]) -> str:
    """What the backbone's names begin with in a checkpoint of these names."""
    for prefix in ("student.", "teacher.", "dcnv3.", "backbone."):
        if any(name.startswith(prefix) for name in names):
            return prefix
    return "model." if any(name.startswith("model.patch_embed.") for name in names) else ""


def _our_name(name: str, prefix: str) -> str | None:
    """None for what is not of the backbone or its head."""
    if prefix == "dcnv3.":  # the joint pre-training: the head lies beside the image tower
        for theirs, ours in JOINT_HEAD.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        if name.startswith(("clip_projector.", "dcnv3_head_")):
            return name
    if not name.startswith(prefix):
        return None
    name = _without(name.removeprefix(prefix), "module.")
    if prefix == "student." and name.startswith("student_proj"):
        return None
    parent, dot, leaf = name.rpartition(".")
    return parent + dot + {"layer_scale1": "gamma1", "layer_scale2": "gamma2"}.get(leaf, leaf)


def _without(name: str, prefix: str) -> str:
    while name.startswith(prefix):  # once per wrapper
        name = name.removeprefix(prefix)
    return name


def _select_classes(
    state: dict[str, Tensor], own: Mapping[str, tuple[int, ...]], class_indices: Sequence[int]
) -> None:
    if "head.weight" not in state or "head.weight" not in own:
        raise OfficialWeightsError(
            "class_indices choose rows of a head; the checkpoint or the model has none"
        )
    if "head.bias" not in state or not all(hasattr(i, "__index__") for i in class_indices):
        raise OfficialWeightsError(
            "class_indices choose rows of a head with a bias, each by an integer; "
            "the checkpoint's head has none, or one of the indices is no integer"
        )
    rows, classes = len(state["head.weight"]), own["head.weight"][0]
    if len(class_indices) != classes:
        raise OfficialWeightsError(
            f"class_indices has {len(class_indices)} entries, the model {classes} classes; give "
            "one per class"
        )
    outside = [i for i in class_indices if not 0 <= i < rows]
    if outside:
        raise OfficialWeightsError(
            f"class_indices names {outside[:6]}; the checkpoint's head has the rows 0 to {rows - 1}"
        )
    for name in ("head.weight", "head.bias"):
        index = torch.as_tensor(class_indices, device=state[name].device)
        state[name] = state[name][index]


def _remove_centres(state: dict[str, Tensor], own: Mapping[str, tuple[int, ...]]) -> None:
    """Drop the centre of 3×3 kernels from offsets and masks trained with it."""
    for name, value in state.items():
        values_per_point = 2 if ".dcn.offset." in name else 1
        is_dcn = ".dcn.offset." in name or ".dcn.mask." in name
        if is_dcn and name in own and len(value) * 8 == own[name][0] * 9:
            points = value.unflatten(0, (-1, 9, values_per_point))
            kept = torch.cat([points[:, :4], points[:, 5:]], dim=1)
            state[name] = kept.flatten(0, 2)


def _has_default(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> bool:
    """Tensors that a checkpoint may lack, as the model then computes the same."""
    if name.endswith("num_batches_tracked"):
        return name.replace("num_batches_tracked", "running_mean") in state
    none_there = not any(map(_is_layer_scale, state))
    return _is_layer_scale(name) and none_there and _config(model, "layer_scale") == 1.0


def _is_layer_scale(name: str) -> bool:
    return ".blocks." in name and name.endswith((".gamma1", ".gamma2"))


def _config(model: nn.Module, key: str) -> Any:
    return getattr(getattr(model, "config", None), key, None)


def _require_fit(
    state: Mapping[str, Tensor],
    own: Mapping[str, tuple[int, ...]],
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
) -> None:
    shapes = [f"{n} is {tuple(state[n].shape)}, the model's is {own[n]}" for n in misshapen]
    found = (("missing", missing), ("not in the model", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {what}: {listed(names)}" for what, names in found if names]
    if not problems:
        return
    of_head = [n for n in (*missing, *unexpected, *misshapen) if n.startswith(HEAD_PARTS)]
    remedy = "set the model's config to the checkpoint's"
    if len(of_head) == len(missing) + len(unexpected) + len(misshapen):
        remedy = (
            "only the head differs: allow it with head='skip', 'zeros' or 'scaled', or map the "
            "classes with class_indices"
        )
    raise OfficialWeightsError(
        f"the checkpoint is of another model. Tensors {'; '.join(problems)}; {remedy}"
    )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of parameters and buffers; ZeRO-3 keeps those of what it has partitioned."""
    tensors = model.state_dict(keep_vars=True)
    return {name: tuple(getattr(v, "ds_shape", v.shape)) for name, v in tensors.items()}


def _copy(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state:
            with _whole(tensor):
                if tensor.numel() or not state[name].numel():
                    tensor.copy_(state[name])


def _scale(model: nn.Module, names: Sequence[str], factor: float) -> None:
    tensors = model.state_dict(keep_vars=True)
    for name in names:
        with _whole(tensors[name]):
            tensors[name].mul_(factor)


@contextmanager
def _whole(tensor: Tensor) -> Iterator[None]:
    """Within, a tensor partitioned by ZeRO-3 is whole; changes of rank 0 count."""
    with torch.no_grad():
        if not hasattr(tensor, "ds_id"):
            yield
            return
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([tensor], modifier_rank=0):
            yield


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
