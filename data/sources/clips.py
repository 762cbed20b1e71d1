"""Clips read by frame number: of a video, only what the wanted frames need is read and decoded.

A group of pictures begins with a key frame and can be decoded by itself. MP4 says at its beginning
(or end) where each packet lies, so that of a long file, too, only some groups are read; of other
containers all packets are read, though not decoded, to learn when their frames are shown.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from groundwork.data.samples import SampleError
from groundwork.data.sources.errors import SourceError

#: Formats that are opened. Others can name files or addresses of their own (playlists).
FORMATS: Final = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
OPEN_OPTIONS: Final = {"format_whitelist": FORMATS, "protocol_whitelist": "file,crypto,data"}


class ClipError(SampleError):
    """A video that cannot be read or cut; the message says why."""


def read_clip(source: bytes | Path | BinaryIO, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Decode some frames. indices: frame numbers in the order of showing, from 0, any order.

    source: a file, what is in it, or something that can be read and sought in.
    -> (T, H, W, 3) RGB, upright, in the order of `indices`. Only the groups of pictures that hold
    these frames are decoded, each up to the last frame wanted. Raises ClipError.
    """
    av = av_library()
    if not indices:
        raise ClipError("no frame is asked for")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with open_video(file) as container:
            places = _indexed_places(container, pictures(container), indices)
            frames = {} if places is None else _frames(container, places)
        if places is None:
            with open_video(file) as container:
                places = _scanned_places(container, pictures(container), indices)
                frames = _frames(container, places)
    except av.FFmpegError as error:
        raise ClipError(f"the clip cannot be decoded ({error})") from error
    missing = sorted(index for index in indices if places.shown[index] not in frames)
    if missing:
        raise ClipError(f"frame {missing[0]} of the clip cannot be decoded; the file is damaged")
    return np.stack([frames[places.shown[index]] for index in indices])


def count_frames(data: bytes) -> int:
    """The number of frames that a clip shows; nothing is decoded. Raises ClipError."""
    av = av_library()
    with open_video(io.BytesIO(data)) as container:
        try:
            return len(_times(container, pictures(container))[0])
        except av.FFmpegError as error:
            raise ClipError(f"the clip cannot be read ({error})") from error


@dataclass(frozen=True)
class _Places:
    """Where wanted frames lie. Times are in units of the stream's time base.

    shown: frame number -> when it is shown. groups: where to seek -> the times of the frames to be
    decoded from there. first: the beginning of the whole video.
    """

    first: int
    shown: dict[int, int] = field(default_factory=dict)
    groups: dict[int, set[int]] = field(default_factory=dict)

    def add(self, index: int, shown: int, seek_to: int) -> None:
        self.shown[index] = shown
        self.groups.setdefault(seek_to, set()).add(shown)


def _scanned_places(container: Any, stream: Any, indices: Sequence[int]) -> _Places:
    """Read all packets to learn when each frame is shown."""
    shown, keys = _times(container, stream)
    _refuse_outside(indices, len(shown))
    places = _Places(shown[0])
    for index in sorted(set(indices)):
        begin = max((key for key in keys if key <= shown[index]), default=shown[0])
        places.add(index, shown[index], begin)
    return places


def _indexed_places(container: Any, stream: Any, indices: Sequence[int]) -> _Places | None:
    """Use the index of an MP4 file, and read the groups of the wanted frames only.

    None where there is no index of all frames, or one that does not fit the packets.
    """
    entries = list(stream.index_entries or ())
    if not entries or len(entries) != stream.frames or any(e.is_discard for e in entries):
        return None
    begins = [number for number, entry in enumerate(entries) if entry.is_keyframe]
    if not begins or begins[0] != 0:
        return None
    _refuse_outside(indices, len(entries))
    groups = _IndexedGroups(container, stream, entries, begins)
    places = _Places((groups.times(0) or [0])[0])
    for index in sorted(set(indices)):
        found = groups.find(index)
        if found is None:
            return None
        places.add(index, *found)
    return places


