"""The samples of a tar that may be damaged: all that can be found, and what hides the others.

`TarReader` stops at the first thing that is wrong. Here reading goes on behind it where the next
member can be told: behind a member that is refused, at the next archive of joined ones, and at the
next header of ustar behind one that is damaged, as GNU tar does. (A tar inside the tar would then
be taken for members of it.)
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.index_builder import META, are_too_many, split_name
from groundwork.data.tar_reader import (
    BLOCK,
    EXTENSIONS,
    PAX,
    Member,
    TarFormatError,
    TarReader,
    checksum_holds,
    number,
    padded,
)

#: Bytes that are searched for a header at a time.
SEARCHED: Final = 1024**2
#: What may have taken members away from the samples beside it.
BREAKS: Final = frozenset(
    (
        Diagnosis.TRUNCATED_TAR,
        Diagnosis.DAMAGED_TAR,
        Diagnosis.NOT_A_TAR,
    )
)


class Problem(NamedTuple):
    """What is wrong at a byte of a tar. key: of the sample, empty where it is none's. member: name
    of the one that is refused, empty where what is lost has no name.
    """

    offset: int
    diagnosis: Diagnosis
    detail: str
    key: str = ""
    member: str = ""


@dataclass(slots=True)
class FoundSample:
    """members: field -> (offset, size) of its content. fault: why it is not to be used."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    fault: Problem | None = None

    @property
    def offset(self) -> int:
        """Of its first member."""
        return min((offset for offset, _ in self.members.values()), default=0)


class TarContent(NamedTuple):
    """samples: in the order of the tar, with those that `fault` excludes. problems: of the tar and
    of repeated keys, in order. repeated: further samples of keys that are among `samples`.
    pax_headers: how many members have one; first_pax: where.
    """

    samples: list[FoundSample]
    problems: list[Problem]
    repeated: list[FoundSample]
    pax_headers: int
    first_pax: int


def readable_members(reader: TarReader) -> Iterator[Member | Problem]:
    """The members in order, and a Problem in place of what cannot be read."""
    position, last_problem = 0, -1
    while True:
        try:
            yield from reader.members(position)
            return
        except TarFormatError as error:
            if error.offset > last_problem:  # else what follows joined tars is none, said already
                yield Problem(error.offset, error.diagnosis, str(error), member=error.member)
            last_problem = error.offset
            if error.diagnosis is Diagnosis.TRUNCATED_TAR:
                return
            behind = error.offset - error.offset % BLOCK + BLOCK
            if error.diagnosis is Diagnosis.JOINED_TARS:
                position = behind - BLOCK
                if _is_header(reader.read(position, BLOCK)):
                    continue
            # what a link states as its size is followed by its bytes, or not
            is_known = error.resume is not None and error.diagnosis is not Diagnosis.SPECIAL_MEMBER
            found = _next_header(reader, max(behind, error.resume or 0) if is_known else behind)
            if found is None:
                return
            position = found


