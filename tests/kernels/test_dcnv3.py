"""DCNv3 against the official code's results, a slow independent oracle and torchvision."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import deform_conv2d

from groundwork.kernels.dcnv3 import choose_backend, dcnv3
from groundwork.kernels.dcnv3_cpu import unavailable
from groundwork.kernels.dcnv3_reference import dcnv3_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "internimage"
CASES = json.loads((GOLDEN / "cases.json").read_text())["op"]


def draw_inputs(
    seed: int = 0,
    *,
    batch: int = 2,
    image_hw: tuple[int, int] = (7, 6),
    output_hw: tuple[int, int] | None = None,
    groups: int = 2,
    depth: int = 3,
    points: int = 9,
    offset_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """value, offset, mask; samples at least 0.1 away from integers if offset_scale is one."""
    g = torch.Generator().manual_seed(seed)
    ho, wo = output_hw or image_hw
    value = torch.randn(batch, *image_hw, groups * depth, generator=g, dtype=torch.float64)
    shape = (batch, ho, wo, groups * points * 2)
    cell = torch.randint(-2, 2, shape, generator=g)
    offset = cell + 0.1 + 0.8 * torch.rand(shape, generator=g, dtype=torch.float64)
    mask = torch.randn(batch, ho, wo, groups * points, generator=g, dtype=torch.float64)
    tensors = (value, offset / offset_scale, mask)
    return [t.to(dtype).requires_grad_() for t in tensors]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("op", [dcnv3, dcnv3_reference])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float64, 2e-6, 2e-6), (torch.float32, 2e-6, 5e-6)],
)
def test_output_and_gradients_are_those_of_the_official_code(
    op: Any, case: dict[str, Any], dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    data = {
        name: torch.from_numpy(array)
        for name, array in np.load(GOLDEN / f"op_{case['name']}.npz").items()
    }
    inputs = [data[name].to(dtype).requires_grad_() for name in ("input", "offset", "mask")]
    output = op(
        *inputs,
        kernel_size=(case["kh"], case["kw"]),
        stride=(case["sh"], case["sw"]),
        padding=(case["ph"], case["pw"]),
        dilation=(case["dh"], case["dw"]),
        groups=case["G"],
        offset_scale=case["offset_scale"],
        remove_center=case["remove_center"],
    )
    gradients = torch.autograd.grad(output, inputs, data["grad_output"].to(dtype))
    for name, actual, limit in (
        ("output", output, tolerance),
        ("grad_input", gradients[0], tolerance),
        ("grad_offset", gradients[1], gradient_tolerance),
        ("grad_mask", gradients[2], gradient_tolerance),
    ):
        error = (actual.detach().double() - data[name].double()).abs().max()
        assert error <= limit * max(1.0, float(data[name].abs().max())), name


def oracle(
    value: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> np.ndarray:
    """One output pixel after the other; bilinear as a sum of hat functions over all pixels."""
    n, height, width, channels = value.shape
    _, ho, wo, _ = offset.shape
    value = value.reshape(n, height, width, groups, channels // groups)
    offset = offset.reshape(n, ho, wo, groups, -1, 2)
    mask = mask.reshape(n, ho, wo, groups, -1)
    center_y, center_x = (d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    output = np.zeros((n, ho, wo, groups, channels // groups))
    for b, y, x, g in product(range(n), range(ho), range(wo), range(groups)):
        p = 0
        for i, j in product(range(kernel[1]), range(kernel[0])):
            if remove_center and 2 * i + 1 == kernel[1] and 2 * j + 1 == kernel[0]:
                continue
            dx, dy = offset[b, y, x, g, p]
            at_x = x * stride[1] - padding[1] + center_x
            at_x += offset_scale * (i * dilation[1] - center_x + dx)
            at_y = y * stride[0] - padding[0] + center_y
            at_y += offset_scale * (j * dilation[0] - center_y + dy)
            hat_x = np.maximum(0, 1 - np.abs(np.arange(width) - at_x))
            hat_y = np.maximum(0, 1 - np.abs(np.arange(height) - at_y))
            sample = np.einsum("h,w,hwd->d", hat_y, hat_x, value[b, :, :, g])
            output[b, y, x, g] += mask[b, y, x, g, p] * sample
            p += 1
        assert p == offset.shape[4]
    return output.reshape(n, ho, wo, channels)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    image=sizes,
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    depth=st.integers(1, 4),
    offset_scale=st.sampled_from([0.5, 1.0, 1.7, 2.0]),
    remove_center=st.booleans(),
    softmax=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_geometry_agrees_with_a_loop_over_pixels(
    batch: int,
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    depth: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    seed: int,
) -> None:
    if remove_center:
        kernel = (3, 3)
    output_hw = tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(image, kernel, stride, padding, dilation, strict=True)
    )
    assume(min(output_hw) >= 1)
    points = kernel[0] * kernel[1] - int(remove_center)
    value, offset, mask = draw_inputs(
        seed,
        batch=batch,
        image_hw=image,
        output_hw=(output_hw[0], output_hw[1]),
        groups=groups,
        depth=depth,
        points=points,
    )
    actual = dcnv3(
        value,
        offset,
        mask,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
    )
    weights = mask.unflatten(-1, (groups, points))
    weights = (weights.exp() / weights.exp().sum(-1, keepdim=True) if softmax else weights).flatten(
        3
    )
    expected = oracle(
        *(t.detach().numpy() for t in (value, offset, weights)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        offset_scale,
        remove_center,
    )
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("offset_scale", [1.0, 2.0])
def test_output_and_gradients_agree_with_torchvision(offset_scale: float) -> None:
    groups, depth, (kh, kw), (ph, pw), (dh, dw) = 2, 3, (3, 5), (1, 3), (1, 2)
    ho, wo = 7 + 2 * ph - dh * (kh - 1), 9 + 2 * pw - dw * (kw - 1)
    inputs = draw_inputs(
        image_hw=(7, 9),
        output_hw=(ho, wo),
        groups=groups,
        depth=depth,
        points=kh * kw,
        offset_scale=offset_scale,
    )
    value, offset, mask = inputs
    ours = dcnv3(
        value,
        offset,
        mask,
        kernel_size=(kh, kw),
        padding=(ph, pw),
        dilation=(dh, dw),
        groups=groups,
        offset_scale=offset_scale,
    )
    # torchvision: rows of the kernel outermost, (y, x), channels first, no offset scale.
    grid_y = torch.arange(kh).view(kh, 1).expand(kh, kw) * dh - dh * (kh - 1) // 2
    grid_x = torch.arange(kw).view(1, kw).expand(kh, kw) * dw - dw * (kw - 1) // 2
    grid = torch.stack((grid_y, grid_x), -1)
    moved = offset.view(2, ho, wo, groups, kw, kh, 2).transpose(4, 5).flip(-1)
    moved = offset_scale * moved + (offset_scale - 1) * grid
    weights = mask.view(2, ho, wo, groups, kw, kh).transpose(4, 5)
    theirs = deform_conv2d(
        value.permute(0, 3, 1, 2).contiguous(),
        moved.flatten(3).permute(0, 3, 1, 2).contiguous(),
        torch.ones(groups * depth, 1, kh, kw, dtype=torch.float64),
        padding=(ph, pw),
        dilation=(dh, dw),
        mask=weights.flatten(3).permute(0, 3, 1, 2).contiguous(),
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("offset_scale", [1.0, 2.0])
def test_gradients_are_those_of_finite_differences(softmax: bool, offset_scale: float) -> None:
    inputs = draw_inputs(
        batch=1, image_hw=(2, 3), groups=2, depth=2, points=8, offset_scale=offset_scale
    )

    def op(*tensors: Tensor) -> Tensor:
        return dcnv3(
            *tensors,
            kernel_size=3,
            groups=2,
            offset_scale=offset_scale,
            remove_center=True,
            softmax=softmax,
        )

    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("zero_offset", [False, True])
def test_gradients_of_the_op_are_those_of_autograd_through_the_reference(
    softmax: bool, zero_offset: bool
) -> None:
    inputs = draw_inputs(1, image_hw=(5, 7))
    if zero_offset:
        inputs[1] = torch.zeros_like(inputs[1], requires_grad=True)
    outputs = [
        op(*inputs, kernel_size=3, groups=2, softmax=softmax) for op in (dcnv3, dcnv3_reference)
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    grad = torch.randn(outputs[0].shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(output, inputs, grad) for output in outputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    # Storage rounds results to 2^-9 and 2^-12; the sums inside are float32.
    [(torch.bfloat16, 3e-3, 3e-3), (torch.float16, 4e-4, 4e-4)],
)
def test_low_precision_storage_sums_in_float32(
    dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    low = [
        t.detach().to(dtype).requires_grad_()
        for t in draw_inputs(2, image_hw=(60, 5), groups=2, depth=8)
    ]
    exact = [t.detach().double().requires_grad_() for t in low]
    outputs = [dcnv3(*inputs, kernel_size=3, groups=2, softmax=True) for inputs in (low, exact)]
    assert outputs[0].dtype == dtype
    assert relative_error(*outputs) < tolerance
    grad = torch.randn(outputs[0].shape).to(dtype)
    gradients = torch.autograd.grad(outputs[0], low, grad)
    expected = torch.autograd.grad(outputs[1], exact, grad.double())
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < gradient_tolerance


def test_dtypes_may_differ_and_each_gradient_has_its_own() -> None:
    value, offset, mask = draw_inputs(dtype=torch.float32)
    inputs = [value.detach().bfloat16().requires_grad_(), offset, mask]
    output = dcnv3(*inputs, kernel_size=3, groups=2)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype


def test_inputs_need_not_be_contiguous() -> None:
    inputs = draw_inputs(3)
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    strided = [t.requires_grad_() for t in strided]
    assert not strided[0].is_contiguous()
    outputs = [dcnv3(*tensors, kernel_size=3, groups=2) for tensors in (inputs, strided)]
    torch.testing.assert_close(*outputs)
    grad = torch.randn(2, 6, 7, 6, dtype=torch.float64).transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad(outputs[0], inputs, grad.contiguous()),
        torch.autograd.grad(outputs[1], strided, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_samples_far_outside_count_as_zero() -> None:
    value, offset, mask = draw_inputs(dtype=torch.float32)
    for far in (-1e3, 1e3, -1e30, 1e30):
        inputs = (value, torch.full_like(offset, far, requires_grad=True), mask)
        output = dcnv3(*inputs, kernel_size=3, groups=2)
        assert output.count_nonzero() == 0
        for grad in torch.autograd.grad(output.sum(), inputs):
            assert grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("far", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_samples_at_no_finite_place_count_as_zero(far: float, backend: str) -> None:
    value, offset, mask = draw_inputs(dtype=torch.float32)
    moved = offset.detach().clone().unflatten(-1, (2, 9, 2))
    moved[0, 2, 3, 0, 4, 1] = far
    inputs = (value, moved.flatten(3).requires_grad_(), mask)
    output = dcnv3(*inputs, kernel_size=3, groups=2, backend=backend)
    without = mask.detach().clone().unflatten(-1, (2, 9))
    without[0, 2, 3, 0, 4] = 0
    expected = dcnv3(value, offset, without.flatten(3), kernel_size=3, groups=2)
    torch.testing.assert_close(output, expected)
    grads = torch.autograd.grad(output.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1].unflatten(-1, (2, 9, 2))[0, 2, 3, 0, 4].count_nonzero() == 0
    assert grads[2].unflatten(-1, (2, 9))[0, 2, 3, 0, 4] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(dtype: torch.dtype) -> None:
    inputs = draw_inputs(batch=0, dtype=dtype)
    output = dcnv3(*inputs, kernel_size=3, groups=2, softmax=True)
    assert output.shape == (0, 7, 6, 6)
    output.sum().backward()
    assert [t.grad is not None and t.grad.shape == t.shape for t in inputs] == [True] * 3


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("softmax", [False, True])
def test_the_op_passes_opcheck(softmax: bool) -> None:
    geometry = ([3, 3], [2, 1], [1, 1], [1, 1], 2, 1.0, False, softmax, "auto")
    inputs = draw_inputs(batch=1, image_hw=(5, 4), output_hw=(3, 4), dtype=torch.float32)
    torch.library.opcheck(torch.ops.groundwork.dcnv3.default, (*inputs, *geometry))
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(
        torch.ops.groundwork.dcnv3_backward.default,
        (torch.randn(1, 3, 4, 6), *detached, *geometry),
    )


def test_meta_tensors_have_the_shape_of_the_output() -> None:
    value, offset, mask = (t.to("meta") for t in draw_inputs(output_hw=(4, 3)))
    output = dcnv3(value, offset, mask, kernel_size=3, stride=2, groups=2)
    assert (output.shape, output.device.type) == ((2, 4, 3, 6), "meta")


def test_a_second_derivative_is_refused_by_the_op_and_right_in_the_reference() -> None:
    inputs = draw_inputs(batch=1, image_hw=(2, 3), groups=1, depth=2)
    output = dcnv3(*inputs, kernel_size=3, groups=1)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="call dcnv3_reference"):
        grad.sum().backward()

    def reference(*tensors: Tensor) -> Tensor:
        return dcnv3_reference(*tensors, kernel_size=3, groups=1)

    assert torch.autograd.gradgradcheck(reference, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"backend": "cudnn"},
            ValueError,
            "'cudnn' is unknown; choose one of auto, cuda, cpu",
        ),
        ({"groups": 4}, ValueError, "6 channels, groups is 4; choose groups that divide"),
        ({"groups": 0}, ValueError, "groups is 0"),
        ({"kernel_size": 5}, ValueError, r"offset has shape \(2, 7, 6, 36\), expected .* P = 25"),
        ({"stride": 2}, ValueError, r"expected \(2, 4, 3, 36\)"),
        ({"stride": 0}, ValueError, "stride is 0; both sizes must be at least 1"),
        ({"padding": (-1, 0)}, ValueError, r"padding is \(-1, 0\)"),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size is 3.0; expected an integer or a pair"),
        ({"kernel_size": "3"}, TypeError, "kernel_size is '3'; expected an integer"),
        ({"kernel_size": (3.5, 3)}, TypeError, r"kernel_size is \(3.5, 3\); expected an integer"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size is \(3, 3, 3\), of 3 numbers"),
        ({"padding": "same"}, TypeError, "padding is 'same'; expected an integer"),
        ({"stride": None}, TypeError, "stride is None; expected an integer"),
        ({"dilation": True}, TypeError, "dilation is True; expected an integer"),
        ({"groups": 2.0}, TypeError, "groups is 2.0; expected an integer"),
        ({"groups": None}, TypeError, "groups is None; expected an integer"),
        ({"softmax": "no"}, TypeError, "softmax is 'no'; expected True or False"),
        ({"remove_center": None}, TypeError, "remove_center is None; expected True or False"),
        ({"offset_scale": "1"}, TypeError, "offset_scale is '1'; expected a number"),
        ({"offset_scale": float("nan")}, ValueError, "offset_scale is nan; expected a finite"),
        ({"offset_scale": float("inf")}, ValueError, "offset_scale is inf; expected a finite"),
        ({"backend": None}, ValueError, "backend None is unknown"),
        ({"kernel_size": (3, 5), "remove_center": True}, ValueError, "kernel_size 3×5"),
        ({"kernel_size": 1, "remove_center": True}, ValueError, "kernel_size 1×1"),
        ({"kernel_size": 9, "padding": 0}, ValueError, "use a larger image or more padding"),
    ],
)
def test_a_wrong_argument_is_named_with_its_remedy(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dcnv3(*draw_inputs(), **{"kernel_size": 3, "groups": 2, **changes})


def test_a_wrong_tensor_is_named_with_its_remedy() -> None:
    value, offset, mask = draw_inputs()
    with pytest.raises(TypeError, match=r"mask is torch.int64; cast it"):
        dcnv3(value, offset, mask.long(), kernel_size=3, groups=2)
    with pytest.raises(ValueError, match=r"expected \(N, H, W, C\), channels last"):
        dcnv3(value[0], offset, mask, kernel_size=3, groups=2)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 7, 6, 17\)"):
        dcnv3(value, offset, mask[..., :17], kernel_size=3, groups=2)
    with pytest.raises(ValueError, match="offset is on meta, value on cpu"):
        dcnv3(value, offset.to("meta"), mask, kernel_size=3, groups=2)
    with pytest.raises(TypeError, match=r"value is a numpy.ndarray; expected a torch.Tensor"):
        dcnv3(value.detach().numpy(), offset, mask, kernel_size=3, groups=2)
    with pytest.raises(TypeError, match=r"mask is None; expected a torch\.Tensor"):
        dcnv3(value, offset, None, kernel_size=3, groups=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"offset has layout torch.sparse_coo; .*to_dense"):
        dcnv3(value, offset.detach().to_sparse(), mask, kernel_size=3, groups=2)


@pytest.mark.parametrize("image_hw", [(7, 6), (7, 5)])
@pytest.mark.parametrize("moved", [False, True])
def test_an_image_with_channels_first_is_recognised(image_hw: tuple[int, int], moved: bool) -> None:
    value, offset, mask = draw_inputs(image_hw=image_hw)
    if moved:
        offset, mask = offset.permute(0, 3, 1, 2), mask.permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"looks like \(N, C, H, W\).*permute\(0, 2, 3, 1\)"):
        dcnv3(value.permute(0, 3, 1, 2), offset, mask, kernel_size=3, groups=2)


def test_integers_of_numpy_are_sizes() -> None:
    inputs = draw_inputs()
    expected = dcnv3(*inputs, kernel_size=3, groups=2, offset_scale=0.5)
    three, two, half = np.int64(3), np.int32(2), np.float32(0.5)
    output = dcnv3(*inputs, kernel_size=three, groups=two, offset_scale=half)  # type: ignore[arg-type]
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_auto_takes_the_first_backend_that_can() -> None:
    tensors = [t.detach() for t in draw_inputs(dtype=torch.float32)]
    assert choose_backend("auto", *tensors) == ("reference" if unavailable() else "cpu")
    assert choose_backend("reference", *tensors) == "reference"
    doubles = [t.double() for t in tensors]
    assert choose_backend("auto", *doubles) == "reference"
    assert choose_backend("auto", *(t.to("meta") for t in tensors)) == "reference"
    with pytest.raises(ValueError, match=r"value is torch\.float64, not float32 or bfloat16"):
        dcnv3(*doubles, kernel_size=3, groups=2, backend="cpu")
