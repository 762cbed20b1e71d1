"""`groundwork doctor` and `groundwork kernels build`."""

from pathlib import Path

import pytest

from groundwork.kernels import dcnv3_cpu, host_compiler
from groundwork.launch.cli import main


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    host_compiler.load_host_library.cache_clear()
    dcnv3_cpu.unavailable.cache_clear()


@pytest.mark.skipif(host_compiler.find_compiler() is None, reason="no C++ compiler")
def test_kernels_are_built_ahead_and_the_doctor_finds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "build"]) == 0
    assert "built in" in capsys.readouterr().out
    (library,) = (tmp_path / "kernels").glob("*.so")
    assert main(["doctor", "--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "built before" in shown
    assert library.name in shown


def test_without_a_compiler_building_fails_and_the_doctor_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["kernels", "build"]) == 1
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "reference" in shown
    assert "apt-get install g++" in shown
    assert "torch 2." in shown
