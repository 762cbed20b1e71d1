"""Cutting video files between groups of pictures, without decoding.

A group begins with a key frame and can be decoded by itself. Cutting copies the compressed packets,
so nothing is lost.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundwork.data.sources.clips import ClipError, av_library, open_video, pictures, shown_at

#: Bit-exact: the file tells neither the time nor the version of the library that wrote it.
WRITE_OPTIONS: Final = {"fflags": "+bitexact"}


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


def video_facts(path: Path) -> VideoFacts:
    """Read the header of a video file. Raises ClipError."""
    with open_video(path) as container:
        stream = pictures(container)
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
    av = av_library()
    with open_video(path) as container:
        stream = pictures(container)
        clip: list[Any] = []
        try:
            for group in _packet_groups(container, stream):
                is_closed = all(shown_at(packet) >= shown_at(group[0]) for packet in group)
                if clip and is_closed and _seconds(clip, stream, shown_at(group[0])) >= clip_s:
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
    av = av_library()
    begin = min(shown_at(packet) for packet in packets)
    end = max(shown_at(packet) + (packet.duration or 0) for packet in packets)
    origin = stream.start_time or 0
    begin_s, end_s = (float((time - origin) * stream.time_base) for time in (begin, end))
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4", options=dict(WRITE_OPTIONS)) as container:
            copy = container.add_stream_from_template(stream)
            for packet, dts in zip(packets, _decoding_times(packets), strict=True):
                packet.pts = shown_at(packet) - begin
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
    shown = [shown_at(packet) for packet in packets]
    delay = max(early - late for early, late in zip(sorted(shown), shown, strict=True))
    return [time - delay for time in sorted(shown)]


def _quarter_turns(container: Any, stream: Any) -> int:
    """How the first frame is to be turned; phones store upright pictures sideways."""
    av = av_library()
    try:
        frame = next(container.decode(stream), None)
    except av.FFmpegError as error:
        raise ClipError(f"its first frame cannot be decoded ({error})") from error
    if frame is None:
        raise ClipError("holds no frame")
    return round(getattr(frame, "rotation", 0) / 90)


def _seconds(packets: list[Any], stream: Any, end: int) -> float:
    return float((end - min(shown_at(packet) for packet in packets)) * stream.time_base)
