"""The local web server behind `groundwork shards browse`: read-only, on loopback, one data set.

Nothing of a request is used as a file name. Samples are asked for by split and number, members by a
name that the sample must have, and the page itself is a handful of files named here.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

from groundwork.data.browse.collection import Collection, Split
from groundwork.data.browse.description import brief, full, raw
from groundwork.data.browse.pictures import (
    labels_overlay,
    media_type,
    member_kind,
    overlay,
    thumbnail,
)
from groundwork.data.browse.run_lengths import run_length_map
from groundwork.data.browse.scan import Filters, scan
from groundwork.data.samples import Sample, SampleError
from groundwork.data.shard_index import ShardError

LOOPBACK: Final = "127.0.0.1"
PAGE: Final = Path(__file__).parent
#: Address -> (file of this folder, media type).
PAGE_FILES: Final[Mapping[str, tuple[str, str]]] = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/main.js": ("main.js", "text/javascript; charset=utf-8"),
    "/grid.js": ("grid.js", "text/javascript; charset=utf-8"),
    "/stage.js": ("stage.js", "text/javascript; charset=utf-8"),
    "/sample.js": ("sample.js", "text/javascript; charset=utf-8"),
    "/dom.js": ("dom.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
#: Names under which a browser on this machine knows it. Any other one in `Host` is a name that some
#: web page has had resolved to this machine, to read from it (DNS rebinding).
HOSTS: Final = ("127.0.0.1", "localhost", "[::1]")
#: Sent with every answer: nothing from elsewhere, no code but the page's own, no frames.
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
KEPT: Final = "private, max-age=3600"
#: Entries in one answer.
MAX_COUNT: Final = 200
MAX_NUMBER: Final = 2**62
RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class RequestError(ValueError):
    """A request that cannot be answered."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Browser(ThreadingHTTPServer):
    """Serves a collection on loopback. port 0 takes a free one; `url` tells which."""

    daemon_threads = True
    block_on_close = False  # a browser keeps its connections open for as long as it likes
    request_queue_size = 64
    allow_reuse_address = True

    def __init__(self, collection: Collection, port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.collection = collection
        self.scans = threading.BoundedSemaphore(2)
        self.ended = False

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        try:
            super().serve_forever(poll_interval)
        finally:
            self.ended = True

    @property
    def url(self) -> str:
        """The address to open; it shows the step that the collection was told."""
        step = self.collection.step
        place = f"#order=step&step={step}" if step else ""
        return f"http://{LOOPBACK}:{self.server_address[1]}/{place}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no error, nor is an answer that is
        cut off by the end of this process; all else is shown."""
        import sys

        if not self.ended and not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Query:
    """The parameters of a request, checked as they are taken."""

    def __init__(self, text: str) -> None:
        try:
            self.values = {
                name: values[-1] for name, values in parse_qs(text, max_num_fields=32).items()
            }
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error

    def text(self, name: str) -> str:
        return self.values.get(name, "")

    def number(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", value) or int(value) > MAX_NUMBER:
            raise RequestError(
                HTTPStatus.BAD_REQUEST, f"{name} is {value[:40]!r}; expected a whole number"
            )
        return int(value)

    def required(self, name: str) -> int:
        number = self.number(name)
        if number is None:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"the parameter {name!r} is missing")
        return number


class _Handler(BaseHTTPRequestHandler):
    server: Browser
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "groundwork", ""
    timeout = 60.0  # of an idle connection

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.answered = False
        try:
            # not by urlsplit, which takes what follows two slashes for the name of a host
            path, _, query = self.path.partition("?")
            self._refuse_strangers(path)
            if path in PAGE_FILES:
                name, kind = PAGE_FILES[path]
                self._send((PAGE / name).read_bytes(), kind)
                return
            answer = self._answers().get(path)
            if answer is None:
                raise RequestError(HTTPStatus.NOT_FOUND, "nothing has this address")
            answer(_Query(query))
        except RequestError as error:
            self._send_error(error.status, str(error))
        except (SampleError, ShardError) as error:
            self._send_error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except (ConnectionError, TimeoutError):
            raise  # the browser has gone
        except Exception as error:
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            raise

    def _refuse_strangers(self, path: str) -> None:
        host = self.headers.get("Host", "")
        if re.sub(r":\d*$", "", host).lower() not in HOSTS:
            raise RequestError(HTTPStatus.FORBIDDEN, f"not the host {host[:80]!r}; use localhost")
        # a page from elsewhere may link to this one, and ask for nothing else
        site = self.headers.get("Sec-Fetch-Site", "none")
        if site not in ("none", "same-origin") and path not in PAGE_FILES:
            raise RequestError(HTTPStatus.FORBIDDEN, "asked for by another site")

    def _answers(self) -> Mapping[str, Callable[[_Query], None]]:
        return {
            "/api/about": self._about,
            "/api/list": self._list,
            "/api/sample": self._sample,
            "/api/scan": self._scan,
            "/api/thumb": self._thumb,
            "/api/image": self._image,
            "/api/member": self._member,
            "/api/overlay": self._overlay,
            "/api/segments": self._segments,
            "/api/raw": self._raw,
        }

    def _about(self, _query: _Query) -> None:
        collection = self.server.collection
        split = collection.split(collection.trained)
        knowledge = collection.knowledge
        self._send_json(
            {
                "name": collection.name,
                "licence": collection.licence,
                "version": collection.version(),
                "splits": [{"name": n, "samples": s} for n, s in collection.sizes.items()],
                "trained": collection.trained,
                "seed": str(collection.seed),
                "shuffle": collection.shuffle,
                "globalBatch": collection.global_batch,
                "knowledge": knowledge and f"{knowledge.source} {knowledge.source_version}",
                "classes": [
                    {"label": str(label), "name": concept.name}
                    for label, concept in split.concepts.items()
                ],
            }
        )

    def _list(self, query: _Query) -> None:
        """Tiles of places start..start+count-1, in file order or the order of training."""
        split, start = self._split(query), query.required("start")
        count = min(query.required("count"), MAX_COUNT)
        if query.text("order") == "training":
            entries = [self._placed(split, p) for p in range(start, start + count)]
        else:
            entries = [brief(split, n) for n in range(start, min(start + count, len(split)))]
        self._send_json({"entries": entries, "total": len(split)})

    def _placed(self, split: Split, position: int) -> dict[str, Any]:
        """The tile of a position, with the bad samples that were replaced there."""
        placed = split.at(position)
        replaced = [
            {
                "number": bad.number,
                "key": split.where(bad.number)[1],
                "shard": split.where(bad.number)[0],
                "reason": bad.reason,
            }
            for bad in placed.replaced
        ]
        if placed.number is None:
            entry: dict[str, Any] = {
                "number": placed.replaced[0].number,
                "key": replaced[0]["key"],
                "error": f"{len(replaced)} samples in a row are bad; training stops here",
            }
        else:
            entry = brief(split, placed.number)
        return {**entry, "position": position, "replaced": replaced}

    def _sample(self, query: _Query) -> None:
        split = self._split(query)
        self._send_json(full(split, self._number(query, split), self.server.collection.knowledge))

    def _scan(self, query: _Query) -> None:
        """Lines of JSON as they come, so that the page can show them and how far the scan is."""
        boxes = {"": None, "1": True, "0": False}.get(query.text("boxes"))
        filters = Filters(
            text=query.text("text"),
            label=query.number("label"),
            smallest=query.number("smallest"),
            largest=query.number("largest"),
            boxes=boxes,
            bad=query.text("bad") == "1",
        )
        found = scan(
            self._split(query),
            filters,
            query.number("start") or 0,
            training=query.text("order") == "training",
        )
        if not self.server.scans.acquire(timeout=10):
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "two searches are at work already")
        try:
            self._send_lines(found)
        finally:
            self.server.scans.release()

    def _thumb(self, query: _Query) -> None:
        split = self._split(query)
        content, kind = thumbnail(split.read(self._number(query, split)))
        self._send(content, kind, KEPT)

    def _image(self, query: _Query) -> None:
        split = self._split(query)
        sample = split.read(self._number(query, split))
        if not sample.image:
            raise RequestError(HTTPStatus.NOT_FOUND, "this sample has no image")
        self._send(sample.image, media_type(sample.image_format), KEPT)

    def _member(self, query: _Query) -> None:
        name, sample = self._named_member(query)
        self._send(sample.members[name], media_type(name), KEPT)

    def _overlay(self, query: _Query) -> None:
        name, sample = self._named_member(query)
        if member_kind(name) not in ("labels", "depth"):
            raise RequestError(HTTPStatus.NOT_FOUND, f"{name} is no map of labels or depth")
        depth = sample.info.get("depth")
        near_is_dark = not (isinstance(depth, dict) and depth.get("near") == "bright")
        content = overlay(name, sample.members[name], near_is_dark=near_is_dark)
        self._send(content, "image/png", KEPT)

    def _segments(self, query: _Query) -> None:
        """The masks of boxes that are run lengths; the page draws polygons itself."""
        split = self._split(query)
        labels = run_length_map(split.read(self._number(query, split)).info)
        if labels is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "no box has run lengths that fill a mask")
        self._send(labels_overlay(labels), "image/png", KEPT)

    def _raw(self, query: _Query) -> None:
        """The whole `json` member, as a file."""
        split = self._split(query)
        text = raw(split.read(self._number(query, split)).info)
        self._send(text.encode("utf-8", "backslashreplace"), "text/plain; charset=utf-8")

    def _split(self, query: _Query) -> Split:
        name = query.text("split")
        try:
            return self.server.collection.split(name)
        except KeyError as error:
            raise RequestError(HTTPStatus.NOT_FOUND, f"no split {name[:80]!r}") from error

    def _number(self, query: _Query, split: Split) -> int:
        number = query.required("number")
        if number >= len(split):
            raise RequestError(
                HTTPStatus.NOT_FOUND, f"no sample {number:,}; the split has {len(split):,}"
            )
        return number

    def _named_member(self, query: _Query) -> tuple[str, Sample]:
        split, name = self._split(query), query.text("name")
        sample = split.read(self._number(query, split))
        if name not in sample.members:
            raise RequestError(HTTPStatus.NOT_FOUND, f"this sample has no member {name[:80]!r}")
        return name, sample

    def _send_json(self, record: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        # ASCII, as JSON members may hold halves of surrogate pairs, which have no UTF-8
        content = json.dumps(record, allow_nan=False).encode("ascii")
        self._send(content, "application/json", status=status)

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        if self.answered:  # in the middle of an answer it can only be cut off
            self.close_connection = True
        else:
            self._send_json({"error": message}, status)

    def _send(
        self,
        content: bytes,
        kind: str,
        cache: str = "no-store",
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        """Send a file, or the part of it that the request asks for."""
        extra = {"Cache-Control": cache}
        wanted = RANGE.fullmatch(self.headers.get("Range", "")) if cache == KEPT else None
        if cache == KEPT:
            extra["Accept-Ranges"] = "bytes"
        if wanted is not None and any(wanted.groups()):
            begin, end = _byte_range(wanted[1], wanted[2], len(content))
            if begin >= end:
                status, extra["Content-Range"] = (
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    f"bytes */{len(content)}",
                )
            else:
                status = HTTPStatus.PARTIAL_CONTENT
                extra["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            content = content[begin:end]
        self._head(status, kind, {**extra, "Content-Length": str(len(content))})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_lines(self, records: Iterator[Mapping[str, Any]]) -> None:
        self.close_connection = True  # the end of the connection is that of the answer
        extra = {"Cache-Control": "no-store", "Connection": "close"}
        self._head(HTTPStatus.OK, "application/x-ndjson", extra)
        if self.command == "HEAD":
            return
        for record in records:
            self.wfile.write(json.dumps(record, allow_nan=False).encode("ascii") + b"\n")

    def _head(self, status: HTTPStatus, kind: str, extra: Mapping[str, str]) -> None:
        self.answered = True
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **extra}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _byte_range(first: str, last: str, size: int) -> tuple[int, int]:
    """The half-open range that a `Range` header means; empty where it lies outside."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
