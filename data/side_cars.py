"""Writing the side-cars that tars lack, so that no training has to scan them first."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from groundwork.data.shard_check import ShardFile
from groundwork.data.shard_index import (
    ShardError,
    index_path,
    read_index,
    scan_tar,
    write_index,
)
from groundwork.data.shards import file_checksum
from groundwork.data.verify import find_shards

Outcome = Literal["kept", "written", "refused"]


class SideCar(NamedTuple):
    """What became of the side-car of a tar. reason: why it was refused, or had to be written."""

    file: str
    outcome: Outcome
    reason: str = ""


def write_side_cars(where: str, *, rebuild: bool = False) -> Iterator[SideCar]:
    """Write the side-cars that are missing, damaged, or made for a tar of another size.

    where: a folder with or without a manifest, a tar, or a pattern. rebuild: write all of them. A
    tar that does not have the checksum that the manifest says gets none.
    Raises ShardError where there is no tar, OSError where a side-car cannot be written.
    """
    for shard in find_shards(where).shards:
        yield _side_car(shard, rebuild)


def _side_car(shard: ShardFile, rebuild: bool) -> SideCar:
    path = index_path(shard.path)
    try:
        if rebuild:
            reason = "asked for"
        else:
            read_index(path, shard.path)
            return SideCar(shard.file, "kept")
    except FileNotFoundError:
        reason = "there was none"
    except ShardError as error:
        reason = str(error)
    try:
        if shard.crc32c is not None and file_checksum(shard.path) != shard.crc32c:
            reason = "the tar has another checksum than the manifest says; fetch it again"
            return SideCar(shard.file, "refused", reason)
        index = scan_tar(shard.path)
    except FileNotFoundError:
        return SideCar(shard.file, "refused", "the tar is not there; fetch it again")
    except ShardError as error:
        return SideCar(shard.file, "refused", str(error))
    write_index(index, path)
    return SideCar(shard.file, "written", reason)
