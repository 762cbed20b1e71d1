"""`--format onnx`: InternImage in standard ONNX operations, for any batch and size of picture.

The sampling is GridSample; no operator of ours is in the graph. Before anything is kept,
onnxruntime must give the model's outputs, also where the offsets are large.
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_groundwork import CONFIG
from groundwork.pretrain.weights.export_internimage import to_huggingface_internimage
from groundwork.pretrain.weights.exportable import Exportable, ExportOptions, relative_difference
from groundwork.pretrain.weights.huggingface import image_processor

MODEL: Final = "model.onnx"
TOLERANCE: Final = 1e-4
#: A protobuf may have 2 GiB; from here on the weights lie in a file of their own.
LARGEST_BYTES: Final = 1_500_000_000
#: Below this, in pixels, the offsets of a model do not try the sampling.
TRYING_OFFSET: Final = 0.25


class OnnxGraph(nn.Module):
    """images: (B, 3, H, W) -> logits (B, classes), or the pooled features (B, D) without a head;
    with `features` the four maps (B, C, h, w), too."""

    def __init__(self, model: nn.Module, *, features: bool) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = self.model(pixel_values)
        first = output.pooler_output if output.logits is None else output.logits
        return (first, *output.hidden_states) if self.features else (first,)


def write_onnx(subject: Exportable, folder: Path, options: ExportOptions) -> None:
    assert isinstance(subject.config, InternImageConfig)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--format onnx: {', '.join(missing)} is not installed; "
            "pip install 'groundwork-pretrain[onnx]'"
        )
    model = to_huggingface_internimage(subject, sampling="standard")
    graph = OnnxGraph(model, features=options.features).eval()
    names = output_names(subject.config, options)
    probe = _probe(subject)
    if largest_offset(model, probe) < TRYING_OFFSET:
        # as at initialisation: the graph is the same for all weights, so others try it
        _require_equal(_with_offsets(graph), names, probe, options, folder)
    _require_equal(graph, names, probe, options, folder)
    config = {
        "format": "onnx",
        "inputs": {"pixel_values": ["batch", 3, "height", "width"]},
        "multiples_of": 32,
        "outputs": names,
        "image_size": subject.image.size,
        "opset": options.opset,
        "labels": list(subject.labels),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), "utf-8")
    image_processor(subject.image).save_pretrained(folder)


def output_names(config: InternImageConfig, options: ExportOptions) -> list[str]:
    first = "logits" if config.num_classes > 0 else "pooled"
    return [first, *(f"map{i}" for i in range(4))] if options.features else [first]


def _require_equal(
    graph: OnnxGraph, names: list[str], probe: Tensor, options: ExportOptions, folder: Path
) -> None:
    """Write the graph to the folder. Raises ExportError where onnxruntime computes otherwise."""
    import onnxruntime

    _save(graph, names, probe, options.opset, folder)
    session: Any = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    for images in (probe, probe[:1, :, :32, :96]):
        with torch.no_grad():
            expected = graph(images)
        got = session.run(names, {"pixel_values": images.numpy()})
        difference = max(
            relative_difference(torch.from_numpy(g), e) for g, e in zip(got, expected, strict=True)
        )
        if not difference <= TOLERANCE:
            raise ExportError(
                f"--format onnx: onnxruntime differs by {difference:.1e} on images of "
                f"{tuple(images.shape)}, more than {TOLERANCE:.0e}; nothing was written. Please "
                "report this defect"
            )


def _save(graph: OnnxGraph, names: list[str], probe: Tensor, opset: int, folder: Path) -> None:
    sizes = torch.export.Dim("h", min=1), torch.export.Dim("w", min=1)
    shape = {0: torch.export.Dim("batch"), 2: 32 * sizes[0], 3: 32 * sizes[1]}
    with _quiet():
        program = torch.onnx.export(
            graph,
            (probe,),
            dynamo=True,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=names,
            dynamic_shapes=(shape,),
            verbose=False,
        )
    assert program is not None
    _forget_where(program.model)
    size = sum(p.numel() * p.element_size() for p in graph.parameters())
    program.save(folder / MODEL, external_data=size > LARGEST_BYTES)


def _forget_where(model: Any) -> None:
    """Drop the notes of the exporter: stack traces with the paths of this machine."""
    model.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about its own workings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _probe(subject: Exportable) -> Tensor:
    """Two images, neither square nor of the training's size: all of it is to be dynamic."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def largest_offset(model: nn.Module, images: Tensor) -> float:
    """Of all samples of all layers, in pixels."""
    largest = [0.0]

    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:
        largest.append(float(output.abs().max()))

    layers = [m for n, m in model.named_modules() if n.endswith(("dcn.offset", "dcn.offset_mask"))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return max(largest)


@torch.no_grad()
def _with_offsets(graph: OnnxGraph) -> OnnxGraph:
    """A copy whose samples lie up to a few pixels off the grid, and some outside of the picture."""
    changed = copy.deepcopy(graph)
    generator = torch.Generator().manual_seed(1)
    layers: Mapping[str, nn.Module] = dict(changed.named_modules())
    for name, layer in layers.items():
        if name.endswith(("dcn.offset", "dcn.offset_mask", "dcn.mask")):
            assert isinstance(layer, nn.Linear)
            layer.bias.add_(torch.randn(layer.bias.shape, generator=generator))
    return changed
