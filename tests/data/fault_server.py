"""An HTTP server on this machine that serves bytes, with faults injected by a seed.

with FaultServer({"a.tar": content}, Faults(unavailable=0.05, seed=0)) as server:
    open_storage(server.url)
"""

import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Faults:
    """The share of requests that meet each fault, and how this server differs from a good one.

    unavailable: answer 503, with `retry_after` if that is set. stalls: nothing more comes, before
        the head or in the middle of the body. resets: the connection is reset, there too.
    truncated: the connection is closed in the middle of the body. wrong_length: Content-Length
        lies. trickles: a byte now and then, for ever.
    ranges: it knows them. listing: it shows its files. head: it answers HEAD. etag: it sends one.
    length: it sends Content-Length; if not, the end of the connection is the end of the body.
    status: answered to everything, if not 0. only_first: faults stop after so many requests.
    """

    unavailable: float = 0.0
    stalls: float = 0.0
    resets: float = 0.0
    truncated: float = 0.0
    wrong_length: float = 0.0
    trickles: float = 0.0
    retry_after: str = ""
    ranges: bool = True
    listing: bool = True
    head: bool = True
    etag: bool = True
    length: bool = True
    status: int = 0
    only_first: int = 10**9
    seed: int = 0


KINDS = ("unavailable", "stalls", "resets", "truncated", "wrong_length", "trickles")


@dataclass(frozen=True)
class Request:
    method: str
    name: str
    query: str
    range: str | None
    fault: str
    authorization: str | None


class FaultServer:
    """Serves `files` by name below `url` until the block ends; `requests` is what it was asked."""

    def __init__(self, files: Mapping[str, bytes], faults: Faults | None = None) -> None:
        self.files = dict(files)
        self.faults = faults or Faults()
        self.requests: list[Request] = []
        self.connections = 0
        self.closing = threading.Event()
        self._random = random.Random(self.faults.seed)
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_of_files = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/set"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self) -> Counter[str]:
        """Requests by the fault they met ("" for none)."""
        return Counter(request.fault for request in self.requests)

    def draw(self, method: str, name: str, query: str, headers: Mapping[str, str]) -> str:
        """Note a request and choose its fault."""
        with self._lock:
            value, fault = self._random.random(), ""
            for kind in KINDS:
                share = getattr(self.faults, kind)
                if value < share and len(self.requests) < self.faults.only_first:
                    fault = kind
                    break
                value -= share
            self.requests.append(
                Request(
                    method, name, query, headers.get("Range"), fault, headers.get("Authorization")
                )
            )
            return fault

    def choose(self, most: int) -> int:
        with self._lock:
            return self._random.randint(0, most)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that give up are the purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_files: FaultServer

    def setup(self) -> None:
        super().setup()
        self.server_of_files.connections += 1

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        outer, faults = self.server_of_files, self.server_of_files.faults
        name = unquote(urlsplit(self.path).path.removeprefix("/set").lstrip("/"))
        asked = self.headers.get("Range")
        fault = outer.draw(self.command, name, urlsplit(self.path).query, self.headers)
        if faults.status:
            return self._short(faults.status)
        if fault == "unavailable":
            return self._short(503, {"Retry-After": faults.retry_after})
        if fault == "stalls" and outer.choose(1):
            return self._stall()
        if fault == "resets" and outer.choose(1):
            return self._reset()
        if self.command == "HEAD" and not faults.head:
            return self._short(405)
        if not name and faults.listing:
            links = "".join(f'<a href="{file}">{file}</a>' for file in outer.files)
            return self._short(200, body=f"<html><a href='../'>up</a>{links}".encode())
        content = outer.files.get(name)
        if content is None:
            return self._short(404)
        return self._send(content, asked if faults.ranges else None, fault)

    def _send(self, content: bytes, asked: str | None, fault: str) -> None:
        outer = self.server_of_files
        begin, end = 0, len(content)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        if found:
            begin, end = int(found[1]), min(int(found[2]) + 1, len(content))
            if begin >= len(content):
                return self._short(416, {"Content-Range": f"bytes */{len(content)}"})
        body = content[begin:end]
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        lies = fault == "wrong_length" and body and self.command == "GET"
        wrong = -1 if lies else 0
        if outer.faults.length or self.command == "HEAD":
            self.send_header("Content-Length", str(len(body) + wrong))
        else:
            self.send_header("Connection", "close")
        if outer.faults.etag:
            self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:x}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        middle = outer.choose(max(0, len(body) - 1))
        if fault in ("stalls", "resets", "truncated", "trickles"):
            self.wfile.write(body[:middle])
            self.wfile.flush()
        if fault == "stalls":
            return self._stall()
        if fault == "resets":
            return self._reset()
        if fault == "truncated":
            self.close_connection = True
            return None
        if fault == "trickles":
            for position in range(middle, len(body)):
                if outer.closing.wait(0.02):
                    break
                self.wfile.write(body[position : position + 1])
                self.wfile.flush()
            self.close_connection = True
            return None
        self.close_connection |= not outer.faults.length
        self.wfile.write(body[: len(body) + wrong])
        return None

    def _short(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stall(self) -> None:
        self.server_of_files.closing.wait(30)
        self.close_connection = True

    def _reset(self) -> None:
        # closing with unsent data thrown away sends a reset
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
