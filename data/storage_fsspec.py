"""All other stores (S3, GCS, Hugging Face, Azure, ...), through fsspec."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import fsspec.asyn
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError

from groundwork.data.storage_errors import (
    MissingFileError,
    PermanentError,
    TransientError,
    describe,
)
from groundwork.data.storage_retry import RetryConfig
from groundwork.data.storage_transport import CHECK_ACCESS, CHECK_URL, FileInfo, replaced

#: protocol -> what to install for it.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
#: What file systems call the version of a file, best first.
VERSIONS = (
    *("ETag", "etag", "md5Hash", "sha256", "blob_id"),
    *("LastModified", "last_modified", "mtime", "updated", "created"),
)
PASSING = (408, 425, 429)


class FsspecTransport:
    """Files below a URL of fsspec.

    File systems that work by coroutines are cancelled at the time limit; the others are trusted to
    have limits of their own, and whoever waits for them gives up after the deadline.
    """

    def __init__(self, url: str, options: Mapping[str, Any], retry: RetryConfig) -> None:
        self.url = url
        self.options = {**_defaults(url, retry), **options}
        self._local = threading.local()
        self._opening = threading.Lock()
        self._shared: tuple[Any, str] | None = None

    def info(self, name: str, timeout_s: float) -> FileInfo:
        found = self._call("info", name, timeout_s)
        if found.get("type") == "directory" or found.get("size") is None:
            raise PermanentError("is a folder, or has no size", CHECK_URL, MissingFileError)
        return _file_info(found)

    def fetch(self, name: str, begin: int, end: int, size: int, timeout_s: float) -> bytes:
        data: bytes = self._call("cat_file", name, timeout_s, start=begin, end=end)
        if len(data) > end - begin:
            raise TransientError(f"{len(data):,} bytes came, {end - begin:,} were asked for")
        if len(data) < end - begin:
            raise TransientError(f"the answer ends after {len(data):,} of {end - begin:,} bytes")
        return data

    def listing(self, timeout_s: float) -> Mapping[str, FileInfo | None]:
        found = self._call("ls", "", timeout_s, detail=True)
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: _file_info(entry)
            for entry in found
            if entry.get("type") == "file" and entry.get("size") is not None
        }

    def _call(self, method: str, name: str, timeout_s: float, **arguments: Any) -> Any:
        try:
            filesystem, folder = self._filesystem()
            path = f"{folder.rstrip('/')}/{name}" if name else folder
            if isinstance(filesystem, fsspec.asyn.AsyncFileSystem):
                return fsspec.asyn.sync(
                    filesystem.loop,
                    getattr(filesystem, f"_{method}"),
                    path,
                    timeout=timeout_s,
                    **arguments,
                )
            return getattr(filesystem, method)(path, **arguments)
        except (PermanentError, TransientError):
            raise
        except Exception as error:
            # libraries of clouds raise what they like
            raise _classified(error) from None

    def _filesystem(self) -> tuple[Any, str]:
        """One file system per process if it is asynchronous, which shares its connections; one per
        thread if not, because few are made for several."""
        if self._shared is not None:
            return self._shared
        opened: tuple[Any, str] | None = getattr(self._local, "opened", None)
        if opened is None:
            with self._opening:
                opened = self._shared or self._open()
                if isinstance(opened[0], fsspec.asyn.AsyncFileSystem):
                    self._shared = opened
            self._local.opened = opened
        return opened

    def _open(self) -> tuple[Any, str]:
        protocol = self.url.partition("://")[0]
        try:
            filesystem, path = url_to_fs(
                self.url, skip_instance_cache=True, use_listings_cache=False, **self.options
            )
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            install = f"groundwork-pretrain[{extra}]" if extra else "the package named above"
            raise PermanentError(describe(error), f"pip install {install}") from None
        except ValueError as error:
            raise PermanentError(describe(error), CHECK_URL) from None
        if protocol in ("s3", "s3a"):
            filesystem.retries = 1  # we retry ourselves, within our own deadline
        return filesystem, path


def _defaults(url: str, retry: RetryConfig) -> dict[str, Any]:
    if url.startswith(("s3://", "s3a://")):
        return {
            "config_kwargs": {
                "connect_timeout": retry.connect_timeout_s,
                "read_timeout": retry.stall_timeout_s,
                "retries": {"max_attempts": 0},
                "max_pool_connections": 64,
            }
        }
    return {}


def _file_info(entry: Mapping[str, Any]) -> FileInfo:
    version = next((str(entry[name]) for name in VERSIONS if entry.get(name)), "")
    return FileInfo(int(entry["size"]), version.strip('"'))


def _classified(error: Exception) -> PermanentError | TransientError:
    reason = describe(error)
    if isinstance(error, FSTimeoutError | TimeoutError):
        return TransientError(f"no answer in time ({reason})")
    if isinstance(error, FileNotFoundError):
        return PermanentError(reason, CHECK_URL, MissingFileError)
    status = _status(error)
    if status in (404, 410):
        return PermanentError(reason, CHECK_URL, MissingFileError)
    if status == 416:
        return replaced(reason)
    if status is not None and 400 <= status < 500 and status not in PASSING:
        return PermanentError(reason, CHECK_ACCESS)
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return PermanentError(reason, CHECK_ACCESS)
    if isinstance(error, TypeError | NotImplementedError | ImportError):
        return PermanentError(reason, "check the URL and the storage options")
    return TransientError(reason)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of a cloud library carries somewhere."""
    accessors: tuple[Callable[[Any], Any], ...] = (
        lambda e: e.response["ResponseMetadata"]["HTTPStatusCode"],
        lambda e: e.response.status_code,
        lambda e: e.status_code,
        lambda e: e.status,
        lambda e: e.code,
    )
    for _ in range(5):  # causes of causes
        if error is None:
            return None
        for accessor in accessors:
            try:
                return int(accessor(error))
            except (AttributeError, KeyError, TypeError, ValueError):
                continue
        error = error.__cause__
    return None
