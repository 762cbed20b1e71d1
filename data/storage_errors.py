"""What can go wrong with a stored file, and messages that give no secret away."""

import re

#: Before the path of a URL: user and password. After it: signatures, tokens.
USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]*@")
QUERY = re.compile(r"(?<=[^\s?])[?][^\s'\"<>)\]}]+")


class StorageError(OSError):
    """A file that cannot be read, after all retries; says which, why, and how to mend it."""


class MissingFileError(StorageError, FileNotFoundError):
    """A file that is not there: nothing was retried."""


class ReplacedFileError(StorageError):
    """A file that is not the one it was when its size was asked for."""


class TransientError(Exception):
    """One attempt that failed in a way that may pass. retry_after_s: what the server asks for."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class PermanentError(Exception):
    """An attempt that no repetition mends. kind: of the StorageError that it becomes."""

    def __init__(self, reason: str, remedy: str, kind: type[StorageError] = StorageError) -> None:
        super().__init__(reason)
        self.remedy = remedy
        self.kind = kind


def redact(text: str) -> str:
    """A URL, or a message with URLs in it, without user, password and query.

    Signed URLs carry their signature in the query, and messages end in logs.
    """
    return QUERY.sub("", USER_INFO.sub("", text))


def describe(error: BaseException) -> str:
    """Type and text of an error of a library, for our own message."""
    text = " ".join(str(error).split())
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:500]
