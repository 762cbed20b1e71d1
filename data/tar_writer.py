"""Writes one tar of samples together with its side-car, in a single pass.

The format is POSIX ustar, with a pax header before a member whose name is not ASCII or longer than
100 bytes, or whose content has 8 GiB or more. Time, owner and permissions are fixed, so the same
samples give the same bytes: those that Python's tarfile writes for the same members. Headers are
packed here, and offsets, sizes and checksums noted on the way, because tarfile's objects and a scan
of the finished file took most of the time.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import google_crc32c

from groundwork.data.atomic import sync_directory, umask
from groundwork.data.index_builder import META, IndexBuilder, RepeatedMemberError
from groundwork.data.shard_index import (
    ShardError,
    ShardIndex,
    index_of,
    index_path,
    split_name,
    write_index,
)
from groundwork.data.tar_reader import BLOCK, padded

#: Archives are padded to whole records, as tar has done since there were tapes.
RECORD: Final = 20 * BLOCK
#: Bytes that are collected before they are written.
BUFFER: Final = 1024**2
NAME_BYTES: Final = 100
#: A size field has 11 octal digits.
MAX_USTAR_SIZE: Final = 8**11 - 1
PADDING: Final = [bytes(-size % BLOCK) for size in range(BLOCK)]

# mode 0444, uid 0, gid 0; then, behind size, time 0, checksum and type
OWNER_IDS: Final = b"0000444\0" + b"0000000\0" + b"0000000\0"
TIME: Final = b"00000000000\0"
OWNER: Final = b"groundwork".ljust(32, b"\0") * 2
MEMBER_END: Final = b"0" + bytes(100) + b"ustar\x0000" + OWNER + bytes(16 + 155 + 12)
PAX_END: Final = b"x" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
PAX_IDS: Final = b"0000000\0" * 3
#: What all headers of members have in common, in the sum of all bytes; its own field is 8 blanks.
CHECKSUM: Final = sum(OWNER_IDS) + sum(TIME) + sum(MEMBER_END) + 8 * 0x20


@dataclass(frozen=True)
class WrittenTar:
    """A finished tar. bytes, crc32c: of the whole file."""

    path: Path
    bytes: int
    crc32c: int
    index: ShardIndex


class TarShardWriter:
    """Writes samples to a tar that appears under its name, with its side-car, when it is closed.

    sync: wait on closing until both are on the disk; False where the folder is synced later.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path, self.sync = path, sync
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        self._temporary = Path(name)
        self._file = os.fdopen(handle, "wb", buffering=0)
        self._builder = IndexBuilder()
        self._suffixes: dict[str, tuple[bytes, int]] = {}
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._position = 0
        self._crc32c = 0

    def __contains__(self, key: str) -> bool:
        """Whether the tar has a sample of this key."""
        return key in self._builder.keys

    def write(self, key: str, fields: Mapping[str, bytes]) -> int:
        """Append a sample: one member KEY.FIELD for each field, in sorted order.

        Returns the bytes of the contents. Raises ShardError for a key that this tar has already,
        for names that would not be read back as they are, and for too many different fields.
        """
        builder, pending, position = self._builder, self._pending, self._position
        if not key.isalnum():  # most keys are plain and need no closer look
            _check_key(key)
        try:
            builder.begin_sample(key)
        except RepeatedMemberError as error:
            raise ShardError(f"{self.path}: {error}") from error
        stem = key.encode("utf-8")
        is_ascii, stem_sum, longest = key.isascii(), sum(stem) + CHECKSUM, NAME_BYTES - len(stem)
        total = 0
        for field in sorted(fields):
            content = fields[field]
            size = len(content)
            if (known := self._suffixes.get(field)) is None:
                known = self._suffixes[field] = _suffix(field)
            suffix, suffix_sum = known
            if is_ascii and len(suffix) <= longest and size <= MAX_USTAR_SIZE:
                digits = b"%011o\0" % size
                header = b"%b%b%b%b%06o\0 %b" % (
                    (stem + suffix).ljust(100, b"\0"),
                    OWNER_IDS,
                    digits,
                    TIME,
                    stem_sum + suffix_sum + sum(digits),
                    MEMBER_END,
                )
            else:
                header = member_header(f"{key}.{field}", size)
            position += len(header)
            try:
                builder.add_member(field, position, size, google_crc32c.value(content), content)
            except RepeatedMemberError as error:
                raise ShardError(f"{self.path}: {error}", error.diagnosis) from error
            pending += (header, content, PADDING[size % BLOCK])
            position += padded(size)
            total += size
        self._pending_bytes += position - self._position
        self._position = position
        if self._pending_bytes >= BUFFER:
            self._flush()
        return total

    def close(self) -> WrittenTar:
        """Finish the tar and its side-car."""
        end = self._position + 2 * BLOCK
        self._pending.append(bytes(2 * BLOCK + -end % RECORD))
        self._position = end + -end % RECORD
        try:
            self._flush()
            if self.sync:
                os.fsync(self._file.fileno())
            self._file.close()
            try:
                index = index_of(self._builder, self._position)
            except RepeatedMemberError as error:
                raise ShardError(f"{self.path}: {error}", error.diagnosis) from error
            self._temporary.chmod(0o666 & ~umask())
            self._temporary.replace(self.path)
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.path)
            raise
        write_index(index, index_path(self.path), sync=False)
        if self.sync:
            # one wait for the folder; a side-car that a power cut loses is found out and made anew
            sync_directory(self.path.parent)
        return WrittenTar(self.path, self._position, self._crc32c, index)

    def abandon(self) -> None:
        """Leave nothing of the tar behind. Does nothing after `close`."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def member_header(name: str, size: int) -> bytes:
    """The header blocks of a regular file, with a pax header where ustar cannot state it."""
    encoded = name.encode("utf-8")
    records = b""
    if not name.isascii() or len(encoded) > NAME_BYTES:
        records += pax_record(b"path", encoded)
    if size > MAX_USTAR_SIZE:
        records += pax_record(b"size", b"%d" % size)
        size = 0
    pax = b""
    if records:
        pax = _header(b"././@PaxHeader", PAX_IDS, len(records), PAX_END)
        pax += records + PADDING[len(records) % BLOCK]
    short = name.encode("ascii", "replace")[:NAME_BYTES]
    return pax + _header(short, OWNER_IDS, size, MEMBER_END)


def pax_record(keyword: bytes, value: bytes) -> bytes:
    """`LENGTH KEYWORD=VALUE\\n`, where the length counts its own digits."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, keyword, value)


def _header(name: bytes, ids: bytes, size: int, end: bytes) -> bytes:
    begin = name.ljust(NAME_BYTES, b"\0") + ids + b"%011o\0" % size + TIME
    return begin + b"%06o\0 " % (sum(begin) + sum(end) + 8 * 0x20) + end


def _suffix(field: str) -> tuple[bytes, int]:
    """`.FIELD` and the sum of its bytes."""
    if (
        not field
        or not field.isascii()
        or split_name(f"k.{field}") != ("k", field)
        or "\0" in field
    ):
        raise ShardError(
            f"field {field!r}: a field is a file extension in lower-case ASCII without '/'"
        )
    encoded = b"." + field.encode()
    return encoded, sum(encoded)


def _check_key(key: str) -> None:
    if (
        split_name(f"{key}.x") != (key, "x")
        or "\0" in key
        or key.startswith("/")
        or META.match(f"{key}.x")
        or ".." in key.split("/")
    ):
        raise ShardError(
            f"key {key!r}: a key is the stem of a file name: not empty, relative, without NUL, "
            "'..', dots in its last part, and folders called '__...__'"
        )
    try:
        key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShardError(f"key {key!r}: not writable as UTF-8 ({error.reason})") from error
