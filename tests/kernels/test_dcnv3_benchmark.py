"""The benchmark of the GPU, without one: its floors are the published ones, and it runs."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize(
    ("model", "forward", "backward", "with_sums"),
    [("T", 0.35, 0.60, 1.17), ("B", 0.65, 1.12, 2.18), ("H", 2.16, 3.56, 8.12)],
)
def test_floors_of_all_blocks_are_those_of_the_published_table(
    load: Callable[[str], Any], model: str, forward: float, backward: float, with_sums: float
) -> None:
    floors = load("dcnv3_floors")
    least = floors.floor_of_model(model, batch=64, element_bytes=2)
    milliseconds = [size / floors.DRAM for size in least]
    assert milliseconds == pytest.approx([forward, backward, with_sums], rel=0.01)


def test_the_results_of_a_device_and_commit_have_a_file_of_their_own(
    load: Callable[[str], Any],
) -> None:
    path = load("dcnv3_gpu").result_path("NVIDIA H100 80GB HBM3", "0123abc")
    assert path == BENCH / "results" / "gpu-nvidia-h100-80gb-hbm3-0123abc.json"


def test_the_benchmark_runs_to_its_end(
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the CPU under the name of a GPU: small models, a clock that always says 2 ms."""
    gpu, floors = load("dcnv3_gpu"), load("dcnv3_floors")

    class Clock:
        def __init__(self, runs: int, seconds: float) -> None:
            self.runs = runs

        def milliseconds(self, run: Callable[[], object]) -> float:
            run()
            return 2.0

    def without_bfloat16(*tensors: Any) -> Any:
        if tensors[0].dtype == torch.bfloat16:
            raise RuntimeError("no bfloat16 here")
        if tensors[0].shape[0] > 2:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return gpu.grid_sample_core(*tensors)

    small = dict.fromkeys("TBH", (8, 2, (1, 2)))
    for module in (gpu, floors):
        monkeypatch.setattr(module, "INTERNIMAGE", small)
    monkeypatch.setitem(gpu.PEERS, "grid_sample", without_bfloat16)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "Clock", Clock)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda clock: 2.5e9)
    monkeypatch.setattr(gpu, "choose_backend", lambda *arguments: "cuda")
    monkeypatch.setattr(gpu.autotune, "table_of", lambda *a: SimpleNamespace(entries={}))
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a CPU")

    out = tmp_path / "results" / "gpu.json"
    gpu.main(out, batch=4, quick=True)
    result = json.loads(out.read_text())
    assert len(result["shapes"]) == 8
    assert [row["forward_ms"] for row in result["models"]] == [6.0] * 4  # 3 blocks of 2 ms
    first = result["shapes"][0]
    assert first["grid_sample"] == {
        **{"forward_ms": 4.0, "backward_ms": 4.0, "extra_bytes": 0.0},
        **{"images": 2, "dtype": "float32"},
    }
    # 56 x 56 of 8 channels in 2 groups: value, output, and 2 x 27 numbers of samples
    assert first["forward"]["floor_bytes"] == 4 * 56 * 56 * (8 + 8 + 54) * 2
    assert first["backward"]["times_floor"] == pytest.approx(2 / first["backward"]["floor_ms"])
    assert "2 images fit; its times are scaled" in " ".join(capsys.readouterr().out.split())
