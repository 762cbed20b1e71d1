"""One training per folder: a lock on the run that dies with its process."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.engine.deepspeed_config import World

LOCK = ".lock"
#: Seconds to wait for the holder: ranks of a job just killed take a moment to be gone.
PATIENCE = 5.0


@contextmanager
def locked_run(out: Path, world: World) -> Iterator[None]:
    """Hold folder `out` for this job while the block runs. Collective; makes the folder.

    Raises CheckpointError, on every rank, where another job has it.
    """
    handle, holder = _claim(out) if world.is_main else (None, None)
    answer = [holder]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise CheckpointError(
            f"{out}: another training is at work in this folder ({answer[0]}). Wait for its end, "
            "stop it (SIGTERM: it saves, and this command then goes on from there), or choose "
            "another --out"
        )
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _claim(out: Path) -> tuple[int | None, str | None]:
    """(handle that holds the lock, None), or (None, who holds it)."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            # not flock: DataLoader workers, which outlive a killed rank for seconds, inherit that
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # what POSIX allows for "held by another"
            if time.monotonic() > deadline:
                holder = os.read(handle, 200).decode("utf-8", "replace").strip()
                os.close(handle)
                return None, holder or "an unknown process"
            time.sleep(0.1)
        except OSError:
            return handle, None  # a file system without locks (some NFS and Lustre mounts)
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle, None
