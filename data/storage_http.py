"""HTTP and HTTPS, through requests.

Not fsspec's own HTTP file system, which calls a server that answers 503 a missing file, and loads a
whole shard into memory when a server ignores the range that was asked for.
"""

import email.utils
import logging
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import requests
import urllib3

from groundwork.data.storage_errors import (
    MissingFileError,
    PermanentError,
    TransientError,
    describe,
    redact,
)
from groundwork.data.storage_names import join_url
from groundwork.data.storage_retry import RetryConfig
from groundwork.data.storage_transport import CHECK_ACCESS, CHECK_URL, FileInfo, replaced

log = logging.getLogger(__name__)

CHUNK = 256 * 1024
#: Statuses of client errors that pass nevertheless: timeout, too early, too many requests.
PASSING = (408, 425, 429)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
#: A page that lists a folder is not longer.
MAX_LISTING = 64 * 2**20


class HttpTransport:
    """Files below a URL, by range requests. A query of the URL (a signature) goes with each."""

    def __init__(self, url: str, options: Mapping[str, Any], retry: RetryConfig) -> None:
        if unknown := set(options) - {"headers"}:
            raise ValueError(
                f"storage options {', '.join(sorted(unknown))}: HTTP knows only `headers`"
            )
        self.url = url
        self.options = options
        self.retry = retry
        self._sessions = threading.local()  # a session is not made for several threads
        self._warned = False

    def info(self, name: str, timeout_s: float) -> FileInfo:
        url = join_url(self.url, name)
        try:
            with self._request("HEAD", url, timeout_s, {}) as answer:
                length = answer.headers.get("Content-Length", "")
                if length.isdigit():
                    return FileInfo(int(length), _version(answer))
        except PermanentError as error:
            if error.kind is MissingFileError:
                raise
        # a signed URL is often signed for GET alone
        with self._request("GET", url, timeout_s, {"Range": "bytes=0-0"}) as answer:
            found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            length = found[3] if found else answer.headers.get("Content-Length", "")
            if answer.status_code == 416:
                length = answer.headers.get("Content-Range", "").removeprefix("bytes */")
            if not length.isdigit():
                raise PermanentError("the server does not say how long the file is", CHECK_URL)
            return FileInfo(int(length), _version(answer))

    def fetch(self, name: str, begin: int, end: int, size: int, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        asked = {"Range": f"bytes={begin}-{end - 1}"}
        with self._request("GET", join_url(self.url, name), timeout_s, asked) as answer:
            if answer.status_code == 416:
                raise replaced(f"the server has no such bytes ({size:,} expected)")
            skip = 0
            if answer.status_code == 206:
                self._check_range(answer, begin, end, size)
            else:
                self._check_length(answer, size)
                skip = begin
                if end - begin < size:
                    self._warn_of_ranges()
            return _body(answer, skip, end - begin, deadline)

    def listing(self, timeout_s: float) -> Mapping[str, FileInfo | None]:
        """The links of the page that the server shows for the folder."""
        parts = urlsplit(self.url)
        page = parts._replace(path=parts.path.rstrip("/") + "/").geturl()
        links = _Links()
        links.feed(self.document(page, timeout_s)[0].decode("utf-8", "replace"))
        folder = urlsplit(page)
        names = set()
        for link in links.found:
            target = urlsplit(urljoin(page, link))
            if target.netloc == folder.netloc and target.path.startswith(folder.path):
                names.add(unquote(target.path[len(folder.path) :]))
        return {name: None for name in sorted(names) if name and "/" not in name}

    def document(self, url: str, timeout_s: float) -> tuple[bytes, str | None]:
        """A page, and the URL of the one that follows it, if its header names one."""
        deadline = time.monotonic() + timeout_s
        with self._request("GET", url, timeout_s, {}) as answer:
            text = b"".join(_chunks(answer, MAX_LISTING, deadline))
            length = answer.headers.get("Content-Length", "")
            if length.isdigit() and int(length) != len(text):
                raise TransientError(f"the answer ends after {len(text):,} of {length} bytes")
            return text, answer.links.get("next", {}).get("url")

    @contextmanager
    def _request(
        self, method: str, url: str, timeout_s: float, headers: Mapping[str, str]
    ) -> Iterator[requests.Response]:
        """An answer with a body to read, or the error it stands for."""
        retry = self.retry
        try:
            answer = self._session().request(
                method,
                url,
                # as it is, so that lengths are those of the file
                headers={"Accept-Encoding": "identity", **headers},
                timeout=(
                    min(retry.connect_timeout_s, timeout_s),
                    min(retry.stall_timeout_s, timeout_s),
                ),
                stream=True,
                allow_redirects=True,
            )
            try:
                _refuse(answer)
                yield answer
                if method == "HEAD":
                    # its body is empty, but only the end of a body gives a connection back
                    answer.raw.read1(1)
            finally:
                answer.close()
        except (requests.exceptions.SSLError, ssl.SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise PermanentError(
                    describe(error), "point REQUESTS_CA_BUNDLE to the certificate of its authority"
                ) from None
            raise TransientError(describe(error)) from None
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.TooManyRedirects,
        ) as error:
            raise PermanentError(describe(error), CHECK_URL) from None
        except (OSError, urllib3.exceptions.HTTPError) as error:
            # requests' own errors are OSErrors; those of a body that is read come from urllib3
            raise TransientError(describe(error)) from None

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = requests.Session()
            session.headers.update(self.options.get("headers", {}))
        return session

    def _check_range(self, answer: requests.Response, begin: int, end: int, size: int) -> None:
        found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if found is None or (int(found[1]), int(found[2])) != (begin, end - 1):
            if found and found[3].isdigit() and int(found[3]) != size:
                raise replaced(f"has {int(found[3]):,} bytes, not {size:,}")
            raise TransientError(
                f"the server sent the range {answer.headers.get('Content-Range')!r} "
                f"for bytes {begin}-{end - 1}"
            )
        if found[3] != "*" and int(found[3]) != size:
            raise replaced(f"has {int(found[3]):,} bytes, not {size:,}")
        self._check_length(answer, end - begin, TransientError)

    def _check_length(
        self, answer: requests.Response, expected: int, kind: type[Exception] | None = None
    ) -> None:
        length = answer.headers.get("Content-Length")
        if length is None or length == str(expected):
            return
        if kind is TransientError:
            raise TransientError(f"the server announced {length} bytes instead of {expected}")
        raise replaced(f"has {length} bytes, not {expected:,}")

    def _warn_of_ranges(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%s: the server ignores ranges, so each block is fetched with all that comes "
                "before it in its file; use a server that knows ranges, or copy the data set",
                redact(self.url),
            )


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for key, value in attrs if (tag, key) == ("a", "href") and value]


