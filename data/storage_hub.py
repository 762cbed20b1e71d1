"""Data sets on the Hugging Face Hub: `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`.

Its files are plain HTTP with ranges, behind redirects to signed URLs, which requests follows. The
Hub's own file system for fsspec would open a file object per range, and read ahead in each.
"""

import json
import re
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from groundwork.data.storage_errors import MissingFileError, PermanentError
from groundwork.data.storage_http import HttpTransport
from groundwork.data.storage_retry import RetryConfig
from groundwork.data.storage_transport import CHECK_URL, FileInfo

HUB = re.compile(
    r"hf://(?P<kind>datasets/|spaces/|)(?P<repository>(?!datasets/|spaces/)[^/@]+/[^/@]+)"
    r"(@(?P<revision>[^/]+))?(/(?P<folder>.*))?"
)
#: A folder is listed again when the size of a file in it is asked for so much later.
LISTING_AGE_S = 60.0


class HubTransport:
    """Files below a folder of a repository on the Hub.

    options: `endpoint` and `token`; by default those that huggingface_hub finds (HF_ENDPOINT,
        HF_TOKEN, the file of `hf auth login`).
    """

    def __init__(self, url: str, options: Mapping[str, Any], retry: RetryConfig) -> None:
        if unknown := set(options) - {"endpoint", "token"}:
            raise ValueError(
                f"storage options {', '.join(sorted(unknown))}: hf:// knows `endpoint` and `token`"
            )
        found = HUB.fullmatch(url)
        if found is None:
            raise ValueError(f"{url}: expected hf://datasets/OWNER/NAME[@REVISION][/FOLDER]")
        # imported here, because it takes its settings from the environment when it is imported
        from huggingface_hub import constants, get_token

        endpoint = options.get("endpoint") or constants.ENDPOINT
        token = options.get("token") or get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        kind, repository = found["kind"], found["repository"]
        # a revision may come with its slashes quoted (refs%2Fconvert%2Fparquet)
        revision = quote(found["revision"] or "main", safe="%")
        folder = quote((found["folder"] or "").strip("/"))
        self.files = HttpTransport(
            f"{endpoint}/{kind}{repository}/resolve/{revision}/{folder}".rstrip("/"),
            {"headers": headers},
            retry,
        )
        self.tree = f"{endpoint}/api/{kind or 'models/'}{repository}/tree/{revision}/{folder}"
        self._listed: dict[str, tuple[Mapping[str, FileInfo | None], float]] = {}
        self._listing = threading.Lock()

    def info(self, name: str, timeout_s: float) -> FileInfo:
        """From the listing of the file's folder: one request for all files."""
        folder, _, base = name.rpartition("/")
        # threads that ask for other files of it wait for the one answer
        held = self._listing.acquire(timeout=timeout_s)
        try:
            listed, asked = self._listed.get(folder, ({}, 0.0))
            if not listed or time.monotonic() - asked > LISTING_AGE_S:
                listed = self._list(folder, timeout_s)
                self._listed[folder] = (listed, time.monotonic())
        finally:
            if held:
                self._listing.release()
        info = listed.get(base)
        if info is None:
            raise PermanentError("the Hub lists no such file", CHECK_URL, MissingFileError)
        return info

    def fetch(self, name: str, begin: int, end: int, size: int, timeout_s: float) -> bytes:
        return self.files.fetch(name, begin, end, size, timeout_s)

    def listing(self, timeout_s: float) -> Mapping[str, FileInfo | None]:
        return self._list("", timeout_s)

    def _list(self, folder: str, timeout_s: float) -> Mapping[str, FileInfo | None]:
        page: str | None = f"{self.tree.rstrip('/')}/{quote(folder)}".rstrip("/")
        files: dict[str, FileInfo | None] = {}
        deadline = time.monotonic() + timeout_s
        while page:
            text, page = self.files.document(page, max(1e-3, deadline - time.monotonic()))
            try:
                for entry in json.loads(text):
                    if entry["type"] == "file":
                        version = (entry.get("lfs") or entry)["oid"]
                        base = entry["path"].rpartition("/")[2]
                        files[base] = FileInfo(int(entry["size"]), str(version))
            except (ValueError, KeyError, TypeError) as error:
                raise PermanentError(f"not a listing of the Hub ({error!r})", CHECK_URL) from None
        return files
