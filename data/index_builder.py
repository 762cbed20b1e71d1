"""The columns of an index, collected member by member while a tar is written or scanned."""

import re
from array import array
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.image_header import UNKNOWN, image_size
from groundwork.data.samples import IMAGE_EXTENSIONS

#: Size of a field that a sample lacks, and of a text that is not there.
MISSING: Final = -1
#: webdataset's convention: such members describe the tar and belong to no sample.
META: Final = re.compile(r"__[^/]*__($|/)")
#: The image of a sample is the first of these that it has.
IMAGE_RANKS: Final = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}
NO_IMAGE: Final = len(IMAGE_RANKS)
#: Different fields that a tar may have. Each takes 20 bytes of index for every sample, and where
#: there are more the stems have dots in them.
MAX_FIELDS: Final = 1000
#: Cells (samples x fields) that any tar may have, and how many more for each member.
MIN_CELLS_ALLOWED: Final = 2**22
CELLS_PER_MEMBER: Final = 256
MAX_INT32: Final = 2**31 - 1


class RepeatedMemberError(ValueError):
    """Members that do not make samples; the message says which, without the name of the tar."""

    def __init__(self, message: str, diagnosis: Diagnosis) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


class IndexColumns(NamedTuple):
    """The arrays of `ShardIndex`, under its names."""

    fields: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    key_ends: NDArray[np.int64]
    keys: bytes
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    text_bytes: NDArray[np.int32]


class IndexBuilder:
    """Groups members into samples and notes where they lie: some numbers per member, no objects."""

    def __init__(self) -> None:
        self.key: str | None = None  # of the present sample
        self.samples = 0
        self.keys: set[str] = set()
        self._encoded_keys: list[bytes] = []
        self._columns: dict[str, int] = {}
        self._last_samples: list[int] = []  # by column, the number of the last sample that has it
        self._image_rank = NO_IMAGE
        self._cells = array("q")  # row, column, offset, size, checksum of each member
        self._sizes = array("i")  # width, height, text bytes of each sample

    def begin_member(self, name: str) -> str:
        """The field of a member, whose sample is begun if it is not the present one.

        Empty where the member belongs to no sample. Raises RepeatedMemberError for a key that comes
        back.
        """
        key, field = split_name(name)
        if not field or (name.startswith("__") and META.match(name)):
            return ""
        if key != self.key:
            self.begin_sample(key)
        return field

    def begin_sample(self, key: str) -> None:
        if key in self.keys:
            raise RepeatedMemberError(
                f"sample {key!r} appears twice, with other samples between; give every sample its "
                "own key, and write its members one after the other",
                Diagnosis.REPEATED_KEY,
            )
        self.keys.add(key)
        # names that are not UTF-8 come with lone surrogates
        self._encoded_keys.append(key.encode("utf-8", "backslashreplace"))
        self._sizes.extend((*UNKNOWN, MISSING))
        self.key, self._image_rank = key, NO_IMAGE
        self.samples += 1

    def add_member(self, field: str, offset: int, size: int, checksum: int, head: bytes) -> None:
        """Note a member of the present sample. head: its content or, of a large one, its beginning.

        Raises RepeatedMemberError for a field that the sample has already, and for one that is more
        than MAX_FIELDS.
        """
        column = self._columns.get(field)
        if column is None:
            column = self._add_column(field)
        elif self._last_samples[column] == self.samples:
            raise RepeatedMemberError(
                f"sample {self.key!r} has two {field!r} members; give every sample its own key",
                Diagnosis.REPEATED_FIELD,
            )
        self._last_samples[column] = self.samples
        self._cells.extend((self.samples - 1, column, offset, size, checksum))
        if field == "txt":
            self._sizes[-1] = min(size, MAX_INT32)
        elif IMAGE_RANKS.get(field, NO_IMAGE) < self._image_rank:
            self._image_rank = IMAGE_RANKS[field]
            self._sizes[-3], self._sizes[-2] = image_size(head)

    def _add_column(self, field: str) -> int:
        column = len(self._columns)
        if column == MAX_FIELDS:
            raise self._too_many_fields(f"more than {MAX_FIELDS:,}", field)
        self._columns[field] = column
        self._last_samples.append(0)
        return column

    def _too_many_fields(self, count: str, example: str) -> RepeatedMemberError:
        return RepeatedMemberError(
            f"{count} different fields (such as {min(self._columns)!r} and {example!r}) in "
            f"{self.samples:,} samples: a field is what follows the first dot of a name, so take "
            "the other dots out of the names",
            Diagnosis.TOO_MANY_FIELDS,
        )

    def columns(self) -> IndexColumns:
        """All that was noted, fields in sorted order.

        Raises RepeatedMemberError where the table would be nearly empty.
        """
        cells = np.array(self._cells, np.int64).reshape(-1, 5)
        fields = tuple(sorted(self._columns))
        if are_too_many(len(fields), self.samples, len(cells)):
            raise self._too_many_fields(f"{len(fields):,}", fields[-1])
        positions = {name: position for position, name in enumerate(fields)}
        order = np.array([positions[name] for name in self._columns], np.int64)
        rows, columns = cells[:, 0], order[cells[:, 1]] if len(cells) else cells[:, 1]
        table = np.full((3, self.samples, len(fields)), MISSING, np.int64)
        table[:, rows, columns] = cells[:, 2:].T
        sizes = np.array(self._sizes, np.int32).reshape(-1, 3)
        return IndexColumns(
            fields=fields,
            offsets=table[0],
            sizes=table[1],
            checksums=(table[2] & 0xFFFFFFFF).astype(np.uint32),
            key_ends=np.cumsum([len(key) for key in self._encoded_keys], dtype=np.int64),
            keys=b"".join(self._encoded_keys),
            widths=sizes[:, 0].copy(),
            heights=sizes[:, 1].copy(),
            text_bytes=sizes[:, 2].copy(),
        )


def are_too_many(fields: int, samples: int, members: int) -> bool:
    """Whether a tar of so many different fields, samples and members is refused."""
    cells_allowed = MIN_CELLS_ALLOWED + CELLS_PER_MEMBER * members
    return fields > MAX_FIELDS or fields * samples > cells_allowed


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, field). The field is empty where the member belongs to no sample."""
    directory, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{directory}{slash}{stem}", field.lower() if stem else ""
