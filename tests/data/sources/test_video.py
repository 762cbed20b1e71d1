"""Videos are cut and read without loss. Oracle: PyAV decoding a whole file from its beginning."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from groundwork.data.annotations import annotations_from_info
from groundwork.data.dataset import open_dataset
from groundwork.data.shards import write_shards
from groundwork.data.sources.clips import ClipError, read_clip
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.report import ImportReport
from groundwork.data.sources.video import VideoConfig, video_samples
from groundwork.data.sources.video_cutting import cut_video, video_facts

RATE = 10


def encoded(
    frames: int,
    group: int = 6,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    block: int = 8,
) -> bytes:
    """A video of noise that changes from frame to frame, with a key frame every `group` frames.

    block: side of the squares of one colour; the smaller, the larger the file.
    """
    buffer = io.BytesIO()
    random = np.random.default_rng(0)
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = group
        if codec == "libx264":
            stream.options = {"sc_threshold": "0", "keyint_min": str(group), **(options or {})}
        for number in range(frames):
            small = random.integers(0, 255, (48 // block, 64 // block, 3), np.uint8)
            small[0, 0] = number * 5 % 255
            picture = small.repeat(block, 0).repeat(block, 1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return buffer.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


CLIP = encoded(30)
WHOLE = decoded(CLIP)


@given(st.lists(st.integers(0, 29), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_frames_are_read_by_number_in_any_order(indices: list[int]) -> None:
    np.testing.assert_array_equal(read_clip(CLIP, indices), WHOLE[indices])


@pytest.mark.parametrize(
    "container, codec, options",
    [
        ("mp4", "libx264", {"bf": "0"}),
        ("mp4", "libx264", {"bf": "3", "b-pyramid": "normal"}),
        ("mp4", "libx264", {"x264-params": "open-gop=1", "bf": "3"}),
        ("matroska", "libx264", {}),
        ("mp4", "mpeg4", {}),
        ("avi", "mpeg4", {}),
        ("webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
    ],
)
def test_every_frame_of_every_container_is_found(
    container: str, codec: str, options: dict[str, str]
) -> None:
    data = encoded(20, 6, container, codec, options)
    whole = decoded(data)
    for index in range(len(whole)):
        np.testing.assert_array_equal(read_clip(data, [index])[0], whole[index])


def groups_of(data: bytes) -> list[list[tuple[int, int]]]:
    """(position, size) of the packets of each group of pictures."""
    groups: list[list[tuple[int, int]]] = []
    with av.open(io.BytesIO(data)) as file:
        for packet in file.demux(video=0):
            if packet.size:
                if packet.is_keyframe:
                    groups.append([])
                assert packet.pos is not None
                groups[-1].append((packet.pos, packet.size))
    return groups


def test_only_the_groups_that_are_needed_are_decoded() -> None:
    """The other groups may be garbage without any effect."""
    groups = groups_of(CLIP)
    assert len(groups) == 5
    damaged = bytearray(CLIP)
    for number in (0, 1, 3):
        for position, size in groups[number]:
            damaged[position : position + size] = bytes(size)
    wanted = [12, 17, 25]  # of groups 2 and 4
    np.testing.assert_array_equal(read_clip(bytes(damaged), wanted), WHOLE[wanted])
    with pytest.raises(ClipError):
        read_clip(bytes(damaged), [12, 3])


class CountingFile(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("options", [{"bf": "3"}, {"x264-params": "open-gop=1", "bf": "3"}])
def test_of_a_long_file_only_some_groups_are_read(options: dict[str, str]) -> None:
    data = encoded(400, 8, options={**options, "crf": "1"}, block=1)
    whole = decoded(data)
    file = CountingFile(data)
    np.testing.assert_array_equal(read_clip(file, [207, 203]), whole[[207, 203]])
    # the header, and a few of 50 groups: those around these frames, in blocks of 32 KiB
    assert file.count < len(data) / 6
    everything = CountingFile(data)
    np.testing.assert_array_equal(read_clip(everything, range(400)), whole)
    assert everything.count > len(data)


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(CLIP)
    np.testing.assert_array_equal(read_clip(tmp_path / "v.mp4", [29, 0]), WHOLE[[29, 0]])
    with pytest.raises(ClipError, match="no frame is asked for"):
        read_clip(CLIP, [])


@pytest.mark.parametrize(
    "data, indices, complaint",
    [
        (CLIP, [30], "frame 30 of a clip of 30 frames"),
        (CLIP, [0, -1], "frame -1 of a clip of 30 frames"),
        (b"", [0], "is not a readable MP4"),
        (CLIP[:300], [0], "not a readable|cannot be read|holds no frame"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hosts\n", [0], "not a read"),
        (b"ffconcat version 1.0\nfile /etc/hosts\n", [0], "is not a readable MP4"),
    ],
)
def test_clips_that_cannot_be_read_are_refused(
    data: bytes, indices: list[int], complaint: str
) -> None:
    with pytest.raises(ClipError, match=complaint):
        read_clip(data, indices)


@pytest.mark.parametrize(
    "container, codec, options",
    [
        ("mp4", "libx264", {"bf": "2"}),
        ("mp4", "libx264", {"x264-params": "open-gop=1", "bf": "3"}),
        ("matroska", "libx264", {}),
        ("avi", "mpeg4", {}),
    ],
)
def test_cutting_loses_no_frame(
    tmp_path: Path, container: str, codec: str, options: dict[str, str]
) -> None:
    file = tmp_path / "v.bin"
    file.write_bytes(encoded(50, 6, container, codec, options))
    whole = decoded(file.read_bytes())
    clips = list(cut_video(file, 1.0, 2**20))
    assert sum(clip.frames for clip in clips) == len(whole) == 50
    parts = [read_clip(clip.data, range(clip.frames)) for clip in clips]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    if codec == "libx264" and "x264-params" not in options:
        assert [clip.frames for clip in clips] == [12, 12, 12, 12, 2]
        np.testing.assert_allclose([c.begin_s for c in clips], [0.0, 1.2, 2.4, 3.6, 4.8], atol=0.01)
        np.testing.assert_allclose([c.end_s for c in clips], [1.2, 2.4, 3.6, 4.8, 5.0], atol=0.01)
    again = list(cut_video(file, 1.0, 2**20))
    assert [clip.data for clip in clips] == [clip.data for clip in again]


@pytest.fixture
def videos(tmp_path: Path, put: Any) -> Path:
    root = tmp_path / "videos"
    put(root / "a" / "short.mp4", CLIP)
    put(root / "a" / "short.txt", "noise, briefly\n")
    put(root / "b.mkv", encoded(50, 5, "matroska"))
    put(root / "notes.md", "no video")
    return root


def test_short_files_pass_unchanged_and_long_ones_are_cut(videos: Path) -> None:
    pairs = list(video_samples(VideoConfig(videos, clip_s=3.0)))
    assert [s.text for _, s in pairs] == ["noise, briefly", "", ""]
    assert pairs[0][1].key.startswith("a-short-") and pairs[0][1].key.endswith("_0000")
    short, *cut = (s for _, s in pairs)
    assert dict(short.members) == {"mp4": CLIP} and short.image == b""
    known = annotations_from_info(short.info)
    assert (known.width, known.height, known.fps, known.frames) == (64, 48, 10.0, 30)
    assert (known.begin_s, known.end_s) == (0.0, 3.0)
    assert [s.info["frames"] for s in cut] == [30, 20]
    assert [(s.info["begin_s"], s.info["end_s"]) for s in cut] == [(0.0, 3.0), (3.0, 5.0)]
    assert cut[1].info["source"] == {"file_name": "b.mkv", "clip": 1}
    whole = decoded((videos / "b.mkv").read_bytes())
    np.testing.assert_array_equal(read_clip(cut[1].members["mp4"], [0, 19]), whole[[30, 49]])


def test_clips_survive_a_tar(videos: Path, tmp_path: Path) -> None:
    samples = list(video_samples(VideoConfig(videos, clip_s=3.0)))
    write_shards(samples, tmp_path / "out", name="v", source={}, licence="?")
    dataset = open_dataset(str(tmp_path / "out"))
    assert [dataset.read(i) for i in range(3)] == [s for _, s in samples]


def test_a_video_on_its_side_is_read_upright(tmp_path: Path) -> None:
    upright = encoded(4)
    # the matrix in the track header: rows (0, 1, 0), (-1, 0, 0) turn by a quarter, clockwise
    unit = b"".join(n.to_bytes(4, "big") for n in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    turned = (0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000)
    begin = upright.index(unit, upright.index(b"tkhd"))
    data = bytearray(upright)
    data[begin : begin + 36] = b"".join(n.to_bytes(4, "big") for n in turned)
    file = tmp_path / "phone.mp4"
    file.write_bytes(bytes(data))
    facts = video_facts(file)
    assert (facts.width, facts.height) == (48, 64)
    clockwise = np.rot90(decoded(upright), -1, axes=(1, 2))
    np.testing.assert_array_equal(read_clip(bytes(data), range(4)), clockwise)
    (clip,) = cut_video(file, 9.0, 2**20)
    np.testing.assert_array_equal(read_clip(clip.data, range(4)), clockwise)


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is not a readable MP4"),
        (b"<html>404</html>", "is not a readable MP4"),
        (cut_short(CLIP), "bad.mp4"),
        (encoded(50, 50), "no key frame to cut at within 2,000 bytes"),
    ],
)
def test_bad_videos_are_named_or_counted(
    videos: Path, put: Any, content: bytes, complaint: str
) -> None:
    put(videos / "bad.mp4", content)
    (videos / "b.mkv").unlink()
    limit = 2_000 if b"moov" in content and "no key" in complaint else 2**20
    (videos / "a" / "short.mp4").write_bytes(encoded(1))
    config = VideoConfig(videos, clip_s=4.0, max_clip_bytes=limit)
    with pytest.raises(SourceError, match=complaint):
        list(video_samples(config))
    report = ImportReport()
    config = VideoConfig(videos, clip_s=4.0, max_clip_bytes=limit, skip_bad=True)
    kept = [s.info["source"]["file_name"] for _, s in video_samples(config, report)]
    assert kept == ["a/short.mp4"] and report.skipped == {"video": 1}


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="must be positive"):
        VideoConfig(tmp_path, clip_s=0)
    with pytest.raises(SourceError, match=r"in \[0, 1\)"):
        VideoConfig(tmp_path, val_fraction=1.0)
    with pytest.raises(SourceError, match="no video here"):
        list(video_samples(VideoConfig(tmp_path)))
