"""How errors reach the person at the terminal: one screen, with cause and remedy."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds in which a launcher ends the other ranks of its node after one has failed.
LAUNCHER_S = 10.0

#: What a person can do about an error of the operating system. Any other one is a defect of ours,
#: or a connection's, and keeps its traceback.
REMEDIES = {
    errno.EACCES: "change its permissions, or choose another place",
    errno.EAGAIN: "wait until that process has ended, or choose another place",
    errno.EDQUOT: "free some of your quota, or choose another place",
    errno.EEXIST: "move it away, or choose another name",
    errno.EFBIG: "choose a place on another file system",
    errno.EIO: "the disk itself fails: check it, and choose another place",
    errno.EISDIR: "name a file, not a folder",
    errno.ELOOP: "a symbolic link there leads to itself: mend it",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the spelling, or make it first",
    errno.ENOSPC: "free some space there, or choose another place",
    errno.ENOTDIR: "a part of this path is a file: choose another path",
    errno.ENOTEMPTY: "move what is there away, or choose another name",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
}
#: Of these, the ones that need no file to be understood.
NAMELESS = (errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EROFS)


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors with a message for the user; anything else is a defect and keeps its traceback.

    Imported when an error is at hand, so that a command loads only what it needs.
    """
    from groundwork.data.knowledge.index import KnowledgeError
    from groundwork.data.samples import SampleError
    from groundwork.data.shard_index import ShardError
    from groundwork.data.sources.errors import SourceError
    from groundwork.data.storage_errors import StorageError
    from groundwork.data.stream import UnreadableDataError
    from groundwork.data.text import TokenizerError
    from groundwork.kernels.optional_backends import BackendError
    from groundwork.pretrain.downstream.finetuning.engine import EngineError
    from groundwork.pretrain.engine.checkpoint import CheckpointError
    from groundwork.pretrain.recipe import RecipeError
    from groundwork.pretrain.weights.export_error import ExportError

    return (
        BackendError,
        CheckpointError,
        EngineError,
        ExportError,
        KnowledgeError,
        RecipeError,
        SampleError,
        ShardError,
        SourceError,
        StorageError,
        TokenizerError,
        UnreadableDataError,
        *agreed_errors(),
    )


def agreed_errors() -> tuple[type[Exception], ...]:
    """Errors that all ranks agree upon before they raise them: rank 0 speaks for them."""
    from groundwork.data.stream import BadDataError
    from groundwork.pretrain.engine.step_means import DivergedError

    return (BadDataError, DivergedError)


def reporting(action: Callable[[], int], *, rank: int = 0) -> int:
    """Run `action`; turn an expected error into a message on stderr and exit status 1.

    SIGTERM, where `action` does not handle it itself, unwinds it like Ctrl-C and gives 143, so that
    half-written folders are removed.
    """
    try:
        with _sigterm_unwinds():
            return action()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except _Terminated:
        if rank == 0:
            print("\nterminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:
        message = _told(error)
        if message is not None:
            if rank == 0 or not isinstance(error, agreed_errors()):
                _wait_for_rank_0(rank)
                who = f" (rank {rank})" if rank else ""
                print(f"\nerror{who}: {message}", file=sys.stderr, flush=True)
            return 1
        if isinstance(error, RuntimeError) and "onnection" in str(error) and "peer" in str(error):
            print(f"rank {rank}: another rank has ended, so does this one", file=sys.stderr)
            return 1
        raise


def require_folder(path: Path) -> None:
    """Raise the OSError that making the folder `path` and writing to it would meet."""
    present = path
    while not present.exists() and present != present.parent:
        present = present.parent
    if not present.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(present))
    if not os.access(present, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(present).f_flag & os.ST_RDONLY
        number = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(present))


def require_file(path: Path) -> None:
    """Raise the OSError that writing the file `path` would meet."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    require_folder(path.parent)


class _Terminated(BaseException):
    """SIGTERM."""


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def unwind(number: int, _frame: object) -> None:
        if os.getpid() != owner:  # a forked worker has nothing of its own to clean up
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # a second one would cut the cleaning short
        raise _Terminated

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) in (unwind, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait_for_rank_0(rank: int) -> None:
    """Let the first rank of the node speak for all.

    What one rank finds wrong with files, the others mostly find, too. Ranks share nothing to agree
    by at this point, but a launcher that sees one of them fail ends the others: a rank that is
    still there after a while is alone with its error, and tells it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", rank) or 0)
    if rank and local_rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not a request to save and stop any more
        time.sleep(LAUNCHER_S)


def _told(error: Exception) -> str | None:
    """What to tell the person at the terminal; None for a defect, which keeps its traceback."""
    if isinstance(error, expected_errors()):
        return _message(error)
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    if error.filename is None and error.errno not in NAMELESS:
        return None
    file = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{file}{error.strerror}; {REMEDIES[error.errno]}"


def _message(error: BaseException) -> str:
    """The message alone, where a DataLoader worker has wrapped it in its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
    return text
