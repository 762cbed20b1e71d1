"""Clips: video files cut between groups of pictures without decoding, and read by frame number.

A group begins with a key frame and can be decoded by itself. Cutting copies the compressed packets,
so nothing is lost; reading decodes only the groups in which the wanted frames lie.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundwork.data.samples import SampleError
from groundwork.data.sources.errors import SourceError

#: Formats that are opened. Others can name files or addresses of their own (playlists).
FORMATS: Final = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
OPEN_OPTIONS: Final = {"format_whitelist": FORMATS, "protocol_whitelist": "file,crypto,data"}
#: Bit-exact: the file tells neither the time nor the version of the library that wrote it.
WRITE_OPTIONS: Final = {"fflags": "+bitexact"}


class ClipError(SampleError):
    """A video that cannot be read or cut; the message says why."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A piece of a video. data: an MP4 file. begin_s, end_s: where it was in the whole video."""

    data: bytes
    frames: int
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What the header of a video says. width, height: of the upright picture, in pixels."""

    width: int
    height: int
    fps: float
    duration_s: float
    is_mp4: bool
    codec: str


def read_clip(data: bytes, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Decode some frames. indices: frame numbers in the order of showing, from 0, any order.

    -> (T, H, W, 3) RGB, upright, in the order of `indices`. Only the groups of pictures that hold
    these frames are decoded, each up to the last frame wanted. Raises ClipError.
    """
    av = _library()
    with _opened(io.BytesIO(data)) as container:
        stream = _video(container)
        shown, keys = _times(container, stream)
        if outside := [index for index in indices if not 0 <= index < len(shown)]:
            raise ClipError(f"frame {outside[0]} of a clip of {len(shown)} frames")
        wanted = sorted({shown[index] for index in indices})
        frames: dict[int, NDArray[np.uint8]] = {}
        try:
            for group in _groups(wanted, keys):
                begin = max((key for key in keys if key <= group[0]), default=min(shown))
                container.seek(begin, stream=stream)
                _decode(container, stream, set(group), frames)
            if len(frames) < len(wanted):
                # where frames are shown much later than decoded, a seek may end too late
                container.seek(min(shown), stream=stream)
                _decode(container, stream, set(wanted) - frames.keys(), frames)
        except av.FFmpegError as error:
            raise ClipError(f"the clip cannot be decoded ({error})") from error
    if missing := set(wanted) - frames.keys():
        number = shown.index(min(missing))
        raise ClipError(f"frame {number} of the clip cannot be decoded; the file is damaged")
    return np.stack([frames[shown[index]] for index in indices])


def count_frames(data: bytes) -> int:
    """The number of frames that a clip shows; nothing is decoded. Raises ClipError."""
    with _opened(io.BytesIO(data)) as container:
        return len(_times(container, _video(container))[0])


def video_facts(path: Path) -> VideoFacts:
    """Read the header of a video file. Raises ClipError."""
    with _opened(path) as container:
        stream = _video(container)
        codec = stream.codec_context
        rate, base = stream.average_rate or stream.guessed_rate, stream.time_base
        if stream.duration is not None and base is not None:
            duration = float(stream.duration * base)
        else:
            duration = (container.duration or 0) / 1e6
        width, height = codec.width, codec.height
        if min(width, height) < 1 or not rate:
            raise ClipError("its header tells neither the size nor the rate of its pictures")
        if _quarter_turns(container, stream) % 2:
            width, height = height, width
        is_mp4 = "mp4" in container.format.name.split(",")
        return VideoFacts(width, height, float(rate), duration, is_mp4, codec.name)


def cut_video(path: Path, clip_s: float, max_bytes: int) -> Iterator[Clip]:
    """Cut a video at key frames into clips of at least `clip_s` seconds; the rest is the last one.

    A video is only cut where no frame needs one from before the cut. Sound is left out. Raises
    ClipError for a clip of more than `max_bytes`, and for a codec that MP4 cannot hold.
    """
    av = _library()
    with _opened(path) as container:
        stream = _video(container)
        clip: list[Any] = []
        try:
            for group in _packet_groups(container, stream):
                is_closed = all(_shown(packet) >= _shown(group[0]) for packet in group)
                if clip and is_closed and _seconds(clip, stream, _shown(group[0])) >= clip_s:
                    yield _remuxed(clip, stream, max_bytes)
                    clip = []
                clip += group
                if sum(packet.size for packet in clip) > max_bytes:
                    raise ClipError(
                        f"no key frame to cut at within {max_bytes:,} bytes; encode it again with "
                        "more key frames (ffmpeg -g 60)"
                    )
            if clip:
                yield _remuxed(clip, stream, max_bytes)
        except av.FFmpegError as error:
            raise ClipError(f"cannot be read to its end ({error})") from error


