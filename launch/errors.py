"""How errors reach the person at the terminal: one screen, with cause and remedy."""

import sys
from collections.abc import Callable


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors with a message for the user; anything else is a defect and keeps its traceback.

    Imported when an error is at hand, so that a command loads only what it needs.
    """
    from groundwork.data.knowledge.index import KnowledgeError
    from groundwork.data.samples import SampleError
    from groundwork.data.shard_index import ShardError
    from groundwork.data.sources.errors import SourceError
    from groundwork.data.stream import UnreadableDataError
    from groundwork.data.text import TokenizerError
    from groundwork.pretrain.weights.huggingface import ExportError

    return (
        ExportError,
        KnowledgeError,
        SampleError,
        ShardError,
        SourceError,
        TokenizerError,
        UnreadableDataError,
        *agreed_errors(),
    )


def agreed_errors() -> tuple[type[Exception], ...]:
    """Errors that all ranks raise together: rank 0 speaks for them."""
    from groundwork.data.stream import BadDataError
    from groundwork.pretrain.engine.checkpoint import CheckpointError
    from groundwork.pretrain.engine.trainer import DivergedError
    from groundwork.pretrain.recipe import RecipeError

    return (BadDataError, CheckpointError, DivergedError, RecipeError)


def reporting(action: Callable[[], int], *, rank: int = 0) -> int:
    """Run `action`; turn an expected error into a message on stderr and exit status 1."""
    try:
        return action()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, expected_errors()):
            if rank == 0 or not isinstance(error, agreed_errors()):
                who = f" (rank {rank})" if rank else ""
                print(f"\nerror{who}: {_message(error)}", file=sys.stderr, flush=True)
            return 1
        if isinstance(error, RuntimeError) and "onnection" in str(error) and "peer" in str(error):
            print(f"rank {rank}: another rank has ended, so does this one", file=sys.stderr)
            return 1
        raise


def _message(error: BaseException) -> str:
    """The message alone, where a DataLoader worker has wrapped it in its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
    return text
