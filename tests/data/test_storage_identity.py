import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from groundwork.data.cache import CacheConfig
from groundwork.data.storage_errors import StorageError
from groundwork.data.storage_identity import identity
from groundwork.data.storage_remote import RemoteConfig, RemoteStorage
from groundwork.data.storage_retry import RetryConfig

CONFIG = RemoteConfig(block_bytes=1024, threads=2)
QUICK = RetryConfig(attempts=2, first_delay_s=0.01, deadline_s=5)
URL = "https://h/set"


@contextmanager
def serving(encoding: str = "") -> Iterator[tuple[str, list[str]]]:
    """A server that answers with the query it was sent; its URL, and the requests it got.

    Each query has an ETag and content of its own; all files have the same size.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            body = content(urlsplit(self.path).query)
            self.send_response(200)
            self.send_header("ETag", f'"{urlsplit(self.path).query}"')
            if encoding:
                body = gzip.compress(body)
                self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/set", requests
    finally:
        server.shutdown()
        server.server_close()


def content(query: str) -> bytes:
    return query.encode().ljust(100, b".")


def test_urls_that_differ_in_a_query_share_no_block(tmp_path: Path) -> None:
    with serving() as (url, requests):
        for query in ("versionId=A", "versionId=B", "versionId=A"):
            storage = RemoteStorage(f"{url}?{query}", CacheConfig(tmp_path), CONFIG, QUICK)
            assert storage.whole("x.tar") == content(query)
        # the third finds what the first has left
        assert [r for r in requests if r.startswith("GET")] == [
            "GET /set/x.tar?versionId=A",
            "GET /set/x.tar?versionId=B",
        ]


@pytest.mark.parametrize("how", ["options", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoints_share_no_block(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs", reason="the test extra installs s3fs")
    moto = pytest.importorskip("moto.server", reason="the test extra installs moto")
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    # moto's servers of one process share their buckets, so the second endpoint is a closed port
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()

        bucket = f"shelf-{how.lower().replace('_', '-')}"

        def at(endpoint: str) -> RemoteStorage:
            options: dict[str, Any] = {
                "key": "key-id",
                "secret": "s3cr3t",
                "client_kwargs": {"region_name": "eu-west-1"},
            }
            if how == "options":
                options["endpoint_url"] = endpoint
            else:
                monkeypatch.setenv(how, endpoint)
            config = replace(CONFIG, options=options)
            return RemoteStorage(f"s3://{bucket}/x", CacheConfig(tmp_path), config, QUICK)

        here = f"http://{host}:{port}"
        files = s3fs.S3FileSystem(
            key="key-id", secret="s3cr3t", endpoint_url=here, skip_instance_cache=True
        )
        files.mkdir(bucket)
        files.pipe(f"{bucket}/x/a.tar", b"mine")
        assert at(here).whole("a.tar") == b"mine"
        with pytest.raises(StorageError):
            at("http://127.0.0.1:9").whole("a.tar")
    finally:
        server.stop()
    # its own blocks are still found, without a server
    assert at(here).whole("a.tar") == b"mine"


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Algorithm=a&X-Amz-Credential={0}&X-Amz-Date={0}&X-Amz-Expires=9&x-amz-signature={0}",
        "X-Goog-Algorithm=a&X-Goog-Date={0}&X-Goog-Signature={0}",
        "AWSAccessKeyId={0}&Expires={0}&Signature={0}",
        "GoogleAccessId={0}&Expires={0}&Signature={0}",
        "Policy={0}&Signature={0}&Key-Pair-Id={0}",
        "se={0}&sp=r&sv={0}&sr=c&st={0}&spr=https&sig={0}",
        "token={0}&expires={0}",
    ],
)
def test_a_signature_is_no_part_of_the_identity_but_all_beside_it_is(query: str) -> None:
    one, two = (f"{URL}?versionId=A&{query.format(n)}" for n in (1, 2))
    assert identity(one, {}) == identity(two, {}) == identity(f"{URL}/?versionId=A", {})
    assert identity(one, {}) != identity(one.replace("versionId=A", "versionId=B"), {})
    assert identity(one, {}) != identity(one.replace("versionId=A&", ""), {})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (URL, "https://other/set"),
        (f"{URL}?a=1&b=2", f"{URL}?a=1&b=3"),
        (f"{URL}?a=", f"{URL}?b="),
        # no signature is there, so these may be what selects the files
        (f"{URL}?st=1", f"{URL}?st=2"),
        (f"{URL}?token=1", f"{URL}?token=2"),
        (f"{URL}?expires=1", f"{URL}?expires=2"),
        ("https://ann:p@h/set", "https://bob:p@h/set"),
        ("https://ann@h/set", URL),
        ("abfs://one@account.dfs.core.windows.net/x", "abfs://two@account.dfs.core.windows.net/x"),
        ("s3://b/x?versionId=A", "s3://b/x?versionId=B"),
        ("memory://Set/x", "memory://set/x"),
    ],
)
def test_what_may_be_another_data_set_has_another_identity(one: str, two: str) -> None:
    assert identity(one, {}) != identity(two, {})


def test_a_password_is_no_part_of_the_identity() -> None:
    assert identity("https://ann:one@h/set", {}) == identity("https://ann:two@h/set", {})
    assert identity("sftp://ann:one@h/set", {}) == identity("sftp://ann:two@h/set", {})


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"endpoint_url": "http://a"}, {"endpoint_url": "http://b"}, False),
        ({"endpoint_url": "http://a"}, {}, False),
        (
            {"client_kwargs": {"endpoint_url": "http://a"}},
            {"client_kwargs": {"endpoint_url": "http://b"}},
            False,
        ),
        ({"account_name": "a"}, {"account_name": "b"}, False),
        (
            {"connection_string": "AccountName=a;AccountKey=1"},
            {"connection_string": "AccountName=b;AccountKey=1"},
            False,
        ),
        (
            {"connection_string": "AccountName=a;AccountKey=1"},
            {"connection_string": "AccountName=a;AccountKey=2"},
            True,
        ),
        ({"key": "1", "secret": "1", "token": "1"}, {"key": "2", "secret": "2"}, True),
        ({"credential": object()}, {"credential": object()}, True),
        ({"other": object()}, {"other": object()}, True),
        ({"headers": {"Host": "a"}}, {"headers": {"Host": "b"}}, False),
        ({"headers": {"Authorization": "a"}}, {"headers": {"Authorization": "b"}}, True),
    ],
)
def test_options_count_but_for_credentials(
    one: dict[str, Any], two: dict[str, Any], same: bool
) -> None:
    assert (identity("s3://b/x", one) == identity("s3://b/x", two)) is same


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("s3://b/x", "AWS_ENDPOINT_URL"),
        ("s3a://b/x", "AWS_ENDPOINT_URL_S3"),
        ("gs://b/x", "STORAGE_EMULATOR_HOST"),
        ("hf://datasets/o/n", "HF_ENDPOINT"),
        ("az://b/x", "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_an_endpoint_of_the_environment_counts(
    url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    monkeypatch.delenv(variable, raising=False)
    found.add(identity(url, {}))
    for endpoint in ("http://a", "http://b"):
        monkeypatch.setenv(variable, endpoint)
        found.add(identity(url, {}))
    assert len(found) == 3


def test_a_server_that_compresses_unasked_is_named() -> None:
    with serving("gzip") as (url, _):
        storage = RemoteStorage(url, None, CONFIG, QUICK)
        with pytest.raises(StorageError, match=r"Content-Encoding: gzip.*turn compression off"):
            storage.whole("x.tar")
        # what is compressed where it lies is the file itself
        assert gzip.decompress(storage.whole("x.tar.gz")) == content("")
