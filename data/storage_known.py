"""What is known of remote files: sizes and versions, shared by the processes of a machine."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from groundwork.data.cache import BlockCache, block_key
from groundwork.data.storage_identity import identity
from groundwork.data.storage_transport import FileInfo


class KnownFiles:
    """Answers of a store about its files, with the time (time.time) of each question.

    They are kept in memory and, as tiny blocks, in the cache. Threads share it without a lock: each
    step is one operation on a dictionary.
    """

    def __init__(self, url: str, options: Mapping[str, Any], cache: BlockCache | None) -> None:
        self.cache = cache
        # signatures and passwords change while the data stays, so they are not part of its name
        self.identity = identity(url, options)
        self._url_digest = hashlib.sha256(url.encode()).hexdigest()
        self._known: dict[str, tuple[FileInfo, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": dict(self._known)}

    def get(self, name: str, newer_than_s: float = math.inf) -> FileInfo | None:
        """What this process knows; nothing is read."""
        known = self._known.get(name)
        return known[0] if known and time.time() - known[1] < newer_than_s else None

    def find(self, name: str, newer_than_s: float = math.inf) -> FileInfo | None:
        """What this process knows, or another has left in the cache."""
        info = self.get(name, newer_than_s)
        if info is None and self.cache is not None:
            record = self.cache.get(self._key(name))
            if record is not None:
                size, version, asked = json.loads(record)
                if time.time() - asked < newer_than_s:
                    info = FileInfo(size, version)
                    self._known[name] = (info, asked)
        return info

    def note(self, name: str, info: FileInfo, asked: float, *, shared: bool = True) -> None:
        """Remember an answer; `shared` writes it to the cache, which costs as much as a block."""
        self._known[name] = (info, asked)
        if shared and self.cache is not None:
            self.cache.put(self._key(name), json.dumps([info.size, info.version, asked]).encode())

    def forget(self, name: str) -> None:
        self._known.pop(name, None)
        if self.cache is not None:
            self.cache.drop(self._key(name))

    def block_key(self, name: str, info: FileInfo, block_bytes: int, number: int) -> str:
        """The name of a block in the cache: another version of the file has other blocks."""
        # without a version even the signature may be what tells one file from another
        version = info.version or self._url_digest
        return block_key("block", self.identity, name, info.size, version, block_bytes, number)

    def _key(self, name: str) -> str:
        return block_key("info", self.identity, name)