class _IndexedGroups:
    """Groups of pictures by number, read when asked for.

    Groups stand in the file in the order of decoding. Frames that follow a key frame there but are
    shown before it ("leading" ones) count, in the order of showing, to the group before.
    """

    def __init__(
        self, container: Any, stream: Any, entries: Sequence[Any], begins: Sequence[int]
    ) -> None:
        self.container, self.stream, self.entries = container, stream, entries
        self.begins = [*begins, len(entries)]
        self._times: dict[int, list[int] | None] = {}

    def find(self, index: int) -> tuple[int, int] | None:
        """(when a frame is shown, where to seek for it), or None where the index is wrong."""
        group = int(np.searchsorted(self.begins, index, side="right")) - 1
        leading = self._leading(group)
        if leading is not None and index < self.begins[group] + len(leading):
            group -= 1
            leading = self._leading(group)
        present, following = self.times(group), self._leading(group + 1)
        if leading is None or present is None or following is None:
            return None
        shown = sorted([time for time in present if time >= present[0]] + following)
        number = index - self.begins[group] - len(leading)
        if not 0 <= number < len(shown):
            return None
        return shown[number], present[0]

    def times(self, group: int) -> list[int] | None:
        """When the frames of a group are shown, in the order of decoding."""
        if group not in self._times:
            self._times[group] = self._read(group)
        return self._times[group]

    def _leading(self, group: int) -> list[int] | None:
        if not 0 <= group < len(self.begins) - 1:
            return []
        times = self.times(group)
        return None if times is None else [time for time in times if time < times[0]]

    def _read(self, group: int) -> list[int] | None:
        begin, end = self.begins[group], self.begins[group + 1]
        # the index knows when to decode; a seek wants to know when to show, which is later
        delay = max(-self.entries[0].timestamp, 0)
        self.container.seek(self.entries[begin].timestamp + delay, stream=self.stream)
        packets = self.container.demux(self.stream)
        earlier = begin - self.begins[max(group - 2, 0)]
        place = self.entries[begin].pos
        first = next((p for p in islice(packets, earlier + 1) if p.pos == place), None)
        if first is None:
            return None
        times = [packet.pts for packet in (first, *islice(packets, end - begin - 1))]
        return None if len(times) < end - begin or None in times else times


def _refuse_outside(indices: Sequence[int], frames: int) -> None:
    if outside := [index for index in indices if not 0 <= index < frames]:
        raise ClipError(f"frame {outside[0]} of a clip of {frames} frames")


def _times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """When each frame is shown, and those of the key frames, both ascending; nothing is decoded."""
    shown, keys = [], []
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.dts is None and packet.pts is None:
            continue
        shown.append(shown_at(packet))
        if packet.is_keyframe:
            keys.append(shown_at(packet))
    if not shown:
        raise ClipError("the clip holds no frame")
    return sorted(shown), sorted(keys)


def _frames(container: Any, places: _Places) -> dict[int, NDArray[np.uint8]]:
    """The frames of all places, by the time at which they are shown."""
    stream = pictures(container)
    frames: dict[int, NDArray[np.uint8]] = {}
    for begin, times in places.groups.items():
        container.seek(begin, stream=stream)
        _decode(container, stream, times, frames)
    if left := set(places.shown.values()) - frames.keys():
        # where frames are shown much later than decoded, a seek may end too late
        container.seek(places.first, stream=stream)
        _decode(container, stream, left, frames)
    return frames


def _decode(
    container: Any, stream: Any, wanted: set[int], frames: dict[int, NDArray[np.uint8]]
) -> None:
    """Decode from where the container stands until all of `wanted` are in `frames`.

    No packet is decoded after the last wanted one: what a frame needs comes before it.
    """
    left = set(wanted)
    for packet in container.demux(stream):
        if packet.size:
            left.discard(shown_at(packet))
        decoded = packet.decode()
        if not left and packet.size:
            decoded += stream.codec_context.decode(None)  # what the decoder still holds back
        for frame in decoded:
            if frame.pts in wanted:
                turns = round(getattr(frame, "rotation", 0) / 90)
                picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
                frames[frame.pts] = np.ascontiguousarray(picture)
        if not left:
            return


def pictures(container: Any) -> Any:
    """The first stream of pictures of an opened video. Raises ClipError."""
    if not container.streams.video:
        raise ClipError("holds no pictures")
    return container.streams.video[0]


def shown_at(packet: Any) -> int:
    """When the frame of a packet is shown, in units of the stream's time base."""
    time = packet.dts if packet.pts is None else packet.pts
    return -1 if time is None else int(time)


def open_video(file: Path | BinaryIO) -> Any:
    """Open a video for reading from its beginning; a context manager. Raises ClipError."""
    av = av_library()
    try:
        if not isinstance(file, Path):
            file.seek(0)
        source = str(file) if isinstance(file, Path) else file
        return av.open(source, options=dict(OPEN_OPTIONS))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ClipError(f"is not a readable MP4, Matroska or AVI file ({error})") from error


def av_library() -> Any:
    """PyAV. Raises SourceError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise SourceError(
            "videos are read with PyAV: pip install 'groundwork-pretrain[video]'"
        ) from error
    return av
