"""`groundwork inspect sampling`: positions of the real op, and receptive fields within theirs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from groundwork.kernels.dcnv3 import dcnv3
from groundwork.kernels.dcnv3_geometry import make_geometry
from groundwork.kernels.dcnv3_reference import sampling_positions
from groundwork.launch.cli import main
from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.inspection.backbone_source import find_backbone
from groundwork.pretrain.inspection.receptive_field import (
    effective_receptive_field,
    side_of_share,
)
from groundwork.pretrain.inspection.sampling import block_of, sampled_points, stride_of
from groundwork.pretrain.models.internimage import InternImage
from groundwork.pretrain.models.internimage_config import InternImageConfig
from groundwork.pretrain.weights.internimage import save_internimage

TINY = InternImageConfig(num_classes=0, channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8))


def build(config: InternImageConfig, seed: int = 0) -> InternImage:
    torch.manual_seed(seed)
    return InternImage(config).eval()


def grid(centre: tuple[float, float], step: float) -> Tensor:
    """The 3x3 points around a pixel, columns outermost: (9, 2)."""
    steps = (-step, 0.0, step)
    return torch.tensor([(centre[0] + x, centre[1] + y) for x in steps for y in steps])


# ---- positions ----


@settings(deadline=None, max_examples=25)
@given(
    groups=st.integers(1, 3),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    remove_center=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_op_reads_an_image_of_coordinates_at_the_positions(
    groups: int, scale: float, remove_center: bool, seed: int
) -> None:
    """An image whose values are its coordinates is sampled to the position itself."""
    generator = torch.Generator().manual_seed(seed)
    height, width = 12, 10
    geometry = make_geometry(3, 1, None, 1, groups, scale, remove_center)
    points = geometry.num_points
    offset = torch.rand(1, height, width, groups * points * 2, generator=generator) * 2 - 1
    positions = sampling_positions(offset, geometry)  # (1, H, W, G, P, 2)
    lines, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    value = torch.stack((columns, lines), -1).float().repeat(1, 1, groups)[None]
    inside = ((positions >= 0) & (positions <= torch.tensor([width - 1, height - 1]))).all(-1)
    for p in range(points):
        mask = torch.zeros(1, height, width, groups, points)
        mask[..., p] = 1
        read = dcnv3(
            value,
            offset,
            mask.flatten(3),
            kernel_size=3,
            groups=groups,
            offset_scale=scale,
            remove_center=remove_center,
        ).unflatten(-1, (groups, 2))
        counted = inside[..., p].unsqueeze(-1)
        torch.testing.assert_close(
            read * counted, positions[..., p, :] * counted, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("core", ["dcnv3", "dcnv4"])
def test_a_new_layer_samples_the_regular_grid(stage: int, scale: float, core: str) -> None:
    model = build(replace(TINY, offset_scale=scale, core=core))  # type: ignore[arg-type]
    stride = stride_of(stage)
    (point,) = sampled_points(model, torch.randn(3, 64, 96), stage, None, [(33.0, 30.0)])
    assert point.centre == (round(33 / stride) * stride, round(30 / stride) * stride)
    assert point.xy.shape == (TINY.groups[stage], 9, 2)
    for group in point.xy:
        assert torch.equal(group, grid(point.centre, scale * stride))
    uniform = 1 / 9 if core == "dcnv3" else 0.0
    torch.testing.assert_close(point.weights, torch.full_like(point.weights, uniform))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_offset_of_one_pixel_moves_all_points_by_the_stride(scale: float) -> None:
    model = build(replace(TINY, offset_scale=scale))
    dcn = block_of(model, 2, 1).dcn
    with torch.no_grad():
        dcn.offset.bias.fill_(1.0)
    (point,) = sampled_points(model, torch.randn(3, 64, 64), 2, 1, [(32.0, 32.0)])
    expected = grid((32.0, 32.0), 16 * scale) + 16 * scale
    assert torch.equal(point.xy, expected.expand_as(point.xy))
    (other,) = sampled_points(model, torch.randn(3, 64, 64), 2, 0, [(32.0, 32.0)])
    assert torch.equal(other.xy[0], grid((32.0, 32.0), 16 * scale))


def test_without_its_centre_a_layer_samples_eight_points() -> None:
    model = build(replace(TINY, remove_center=True))
    (point,) = sampled_points(model, torch.randn(3, 64, 64), 1, 0, [(32.0, 32.0)])
    whole = grid((32.0, 32.0), 8.0)
    assert torch.equal(point.xy[0], torch.cat((whole[:4], whole[5:])))


def test_a_layer_pixel_is_in_the_middle_of_what_acts_on_it() -> None:
    """The stride times the index is the centre of a downsampled pixel's receptive field."""
    model = build(replace(TINY, depths=(1, 1, 1, 1)))
    image = torch.randn(3, 160, 160)
    for stage in range(3):
        field = effective_receptive_field(model, [image], stage, 0, (80.0, 80.0))
        lines, columns = torch.nonzero(field, as_tuple=True)
        assert (int(lines.min()) + int(lines.max())) / 2 == 80
        assert (int(columns.min()) + int(columns.max())) / 2 == 80


@pytest.mark.parametrize(
    ("stage", "block", "message"), [(4, None, "stages 0 to 3"), (2, 2, "blocks 0 to 1")]
)
def test_layers_that_are_not_there_are_refused(stage: int, block: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled_points(build(TINY), torch.randn(3, 64, 64), stage, block, [(0.0, 0.0)])


def test_points_outside_of_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="outside of the image of 64 × 32"):
        sampled_points(build(TINY), torch.randn(3, 32, 64), 0, None, [(10.0, 32.0)])


