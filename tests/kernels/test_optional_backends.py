"""The choice of AdamW's and LayerNorm's implementations."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from groundwork.kernels import doctor
from groundwork.kernels.optional_backends import (
    BackendError,
    apex_problem,
    choose_adamw,
    choose_layer_norm,
)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path where a package `apex` can be put."""
    before = {name for name in sys.modules if name.split(".")[0] == "apex"}
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "apex" and n not in before]:
        del sys.modules[name]


def put_apex(folder: Path, modules: list[str]) -> None:
    for module in ("", *modules):
        package = folder / "apex" / module
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(
            "class FusedAdam:\n    pass\n"
            "import torch\nclass FusedLayerNorm(torch.nn.LayerNorm):\n    pass\n"
        )


def test_auto_is_torchs_and_fused_on_a_gpu_only() -> None:
    assert choose_adamw("auto", "cpu").backend == "torch"
    assert choose_adamw("auto", "cuda").backend == "torch_fused"


@pytest.mark.parametrize("backend", ["torch", "torch_fused"])
def test_the_implementations_take_the_same_steps(backend: str) -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    results = []
    for name in ("torch", backend):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3))
        optimizer = choose_adamw(name, "cpu").build([{"params": [weight]}], **settings)  # type: ignore[arg-type]
        for step in range(3):
            weight.grad = torch.full_like(weight, step + 1.0)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["apex", "deepspeed"])
def test_gpu_implementations_are_refused_on_the_cpu(backend: str) -> None:
    with pytest.raises(BackendError, match=f"'{backend}' needs a GPU; use 'auto'"):
        choose_adamw(backend, "cpu")  # type: ignore[arg-type]


def test_a_missing_apex_is_named(installed: Path) -> None:
    if apex_problem() is None:
        pytest.skip("apex is installed")
    with pytest.raises(BackendError, match="apex is not installed"):
        choose_adamw("apex", "cuda")


def test_the_other_package_called_apex_is_not_mistaken_for_nvidias(installed: Path) -> None:
    put_apex(installed, [])
    with pytest.raises(BackendError, match=r"not NVIDIA's: it has no apex\.optimizers"):
        choose_adamw("apex", "cuda")


def test_nvidias_apex_is_recognised_by_its_submodules(installed: Path) -> None:
    put_apex(installed, ["optimizers", "normalization", "multi_tensor_apply"])
    assert choose_adamw("apex", "cuda").backend == "apex"


def test_layer_norm_is_torchs_unless_apex_is_asked_for(installed: Path) -> None:
    for backend in ("auto", "torch"):
        choice = choose_layer_norm(backend, "cuda")  # type: ignore[arg-type]
        module = choice.build(6, 1e-6)
        assert (choice.backend, type(module)) == ("torch", torch.nn.LayerNorm)
        assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}
    put_apex(installed, ["optimizers", "normalization", "multi_tensor_apply"])
    choice = choose_layer_norm("apex", "cuda")
    assert type(choice.build(6, 1e-6)).__name__ == "FusedLayerNorm"


def test_a_layer_norm_that_cannot_run_says_why(installed: Path) -> None:
    with pytest.raises(BackendError, match="layer_norm backend 'apex' needs a GPU; use 'auto'"):
        choose_layer_norm("apex", "cpu")
    with pytest.raises(BackendError, match="'flash' is unknown; choose one of auto, torch, apex"):
        choose_layer_norm("flash", "cuda")  # type: ignore[arg-type]
    put_apex(installed, [])
    with pytest.raises(BackendError, match=r"not NVIDIA's: it has no apex\.optimizers"):
        choose_layer_norm("apex", "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["nonsense", "Apex", "DeepSpeed", "", None])
def test_an_unknown_adamw_is_refused_on_every_device(backend: str, device: str) -> None:
    names = "auto, torch, torch_fused, apex, deepspeed"
    with pytest.raises(BackendError, match=f"{backend!r} is unknown; choose one of {names}"):
        choose_adamw(backend, device)  # type: ignore[arg-type]


def test_a_device_may_have_a_number() -> None:
    assert choose_adamw("auto", "cuda:0").backend == "torch_fused"
    assert choose_adamw("auto", "cpu:0").backend == "torch"
    assert choose_adamw("auto", str(torch.device("cuda", 1))).backend == "torch_fused"
    assert choose_adamw("deepspeed", "cuda:0").backend == "deepspeed"
    assert choose_layer_norm("auto", "cuda:0").backend == "torch"


@pytest.mark.parametrize("device", ["tpu", "mps", "meta", "cuda:x", "", None])
def test_an_unknown_device_is_refused(device: str) -> None:
    for choose in (choose_adamw, choose_layer_norm):
        with pytest.raises(BackendError, match=f"device '{device}' is unknown; give 'cpu', 'cuda'"):
            choose("auto", device)


def test_an_apex_that_raises_when_imported_is_a_reason_not_a_crash(installed: Path) -> None:
    put_apex(installed, ["optimizers", "normalization", "multi_tensor_apply"])
    (installed / "apex" / "__init__.py").write_text("raise RuntimeError('built for CUDA 11')")
    problem = "apex does not import (RuntimeError: built for CUDA 11)"
    assert apex_problem() == problem
    with pytest.raises(BackendError, match=r"built for CUDA 11.*; use 'auto'"):
        choose_layer_norm("apex", "cuda")
    statuses = [doctor._adamw("cpu"), doctor._layer_norm("cpu")]
    assert all(problem in status.reason for status in statuses)
