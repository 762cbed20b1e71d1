"""A picture of what a layer sees: sampled points over an image, and its receptive field."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from groundwork.pretrain.inspection.sampling import PointSamples

#: Area of a point with the largest weight, in points squared (1/72 inch).
LARGEST = 70.0


def draw_sampling(
    picture: Image.Image,
    points: Sequence[PointSamples],
    field: Tensor | None,
    title: str,
    path: Path,
) -> None:
    """Write a PNG.

    picture: as the network gets it, in its pixels. points: a cross each; what it samples are
    discs, coloured by group, of a size and opacity that grow with the size of the weight. field:
    (H, W) on a logarithmic scale over four decades, beside it; None draws none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 if field is None else 2
    aspect = picture.height / picture.width
    figure = Figure(figsize=(4.4 * panels, 4.4 * aspect + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title, fontsize=9)
    pixels = np.asarray(picture.convert("RGB"))
    axes[0].imshow(pixels)
    _draw_points(axes[0], points)
    axes[0].set_xlabel("samples, coloured by group", fontsize=8)
    if field is not None:
        strength = np.log10(np.maximum(field.cpu().numpy() / float(field.max()), 1e-4))
        axes[1].imshow(pixels.mean(-1), cmap="gray", vmin=-60, vmax=320)
        shades = axes[1].imshow(strength, cmap="inferno", alpha=(strength + 4) / 4 * 0.85)
        bar = figure.colorbar(shades, ax=axes[1], fraction=0.04, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        axes[1].set_xlabel("effective receptive field, log10 of the largest", fontsize=8)
    for axis in axes:
        axis.set_xlim(-0.5, picture.width - 0.5)
        axis.set_ylim(picture.height - 0.5, -0.5)
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_points(axis: "object", points: Sequence[PointSamples]) -> None:
    import matplotlib

    for point in points:
        groups = len(point.weights)
        weights = point.weights.abs().cpu().numpy()
        share = weights / max(float(weights.max()), 1e-12)
        colours = matplotlib.colormaps["hsv"](np.linspace(0, 1, groups, endpoint=False))
        rgba = np.repeat(colours[:, None], weights.shape[1], 1)  # (G, P, 4)
        rgba[..., 3] = 0.25 + 0.65 * share
        xy = point.xy.cpu().numpy().reshape(-1, 2)
        axis.scatter(  # type: ignore[attr-defined]
            xy[:, 0],
            xy[:, 1],
            s=LARGEST * (0.08 + 0.92 * share.reshape(-1)),
            c=rgba.reshape(-1, 4),
            linewidths=0.3,
            edgecolors="black",
        )
        for colour, width in (("white", 3.0), ("black", 1.4)):
            axis.plot(  # type: ignore[attr-defined]
                *point.centre, marker="+", markersize=11, markeredgewidth=width, color=colour
            )