# ---- receptive fields ----


@pytest.mark.parametrize(("depth", "radius"), [(1, 7), (3, 15)])
def test_the_field_of_few_blocks_lies_inside_of_the_theoretical_one(
    depth: int, radius: int
) -> None:
    """Stem: 1 + 2 pixels. A new block: one pixel of the layer, since its offsets do not move."""
    model = build(replace(TINY, depths=(depth, 1, 1, 1)))
    images = torch.randn(2, 3, 64, 64)
    field = effective_receptive_field(model, images, 0, None, (32.0, 32.0))
    assert field.sum().item() == pytest.approx(1, abs=1e-5)
    lines, columns = torch.nonzero(field, as_tuple=True)
    reach = torch.maximum((lines - 32).abs(), (columns - 32).abs())
    assert int(reach.max()) == radius
    assert side_of_share(field, (32.0, 32.0), 1.0 - 1e-9) <= 2 * radius + 1


def test_a_wider_grid_has_a_wider_field() -> None:
    images = torch.randn(2, 3, 128, 128)
    narrow, wide = (
        effective_receptive_field(build(replace(TINY, offset_scale=s)), images, 2)
        for s in (1.0, 2.0)
    )
    assert side_of_share(wide, (64, 64), 0.9) > side_of_share(narrow, (64, 64), 0.9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Pixels that the field says have no effect have none; one that it says has, has."""
    model = build(replace(TINY, depths=(1, 1, 1, 1))).double()
    image = torch.randn(3, 64, 64, dtype=torch.float64)
    field = effective_receptive_field(model, [image], 0, 0, (32.0, 32.0))
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        outputs.append(output[0, 8, 8])

    handle = block_of(model, 0, 0).register_forward_hook(keep)
    with torch.no_grad():
        for x, y in ((32, 32), (39, 32), (40, 32)):
            for change in (0.0, 1e-3):
                moved = image.clone()
                moved[:, y, x] += change
                model.forward_intermediates(moved[None], indices=[0], stop_early=True)
            difference = (outputs[-1] - outputs[-2]).abs().max().item()
            assert (difference > 1e-9) == (field[y, x].item() > 0), (x, y)
    handle.remove()


def test_shares_are_of_squares() -> None:
    field = torch.zeros(9, 9)
    field[4, 4], field[4, 6], field[0, 0] = 0.5, 0.25, 0.25
    assert [side_of_share(field, (4, 4), s) for s in (0.5, 0.6, 0.9)] == [1, 5, 9]


# ---- models and the command ----


def test_official_weights_are_recognised_by_their_shapes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = InternImage(replace(InternImageConfig.variant("t"), num_classes=3))
    save_internimage(model, tmp_path / "t.pth")
    found, name = find_backbone(tmp_path / "t.pth")
    assert name == str(tmp_path / "t.pth")
    for key, value in found.state_dict().items():
        expected = model.state_dict().get(key, torch.ones_like(value))  # a scale there was not
        assert torch.equal(value, expected), key


def test_weights_of_no_published_size_are_refused(tmp_path: Path) -> None:
    save_internimage(build(TINY), tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match="no published size"):
        find_backbone(tmp_path / "tiny.safetensors")


def picture(path: Path, width: int = 80, height: int = 60) -> Path:
    torch.manual_seed(0)
    pixels = (torch.rand(height, width, 3) * 255).byte().numpy()
    Image.fromarray(pixels).save(path)
    return path


def test_the_command_writes_a_picture_and_positions(tmp_path: Path) -> None:
    out, record = tmp_path / "new" / "maps.png", tmp_path / "maps.json"
    command = ["inspect", "sampling", "--variant", "t", "--size", "64", "--stage", "1"]
    command += ["--image", str(picture(tmp_path / "a.png")), "--points", "20,20 60,40"]
    command += ["--out", str(out), "--json", str(record)]
    assert main(command) == 0
    with Image.open(out) as drawn:
        assert drawn.width > 400
        assert len(drawn.convert("RGB").getcolors(1 << 24) or []) > 100
    values = json.loads(record.read_text())
    assert (values["input_size"], values["picture_size"], values["stride"]) == (
        [96, 64],
        [80, 60],
        8,
    )
    first = values["points"][0]
    assert torch.tensor(first["weights"]).shape == (8, 9)
    centre = first["input_centre"]
    assert torch.equal(torch.tensor(first["input_xy"])[0], grid((centre[0], centre[1]), 8.0))
    assert values["points"][0]["picture_xy"][0][4] == pytest.approx([20, 20], abs=4)
    assert 0 < values["receptive_field"]["side_of_half"] <= 191


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = str(picture(tmp_path / "a.png")), str(tmp_path / "o.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for options, message in (
        (["--image", image], "give a --checkpoint"),
        (["--image", image, "--variant", "huge"], "there is no variant"),
        (["--image", image, "--variant", "t", "--points", "3"], "is no point"),
        (["--image", image, "--variant", "t", "--points", "80,3"], "outside of the picture"),
        (["--image", image, "--variant", "t", "--block", "18"], "the blocks 0 to 17"),
        (["--image", str(broken), "--variant", "t"], "not a picture"),
        (["--image", image, "--checkpoint", str(tmp_path)], "neither a run"),
    ):
        assert main(["inspect", "sampling", "--out", out, *options]) != 0
        told = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in told, (options, told)
    assert not Path(out).exists()
