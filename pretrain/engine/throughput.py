"""How much of a device's arithmetic a run uses: model FLOP/s over the peak (MFU).

As in PaLM (arXiv 2204.02311, appendix B): the numerator counts what the model needs, forward and
backward, and not what is computed again because activations were not kept.
"""

import re
from typing import Final, Literal

import torch

Arithmetic = Literal["bf16", "tf32", "fp32"]

#: Pattern of torch's device name -> dense peak in FLOP/s, from NVIDIA's data sheets; the first that
#: matches counts. A card without the arithmetic has none.
PEAKS: Final[tuple[tuple[str, dict[Arithmetic, float]], ...]] = (
    (r"\bH100 PCIe\b", {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12}),
    (r"\bH100 NVL\b", {"bf16": 835e12, "tf32": 417e12, "fp32": 60e12}),
    (r"\b(H100|H200|GH200)\b", {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}),
    (r"\b(A100|A800)\b", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    (r"\bA30\b", {"bf16": 165e12, "tf32": 82e12, "fp32": 10.3e12}),
    (r"\bA10\b", {"bf16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12}),
    (r"\bL40S\b", {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12}),
    (r"\bL4\b", {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12}),
    (r"\bV100\b", {"fp32": 15.7e12}),
)


def training_flops(forward_macs: float) -> float:
    """Of one sample's forward and backward pass. forward_macs: multiply-accumulates of the forward.

    A multiply-accumulate is two operations; the backward pass costs two forward ones, by the
    activations and by the weights. Activation checkpointing computes a fourth on the device, which
    is no work of the model's.
    """
    return 3 * 2 * forward_macs


def peak_flops(device_name: str, arithmetic: Arithmetic) -> float | None:
    """Dense peak in FLOP/s of a device, by the name torch gives it; None if it is not known."""
    for pattern, peaks in PEAKS:
        if re.search(pattern, device_name):
            return peaks.get(arithmetic)
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Of this process's device in a recipe's precision; None on a CPU."""
    if device.type != "cuda":
        return None
    arithmetic: Arithmetic = "bf16"
    if precision == "fp32":
        arithmetic = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return peak_flops(torch.cuda.get_device_name(device), arithmetic)


def throughput(
    samples_per_s: float, flops_per_sample: float, devices: int, peak: float | None
) -> dict[str, float]:
    """`tflops_per_s` of each device and, where its peak is known, `mfu`, a share of it.

    samples_per_s: of all devices together.
    """
    per_device = samples_per_s * flops_per_sample / devices
    metrics = {"tflops_per_s": per_device / 1e12}
    return metrics if peak is None else {**metrics, "mfu": per_device / peak}
