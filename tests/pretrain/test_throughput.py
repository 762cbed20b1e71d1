"""Model FLOP/s: counted against torch's own counter, and the share of a device's peak."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from groundwork.pretrain.engine.throughput import (
    device_peak,
    peak_flops,
    throughput,
    training_flops,
)
from groundwork.pretrain.models.flops import internimage_macs
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", None),  # has no bf16
        ("NVIDIA A10G", None),  # another card than the A10
        ("Some other accelerator", None),
    ],
)
def test_peaks_are_found_by_torchs_names(name: str, bf16: float | None) -> None:
    assert peak_flops(name, "bf16") == bf16


def test_fp32_has_peaks_with_and_without_tensor_cores() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 66.9e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "tf32") == 494.7e12
    assert device_peak(torch.device("cpu"), "bf16") is None


def test_metrics_are_per_device() -> None:
    assert throughput(100.0, 2e12, 2, None) == {"tflops_per_s": 100.0}
    assert throughput(100.0, 2e12, 2, 4e14) == {"tflops_per_s": 100.0, "mfu": 0.25}


def test_a_training_step_is_three_forward_passes_of_the_model() -> None:
    """torch counts its matrix products and convolutions; DCNv3's own sampling is the small rest."""
    config = InternImageConfig(
        num_classes=10, channels=32, depths=(1, 1, 2, 1), groups=(2, 4, 8, 16)
    )
    model = InternImage(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 64, 64)).sum().backward()
    ours = training_flops(internimage_macs(config, 64, 64))
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.06)
