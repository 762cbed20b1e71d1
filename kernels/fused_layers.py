"""What the fused layers share: which one runs, in which dtype, and how their kernels are called.

A fused layer is a registered op for each backend (`cpu`, `cuda`) that reads its parameters in
float32. The reference is no op but plain PyTorch, so that where no kernel can run, a layer is what
it was: in its dtypes under autocast, its derivatives of every order, and its trace.
"""

import ctypes
import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Final, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from groundwork.kernels import cuda_compiler
from groundwork.kernels.cuda_compiler import LEAST_CAPABILITY
from groundwork.kernels.host_compiler import HostCompileError, load_host_library

#: Storage that each backend has, with its number in the sources.
DTYPES: Final[Mapping[str, Mapping[torch.dtype, int]]] = {
    "cpu": {torch.float32: 0, torch.bfloat16: 1},
    "cuda": {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2},
}
BACKENDS: Final = ("auto", "cuda", "cpu", "reference")


def choose_backend(
    op: str,
    name: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    limit: Callable[[str], str | None],
) -> str:
    """The backend that runs: `name` itself, or with "auto" that of the device if it can.

    device: of all tensors; dtypes: of what is stored; limit: why a backend cannot take the shape.
    """
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    wanted = device.type if name == "auto" else name
    if wanted not in DTYPES:
        return "reference"
    reason = None
    if wanted != device.type:
        reason = f"the tensors are on {device}"
    elif unknown := [str(d) for d in dtypes if d not in DTYPES[wanted]]:
        known = " or ".join(str(d) for d in DTYPES[wanted])
        reason = f"a tensor is {unknown[0]}, not {known}"
    elif in_functorch():
        reason = "vmap, func.grad and their like have no rule for it"
    reason = reason or limit(wanted) or unavailable(wanted, device.index, op)
    if reason is None:
        return wanted
    if name == "auto":
        return "reference"
    raise ValueError(f"{op}: backend {name!r} cannot run: {reason}; use backend='auto'")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable(backend: str, device: int | None, op: str | None = None) -> str | None:
    """Why a backend's kernels of an op cannot run on this machine; None where they can.

    op: None asks for those of all ops.
    """
    return _unavailable(backend, device, op)


@cache
def _unavailable(backend: str, device: int | None, op: str | None) -> str | None:
    if backend == "cuda":  # one source has the kernels of all ops
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"its compute capability is {capability}, below {LEAST_CAPABILITY}"
        return cuda_compiler.unavailable()
    # the ops' files import this one
    from groundwork.kernels import depthwise_norm_gelu_cpu, residual_norm_cpu

    libraries: dict[str, Callable[[], object]] = {
        "depthwise_norm_gelu": depthwise_norm_gelu_cpu.library,
        "residual_norm": residual_norm_cpu.library,
    }
    if op is None:
        return next(filter(None, (_unavailable(backend, device, each) for each in libraries)), None)
    try:
        libraries[op]()
    except HostCompileError as error:
        warnings.warn(f"{op}: the layers run unfused on the CPU: {error}", stacklevel=2)
        return str(error)
    return None


def in_functorch() -> bool:
    """Whether vmap, func.grad or another transform of functorch is at work."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_second_derivative(op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op}: the op has first derivatives only, and a second one was asked for "
        f"(create_graph=True); call {op}_reference there, it has all orders"
    )


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are computed now: nothing traces, fakes or counts the op.

    An autograd function then does what the registered op would, with less overhead.
    """
    return (
        not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )


def normed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `F.layer_norm(x)`: under autocast CUDA gives float32, the CPU what it got."""
    kind = x.device.type
    if kind == "cuda" and torch.is_autocast_enabled(kind):
        return torch.float32
    return x.dtype


def is_cast(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of a linear layer or a convolution of x."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return False
    return torch.is_autocast_enabled(kind)


def convolved_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `F.conv2d(x)` and `F.linear(x)`: that of autocast, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if is_cast(x) else x.dtype


def layer_norm(y: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` over the channels, of parameters in any dtype: as the kernels take them."""
    shape = (y.shape[-1],)
    if y.dtype == scale.dtype == shift.dtype:
        return F.layer_norm(y, shape, scale, shift, eps)
    dtype = torch.promote_types(y.dtype, torch.promote_types(scale.dtype, shift.dtype))
    normed = F.layer_norm(y.to(dtype), shape, scale.to(dtype), shift.to(dtype), eps)
    return normed.to(normed_dtype(y))


def check_parameters(op: str, x: Tensor, shapes: Mapping[str, tuple[Tensor, int]]) -> None:
    """Each parameter is given with its length."""
    for name, (tensor, length) in shapes.items():
        check_tensor(op, name, tensor, x)
        if tensor.shape != (length,):
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({length},) "
                f"for x of shape {tuple(x.shape)}"
            )


def check_tensor(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """A floating-point tensor where x is. x itself comes first."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {_called(tensor)}, expected a torch.Tensor")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected a floating-point dtype")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device}, where x is")


def check_eps(op: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps is {_called(eps)}, expected a number such as 1e-6")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {eps}, expected a number from 0 on, such as 1e-6")


def _called(value: object) -> str:
    kind = type(value)
    if kind.__module__ == "numpy":
        return f"a numpy.{kind.__name__} (torch.as_tensor makes it a tensor)"
    return "None" if value is None else f"a {kind.__name__}"


def wide(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it: float32, contiguous."""
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.detach().float().contiguous()


@cache
def host_library(
    source: str, size_function: str, problem: type[ctypes.Structure], instructions: str | None
) -> ctypes.CDLL:
    """The compiled kernels of a file in `csrc/`, whose problem has the size of `problem`."""
    library = load_host_library(source, instructions)
    try:
        function = library[size_function]
    except AttributeError as error:
        raise HostCompileError(
            f"{library._name} has no {size_function}; delete it, and it is compiled again"
        ) from error
    function.restype = ctypes.c_int64
    if (size := function()) != ctypes.sizeof(problem):
        raise HostCompileError(
            f"{library._name} expects problems of {size} bytes, not {ctypes.sizeof(problem)}; "
            "delete it, and it is compiled again"
        )
    return library


def call_host(
    library: ctypes.CDLL, name: str, problem: ctypes.Structure, *tensors: Tensor | None
) -> None:
    """Run a function of a library on tensors (None: a null pointer)."""
    function = getattr(library, name)
    if function.argtypes is None:
        function.argtypes = [ctypes.c_void_p] * (1 + len(tensors))
    if function(ctypes.byref(problem), *(None if t is None else t.data_ptr() for t in tensors)):
        raise MemoryError(f"{name}: no memory for a few rows per thread; use fewer threads")
