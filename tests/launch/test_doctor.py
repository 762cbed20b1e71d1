"""`groundwork doctor` and `groundwork kernels build`."""

import re
from pathlib import Path

import pytest

from groundwork.kernels import dcnv3_cpu, host_compiler
from groundwork.launch.cli import main


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    host_compiler.load_host_library.cache_clear()
    dcnv3_cpu.unavailable.cache_clear()


@pytest.mark.skipif(host_compiler.find_compiler() is None, reason="no C++ compiler")
def test_kernels_are_built_ahead_and_the_doctor_finds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", "build"]) == 0
    assert "built in" in capsys.readouterr().out
    libraries = list((tmp_path / "kernels").glob("*.so"))
    assert len(libraries) == 5
    assert main(["doctor", "--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "built in" not in shown
    assert len(re.findall(r"built before, in \d+\.\d s", shown)) == len(libraries)
    for library in libraries:
        assert library.name in shown
    for op in ("jpeg_crop", "member reader", "linear_cross_entropy", "contrastive loss"):
        assert op in shown


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


def test_without_a_usable_cache_the_doctor_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path / "file"))
    assert main(["kernels", "build"]) == 1
    assert main(["doctor", "--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "Not a directory" in shown
    assert "set GROUNDWORK_CACHE to a folder you may write to" in shown
