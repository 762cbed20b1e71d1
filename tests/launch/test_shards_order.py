"""`groundwork shards order`."""

from pathlib import Path

from typer.testing import CliRunner

from groundwork.launch.cli import app


def test_blocks_are_compared(tiny_shards: Path) -> None:
    result = CliRunner().invoke(app, ["shards", "order", str(tiny_shards), "--batch", "16"])
    assert result.exit_code == 0, result.output
    assert "96 samples in 3 shards" in result.output
    assert "null (all)" in result.output


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["shards", "order", str(tmp_path)])
    assert result.exit_code == 1
    assert "no data set and no tar here" in result.output