def _packet_groups(container: Any, stream: Any) -> Iterator[list[Any]]:
    """The packets of each group of pictures, in the order of decoding."""
    group: list[Any] = []
    for packet in container.demux(stream):
        if packet.size == 0 or (packet.dts is None and packet.pts is None):
            continue
        if packet.is_keyframe and group:
            yield group
            group = []
        if group or packet.is_keyframe:  # what stands before the first key frame has no beginning
            group.append(packet)
    if group:
        yield group


def _remuxed(packets: list[Any], stream: Any, max_bytes: int) -> Clip:
    av = _library()
    begin = min(_shown(packet) for packet in packets)
    end = max(_shown(packet) + (packet.duration or 0) for packet in packets)
    origin = stream.start_time or 0
    begin_s, end_s = (float((time - origin) * stream.time_base) for time in (begin, end))
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options=dict(WRITE_OPTIONS)) as container:
            copy = container.add_stream_from_template(stream)
            for packet, dts in zip(packets, _decoding_times(packets), strict=True):
                packet.pts = _shown(packet) - begin
                packet.dts = dts - begin
                packet.stream = copy
                container.mux(packet)
    except (av.FFmpegError, ValueError) as error:
        raise ClipError(
            f"its codec {stream.codec_context.name} cannot be put in MP4 ({error}); encode it "
            "again (ffmpeg -c:v libx264)"
        ) from error
    data = buffer.getvalue()
    if len(data) > max_bytes:
        raise ClipError(f"a clip of {len(data):,} bytes is larger than {max_bytes:,}")
    return Clip(data, len(packets), max(begin_s, 0.0), end_s)


def _decoding_times(packets: list[Any]) -> list[int]:
    """When each packet is to be decoded; Matroska does not say so for the first ones."""
    if all(packet.dts is not None for packet in packets):
        return [packet.dts for packet in packets]
    shown = [_shown(packet) for packet in packets]
    delay = max(early - late for early, late in zip(sorted(shown), shown, strict=True))
    return [time - delay for time in sorted(shown)]


def _times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """When each frame is shown, and those of the key frames, both ascending; nothing is decoded."""
    av = _library()
    shown, keys = [], []
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.dts is None and packet.pts is None:
                continue
            shown.append(_shown(packet))
            if packet.is_keyframe:
                keys.append(_shown(packet))
    except av.FFmpegError as error:
        raise ClipError(f"the clip cannot be read ({error})") from error
    if not shown:
        raise ClipError("the clip holds no frame")
    return sorted(shown), sorted(keys)


def _groups(wanted: list[int], keys: list[int]) -> list[list[int]]:
    """The wanted times, those that need the same key frame together."""
    places = np.searchsorted(keys, wanted, side="right")
    return [
        [time for time, place in zip(wanted, places, strict=True) if place == one]
        for one in np.unique(places)
    ]


def _decode(
    container: Any, stream: Any, wanted: set[int], frames: dict[int, NDArray[np.uint8]]
) -> None:
    """Decode from where the container stands until all of `wanted` are in `frames`.

    No packet is decoded after the last wanted one: what a frame needs comes before it.
    """
    left = set(wanted)
    for packet in container.demux(stream):
        if packet.size:
            left.discard(_shown(packet))
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


def _quarter_turns(container: Any, stream: Any) -> int:
    """How the first frame is to be turned; phones store upright pictures sideways."""
    av = _library()
    try:
        frame = next(container.decode(stream), None)
    except av.FFmpegError as error:
        raise ClipError(f"its first frame cannot be decoded ({error})") from error
    if frame is None:
        raise ClipError("holds no frame")
    return round(getattr(frame, "rotation", 0) / 90)


def _shown(packet: Any) -> int:
    """When the frame of a packet is shown, in units of the stream's time base."""
    time = packet.dts if packet.pts is None else packet.pts
    return -1 if time is None else int(time)


def _seconds(packets: list[Any], stream: Any, end: int) -> float:
    return float((end - min(_shown(packet) for packet in packets)) * stream.time_base)


def _video(container: Any) -> Any:
    if not container.streams.video:
        raise ClipError("holds no pictures")
    return container.streams.video[0]


def _opened(file: Path | io.BytesIO) -> Any:
    av = _library()
    try:
        source = str(file) if isinstance(file, Path) else file
        return av.open(source, options=dict(OPEN_OPTIONS))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ClipError(f"is not a readable MP4, Matroska or AVI file ({error})") from error


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise SourceError(
            "videos are read with PyAV: pip install 'groundwork-pretrain[video]'"
        ) from error
    return av
