"""Ctrl-C typed at a terminal under DeepSpeed's launcher: saved, and status 0."""

import os
import pty
import socket
import sys
import time
from pathlib import Path

import pytest

from groundwork.pretrain.engine.checkpoint import find_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.multirank
def test_ctrl_c_under_deepspeed_saves_and_ends_with_zero(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scripts = Path(sys.executable).parent
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ["PYTHONPATH"] = str(ROOT / "tests" / "namespace")
        os.environ["PATH"] = f"{scripts}:{os.environ['PATH']}"
        os.execv(
            scripts / "deepspeed",
            [
                *("deepspeed", "--num_gpus", "2", "--master_port", str(port)),
                *("launch/pretrain.py", str(tiny_recipe), "--out", str(out)),
                *("--set", "train.steps=5000", "--set", "checkpoint.every_steps=5000"),
            ],
        )
    shown, pressed, deadline = b"", False, time.monotonic() + 170
    try:
        while time.monotonic() < deadline:
            try:
                shown += os.read(terminal, 65536)
            except OSError:
                break  # the last process has closed the terminal
            if not pressed and metrics.is_file() and metrics.stat().st_size:
                os.write(terminal, b"\x03")
                pressed = True
        else:
            os.kill(pid, 9)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
    text = shown.decode(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert "to go on, run" in text
    assert "deepspeed --num_gpus 2 launch/pretrain.py" in text
    assert find_checkpoint(out) is not None
