"""The members of a tar, one after the other, for files that are not trusted.

Python's tarfile reads about 10,000 members/s, takes a header that it cannot read for the end of the
archive and follows what a header claims into any allocation. This reader knows what data tars
consist of (v7, ustar, GNU and pax headers of regular files and folders), checks every header, and
refuses the rest by name.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, NoReturn

from groundwork.data.diagnosis import Diagnosis

BLOCK = 512
#: Bytes that are read from the file at a time, and the most of a member that is in memory at once.
CHUNK = 16 * 1024**2
#: Long names and pax records are read whole; real ones take some hundred bytes.
MAX_EXTENSION = 1024**2

REGULAR = (b"0", b"\0", b"7")
FOLDER = b"5"
GNU_LONG_NAME, GNU_LONG_LINK, GNU_SPARSE = b"L", b"K", b"S"
PAX, PAX_SOLARIS, PAX_GLOBAL = b"x", b"X", b"g"
EXTENSIONS = (GNU_LONG_NAME, GNU_LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL)
NO_BYTES = bytes(BLOCK)


class TarFormatError(ValueError):
    """A tar that is not read; the message says why, without the name of the file.

    offset: of the header or block at fault. resume: where the next member begins, where the fault
    does not hide that. member: name of the one that is refused; empty where the fault is none's.
    """

    def __init__(
        self,
        message: str,
        diagnosis: Diagnosis,
        offset: int,
        resume: int | None = None,
        member: str = "",
    ) -> None:
        super().__init__(message)
        self.diagnosis, self.offset, self.resume = diagnosis, offset, resume
        self.member = member


class Member(NamedTuple):
    """A regular file in a tar: its bytes are those from `offset` on."""

    name: str
    offset: int
    size: int


class TarReader:
    """Reads a tar front to back, in large pieces.

    raw: the file, open for reading. tar_bytes: its size, against which every header is checked.
    """

    def __init__(self, raw: BinaryIO, tar_bytes: int) -> None:
        self.raw, self.tar_bytes = raw, tar_bytes
        self.buffer, self.start = b"", 0

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes (at most CHUNK) from `offset` on; fewer where the file ends."""
        begin = offset - self.start
        if begin < 0 or begin + size > len(self.buffer):
            if size and offset < self.tar_bytes:
                self.raw.seek(offset)
                # a short answer of a raw file is not the end of the file
                pieces, wanted = [], min(CHUNK, self.tar_bytes - offset)
                while wanted and (piece := self.raw.read(wanted)):
                    pieces.append(piece)
                    wanted -= len(piece)
                self.buffer = b"".join(pieces)
            else:
                self.buffer = b""
            self.start, begin = offset, 0
        return self.buffer[begin : begin + size]

    def members(self, position: int = 0) -> Iterator[Member]:
        """The regular files in order, from a header at `position` on; folders are passed over.

        Raises TarFormatError for truncation, damaged headers, links, devices, sparse files,
        absolute and parent paths, and where something follows the end of the archive.
        """
        overrides: dict[str, bytes] = {}
        while True:
            header = self.read(position, BLOCK)
            if len(header) < BLOCK or header == NO_BYTES:
                if overrides:
                    self._damaged(position)
                break
            size = self._checked_size(header, position)
            kind = header[156:157]
            data = position + BLOCK
            if kind in EXTENSIONS:
                position = data + padded(size)
                self._read_extension(kind, data, size, overrides)
                continue
            name = self._name(header, overrides)
            if "size" in overrides:
                size = self._pax_size(overrides["size"], position)
            if kind == FOLDER or (kind == b"\0" and name.endswith("/")):
                self._check_path(name, position, data)
                position = data
            else:
                header_at, position = position, data + padded(size)
                self._check(name, kind, overrides, header_at, position)
                yield Member(name, data, size)
            overrides = {}
        self._check_end(position)

    def _checked_size(self, header: bytes, position: int) -> int:
        """The size field of a header whose checksum holds."""
        try:
            if not checksum_holds(header):
                raise ValueError("checksum")
            size = number(header[124:136])
        except ValueError:
            self._damaged(position)
        if size < 0:
            self._damaged(position)
        return size

    def _read_extension(
        self, kind: bytes, offset: int, size: int, overrides: dict[str, bytes]
    ) -> None:
        """Take up what a pax or GNU header says of the member behind it.

        Of several headers the first one wins, of several records in one the last, as for tarfile.
        """
        self._check_extent(offset - BLOCK, offset + padded(size))
        if size > MAX_EXTENSION:
            raise TarFormatError(
                f"damaged: a header of {size:,} bytes at byte {offset - BLOCK:,}; fetch or build "
                "this shard again",
                Diagnosis.DAMAGED_TAR,
                offset - BLOCK,
                offset + padded(size),
            )
        content = self.read(offset, size)
        if kind == GNU_LONG_NAME:
            overrides.setdefault("path", content.partition(b"\0")[0])
        elif kind in (PAX, PAX_SOLARIS, PAX_GLOBAL):
            for keyword, value in dict(self._pax_records(content, offset)).items():
                if keyword in ("path", "size") or keyword.startswith("GNU.sparse."):
                    if kind == PAX_GLOBAL:
                        raise TarFormatError(
                            f"a global header sets {keyword!r} of all members; write the tar anew "
                            "with `tar --format=ustar`",
                            Diagnosis.GLOBAL_HEADER,
                            offset - BLOCK,
                        )
                    overrides.setdefault(keyword, value)

    def _pax_records(self, content: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
        """Records are `LENGTH KEYWORD=VALUE\\n`, where the length is that of all of it."""
        position = 0
        while position < len(content) and content[position]:
            blank = content.find(b" ", position, position + 20)
            digits = content[position:blank] if blank > position else b""
            if not digits.isdigit():
                self._damaged(offset + position)
            end = position + int(digits)
            keyword, equals, value = content[blank + 1 : end - 1].partition(b"=")
            if not blank < end <= len(content) or not equals or content[end - 1 : end] != b"\n":
                self._damaged(offset + position)
            yield keyword.decode("utf-8", "surrogateescape"), value
            position = end

    def _pax_size(self, value: bytes, position: int) -> int:
        if not value.isdigit() or len(value) > 19:
            self._damaged(position)
        return int(value)

    def _name(self, header: bytes, overrides: dict[str, bytes]) -> str:
        path = overrides.get("path")
        if path is None:
            path = header[:100].partition(b"\0")[0]
            prefix = header[345:500].partition(b"\0")[0]
            if prefix and header[156:157] != GNU_SPARSE:
                path = prefix + b"/" + path
        return path.partition(b"\0")[0].decode("utf-8", "surrogateescape")

    def _check(
        self, name: str, kind: bytes, overrides: dict[str, bytes], header_at: int, end: int
    ) -> None:
        is_sparse = kind == GNU_SPARSE or any(k.startswith("GNU.") for k in overrides)
        if kind not in REGULAR or is_sparse:
            # what pax calls a sparse file in its header is not what it is called when unpacked
            stored = overrides.get("GNU.sparse.name", b"").decode("utf-8", "surrogateescape")
            raise TarFormatError(
                f"member {name!r} is a link, a device or a sparse file; a data tar holds regular "
                "files only, so this one is not read",
                Diagnosis.SPARSE_MEMBER if is_sparse else Diagnosis.SPECIAL_MEMBER,
                header_at,
                end,
                stored or name,
            )
        self._check_extent(header_at, end)
        self._check_path(name, header_at, end)

    def _check_path(self, name: str, header_at: int, end: int) -> None:
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise TarFormatError(
                f"member {name!r} has an absolute or parent path; such tars are not read",
                Diagnosis.UNSAFE_PATH,
                header_at,
                end,
                name,
            )

    def _check_extent(self, header_at: int, end: int) -> None:
        if end > self.tar_bytes:
            message = truncated(self.tar_bytes, end)
            raise TarFormatError(message, Diagnosis.TRUNCATED_TAR, header_at)

    def _check_end(self, position: int) -> None:
        """Two blocks of zeros end an archive, and zeros may follow them."""
        marker = self.read(position, 2 * BLOCK)
        if len(marker) < 2 * BLOCK and not (position == 0 and any(marker)):
            if self.tar_bytes == 0:
                message = "not a readable tar (empty file); fetch or build it again"
                raise TarFormatError(message, Diagnosis.NOT_A_TAR, 0)
            message = truncated(self.tar_bytes, position + 2 * BLOCK)
            raise TarFormatError(message, Diagnosis.TRUNCATED_TAR, position)
        if any(marker):
            self._damaged(position)
        position += len(marker)
        while rest := self.read(position, CHUNK):
            if rest.strip(b"\0"):
                position += len(rest) - len(rest.lstrip(b"\0"))
                raise TarFormatError(
                    f"something follows the end of the archive, at byte {position:,}: tars that "
                    "were joined with `cat`, most likely, of which every reader sees the first "
                    "only; join them with `tar --concatenate`, or keep them apart",
                    Diagnosis.JOINED_TARS,
                    position,
                    position - position % BLOCK,
                )
            position += len(rest)

    def _damaged(self, position: int) -> NoReturn:
        if position == 0:
            raise TarFormatError(
                "not a readable tar (no header at its beginning); fetch or build this shard again "
                "(a tar that is compressed has no random access: decompress it first)",
                Diagnosis.NOT_A_TAR,
                0,
            )
        raise TarFormatError(
            f"damaged: no member and no end of the archive at byte {position:,}; fetch or build "
            "this shard again",
            Diagnosis.DAMAGED_TAR,
            position,
        )


def truncated(tar_bytes: int, needed: int) -> str:
    """What is said of a tar that ends too early."""
    return (
        f"truncated: the file has {tar_bytes:,} bytes, its members need {needed:,}; "
        "fetch or build this shard again"
    )


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def checksum_holds(header: bytes) -> bool:
    """Whether a block is a header. Raises ValueError where its checksum is no number."""
    stated = octal(header[148:156])
    # both sums are of all bytes, those of the checksum itself counting as blanks
    content = header[:148] + header[156:]
    unsigned = sum(content.translate(None, b"\0")) + 8 * 0x20
    return stated == unsigned or stated == unsigned - 256 * sum(b > 127 for b in content)


def number(field: bytes) -> int:
    """A numeric field: octal digits or, if its first bit is set, a big-endian integer (GNU)."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0o200 else value - 256 ** (len(field) - 1)
    return octal(field)


def octal(field: bytes) -> int:
    """Octal digits, ended by NUL or blank; nothing counts as 0. Raises ValueError for others."""
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits and not digits.isdigit():
        raise ValueError(f"number {field!r}")
    return int(digits or b"0", 8)