def find_samples(reader: TarReader) -> TarContent:
    """Group the members of a tar into samples, whatever is wrong with it.

    The first sample of a key stays. Members that come back to a key with fields that it lacks are
    taken to be the rest of it. A sample beside a break, or with a member that is refused, stays if
    it has the fields that the samples of this tar usually have.
    """
    samples: list[FoundSample] = []
    repeated: list[FoundSample] = []
    problems: list[Problem] = []
    by_key: dict[str, FoundSample] = {}
    at_break: list[tuple[FoundSample, Problem]] = []
    refused: list[Problem] = []
    pending: Problem | None = None  # a break behind which no member has come yet
    current = FoundSample("")
    end, pax_headers, first_pax = 0, 0, 0
    for item in readable_members(reader):
        if isinstance(item, Problem):
            problems.append(item)
            if item.member:
                refused.append(item)
            elif item.diagnosis in BREAKS:
                pending = item
                at_break.append((current, item))
            continue
        if item.offset - BLOCK > end and PAX in _extension_kinds(reader, end, item.offset - BLOCK):
            pax_headers += 1
            first_pax = first_pax or end
        end = item.offset + padded(item.size)
        key, field_name = _split_name(item.name)
        if not field_name or (item.name.startswith("__") and META.match(item.name)):
            continue
        if key != current.key:
            first = by_key.get(key)
            if first is None:
                current = by_key[key] = FoundSample(key)
                samples.append(current)
            else:
                detail = f"sample {key!r} comes back after others"
                problems.append(Problem(item.offset, Diagnosis.REPEATED_KEY, detail, key))
                current = first
                if field_name in first.members:
                    current = FoundSample(key, fault=problems[-1])
                    repeated.append(current)
        elif field_name in current.members:
            detail = f"sample {key!r} has two {field_name!r} members"
            problems.append(Problem(item.offset, Diagnosis.REPEATED_FIELD, detail, key))
            current = FoundSample(key, fault=problems[-1])
            repeated.append(current)
        current.members[field_name] = item.offset, item.size
        if pending is not None:
            at_break.append((current, pending))
            pending = None
    for problem in refused:  # its own sample lacks it, those beside it lack nothing
        if (sample := by_key.get(_split_name(problem.member)[0])) is not None:
            at_break.append((sample, problem))
    _exclude_incomplete(samples, at_break)
    _exclude_dotted_names(samples, problems)
    return TarContent(samples, problems, repeated, pax_headers, first_pax)


def _split_name(name: str) -> tuple[str, str]:
    key, field_name = split_name(name)
    # names that are not UTF-8 as in the index
    return key.encode("utf-8", "backslashreplace").decode("utf-8"), field_name


def _exclude_incomplete(
    samples: list[FoundSample], at_break: list[tuple[FoundSample, Problem]]
) -> None:
    doubtful = {id(sample) for sample, _ in at_break}
    kinds = Counter(frozenset(s.members) for s in samples if id(s) not in doubtful)
    usual = kinds.most_common(1)[0][0] if kinds else None
    for sample, problem in at_break:
        if (
            sample.members
            and sample.fault is None
            and (usual is None or usual - set(sample.members))
        ):
            detail = f"may lack members: {problem.detail}"
            sample.fault = Problem(sample.offset, problem.diagnosis, detail, sample.key)


def _exclude_dotted_names(samples: list[FoundSample], problems: list[Problem]) -> None:
    """The limits that indices have, see `IndexBuilder`."""
    fields = {name for sample in samples for name in sample.members}
    members = sum(len(sample.members) for sample in samples)
    if are_too_many(len(fields), len(samples), members):
        detail = f"{len(fields):,} different fields: take the dots out of the names"
        problems.append(Problem(samples[0].offset, Diagnosis.TOO_MANY_FIELDS, detail))
        for sample in samples:
            sample.fault = problems[-1]


def _extension_kinds(reader: TarReader, begin: int, end: int) -> set[bytes]:
    """The kinds of the extension headers between two members."""
    kinds: set[bytes] = set()
    while begin < end:
        header = reader.read(begin, BLOCK)
        kind = header[156:157]
        if kind not in EXTENSIONS or kind in kinds or not _is_header(header):
            break
        kinds.add(kind)
        try:
            begin += BLOCK + padded(max(0, number(header[124:136])))
        except ValueError:
            break
    return kinds


def _next_header(reader: TarReader, position: int) -> int | None:
    """Where the next header of ustar begins, at a block from `position` on."""
    if _is_header(reader.read(position, BLOCK)):
        return position
    while position < reader.tar_bytes:
        data = reader.read(position, min(SEARCHED, reader.tar_bytes - position))
        if not data:
            return None
        at = data.find(b"ustar", 257)
        while at >= 0:
            begin = at - 257
            if begin % BLOCK == 0 and _is_header(data[begin : begin + BLOCK]):
                return position + begin
            at = data.find(b"ustar", at + 1)
        position += len(data)
    return None


def _is_header(block: bytes) -> bool:
    try:
        return len(block) == BLOCK and block[257:262] == b"ustar" and checksum_holds(block)
    except ValueError:
        return False
