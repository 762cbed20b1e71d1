"""Where the deformable convolutions of an InternImage sample: positions and weights by picture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundwork.kernels.dcnv3_geometry import Geometry, make_geometry
from groundwork.kernels.dcnv3_reference import sampling_positions
from groundwork.pretrain.models.dcnv3_module import DCNv3
from groundwork.pretrain.models.dcnv4_module import DCNv4
from groundwork.pretrain.models.internimage import InternImage


@dataclass(frozen=True)
class PointSamples:
    """What one pixel of a layer reads.

    pixel: (x, y) of the layer; centre: where that is, and xy (G, P, 2): where the points are, in
    pixels (x, y) of the network's input. Pixel j of a layer of stride s lies on pixel s·j: each of
    its convolutions of stride 2 is centred on every second pixel.
    weights: (G, P), softmaxed in DCNv3, unbounded in DCNv4.
    """

    pixel: tuple[int, int]
    centre: tuple[float, float]
    xy: Tensor
    weights: Tensor


def point_record(point: PointSamples, scale: tuple[float, float]) -> dict[str, Any]:
    """JSON values; scale: (x, y), pixels of the network's input per pixel of the picture.

    picture_xy: (G, P, 2), the positions in pixels of the picture, as input_xy are in the input's.
    """
    scales = torch.tensor(scale, dtype=torch.float64)
    picture_xy = (point.xy.double() + 0.5) / scales - 0.5  # the centre of pixel j is at j + 1/2
    return {
        "layer_pixel": list(point.pixel),
        "input_centre": list(point.centre),
        "input_xy": point.xy.tolist(),
        "picture_xy": picture_xy.tolist(),
        "weights": point.weights.tolist(),
    }


def stride_of(stage: int) -> int:
    """Pixels of the input from one pixel of a stage to the next."""
    return 4 << stage


def block_of(model: InternImage, stage: int, block: int | None) -> nn.Module:
    """A block; None for the last of the stage. Raises ValueError where there is none."""
    if not 0 <= stage < 4:
        raise ValueError(f"stage is {stage}; an InternImage has the stages 0 to 3")
    blocks = model.levels[stage].blocks
    assert isinstance(blocks, nn.ModuleList)
    if block is not None and not 0 <= block < len(blocks):
        raise ValueError(
            f"block is {block}; stage {stage} of this model has the blocks 0 to {len(blocks) - 1}"
        )
    return blocks[-1 if block is None else block]


def sampled_points(
    model: InternImage,
    image: Tensor,
    stage: int,
    block: int | None,
    points_xy: Sequence[tuple[float, float]],
) -> list[PointSamples]:
    """What the pixels of a layer that lie next to some pixels of an image read.

    image: (3, H, W), normalised; points_xy: (x, y) in its pixels; block: None for the last of the
    stage. Raises ValueError for what is not there.
    """
    _, height, width = image.shape
    outside = [p for p in points_xy if not (0 <= p[0] < width and 0 <= p[1] < height)]
    if outside:
        raise ValueError(
            f"the points {outside} are outside of the image of {width} × {height} pixels; "
            "give x from 0 to the width, y from 0 to the height"
        )
    layer = block_of(model, stage, block).dcn
    assert isinstance(layer, DCNv3 | DCNv4)
    with _captured(layer) as captured, torch.no_grad():
        model.forward_intermediates(image[None], indices=[stage], stop_early=True)
    geometry = make_geometry(
        layer.kernel_size,
        1,
        None,
        layer.dilation,
        layer.groups,
        layer.offset_scale,
        layer.remove_center,
    )
    offset, weights = _offset_and_weights(layer, captured, geometry)
    xy = sampling_positions(offset, geometry)[0] * stride_of(stage)  # (h, w, G, P, 2)
    h, w = xy.shape[:2]
    found = []
    for x, y in points_xy:
        column = min(round(x / stride_of(stage)), w - 1)
        line = min(round(y / stride_of(stage)), h - 1)
        centre = (float(column * stride_of(stage)), float(line * stride_of(stage)))
        found.append(
            PointSamples((column, line), centre, xy[line, column], weights[0, line, column])
        )
    return found


@contextmanager
def _captured(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the projections of a layer hand to its op, once the model has run."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in ("offset", "mask", "offset_mask"):
        projection = getattr(layer, name, None)
        if projection is not None:

            def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.detach().float()

            handles.append(projection.register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _offset_and_weights(
    layer: nn.Module, captured: dict[str, Tensor], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """offset (1, h, w, G·P·2) and weights (1, h, w, G, P), as the op takes them."""
    groups, points = geometry.groups, geometry.num_points
    if isinstance(layer, DCNv3):
        mask = captured["mask"].unflatten(-1, (groups, points))
        return captured["offset"], mask.softmax(-1)
    assert isinstance(layer, DCNv4)
    packed = captured["offset_mask"][..., : 3 * groups * points].unflatten(-1, (groups, -1))
    offset, mask = packed.split((2 * points, points), -1)
    return offset.flatten(3), mask