def _version(answer: requests.Response) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _refuse(answer: requests.Response) -> None:
    status = answer.status_code
    if status in (200, 206, 416):
        encoding = answer.headers.get("Content-Encoding", "").strip().lower()
        # some servers call a file that is compressed where it lies encoded; its bytes are the file
        packed = urlsplit(answer.url).path.lower().endswith((".gz", ".tgz"))
        if encoding not in ("", "identity") and not packed:
            raise PermanentError(
                f"the server sends it compressed (Content-Encoding: {encoding}), though it was "
                "asked for the bytes as they are (Accept-Encoding: identity)",
                "turn compression off for these files, on the server or the proxy before it",
            )
        return
    reason = f"the server answers {status} {answer.reason or ''}".rstrip()
    if status in PASSING or status >= 500:
        raise TransientError(reason, _retry_after(answer))
    if status in (404, 410):
        raise PermanentError(reason, CHECK_URL, MissingFileError)
    raise PermanentError(reason, CHECK_ACCESS if status in (401, 403, 407) else CHECK_URL)


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the server asks to wait: a number or a date."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value[:9])
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _body(answer: requests.Response, skip: int, length: int, deadline: float) -> bytes:
    data = bytearray()
    for chunk in _chunks(answer, skip + length, deadline):
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        data += memoryview(chunk)[skip:]
        skip = 0
    if len(data) < length:
        raise TransientError(f"the answer ends after {len(data):,} of {length:,} bytes")
    return bytes(data)


def _chunks(answer: requests.Response, most: int, deadline: float) -> Iterator[bytes]:
    """The body as it arrives, at most `most` bytes; a trickle does not outlast the deadline."""
    while most > 0:
        chunk = answer.raw.read1(min(CHUNK, most))
        if not chunk:
            return
        most -= len(chunk)
        yield chunk
        if most > 0 and time.monotonic() > deadline:
            raise TransientError("the body came too slowly")
