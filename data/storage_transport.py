"""What a remote store must be able to do; one try each, the retries are elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from groundwork.data.storage_errors import PermanentError, ReplacedFileError


@dataclass(frozen=True)
class FileInfo:
    """size: in bytes. version: what changes with the content (an ETag, a time); may be empty."""

    size: int
    version: str


class Transport(Protocol):
    """One process's connections to one folder. Methods may run in several threads at once.

    Each raises TransientError for what may pass, PermanentError for what may not, and returns or
    raises within about `timeout_s` seconds.
    """

    def info(self, name: str, timeout_s: float) -> FileInfo:
        """Size and version of a file, as they are now."""

    def fetch(self, name: str, begin: int, end: int, size: int, timeout_s: float) -> bytes:
        """Exactly the bytes begin..end-1 of a file of `size` bytes."""

    def listing(self, timeout_s: float) -> Mapping[str, FileInfo | None]:
        """The files of the folder, with what the listing says of them."""


#: What to do about an answer that no repetition changes.
CHECK_URL = "check the URL"
CHECK_ACCESS = "check the credentials and the permissions of this URL"


def replaced(reason: str) -> PermanentError:
    """The error of a file that has another size than it had."""
    remedy = "it was replaced or cut off since: build or fetch it and its index again"
    return PermanentError(reason, remedy, ReplacedFileError)
