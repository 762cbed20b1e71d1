"""Video files, cut into clips.

    ROOT/anything/below/it.mp4   also .mov, .mkv, .webm, .avi
    ROOT/anything/below/it.txt   its caption, if there is one

A clip is a sample without a still picture, with a member `mp4`. An MP4 file that is no longer than
`clip_s` is stored byte for byte; others are cut at key frames without loss, and without sound.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Sample
from groundwork.data.sources.clips import ClipError, count_frames
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.keys import hash_fraction, sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.video_cutting import Clip, VideoFacts, cut_video, video_facts

KIND: Final = "video"

SUFFIXES: Final = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


@dataclass(frozen=True)
class VideoConfig:
    """Which videos, and how they are cut.

    clip_s: least length of a clip in seconds; cuts come at the next key frame. max_clip_bytes: a
    video that cannot be cut into clips this small is bad. val_fraction: share of the videos, not
    clips, in the split "val".
    """

    root: Path
    clip_s: float = 10.0
    max_clip_bytes: int = 2**28
    val_fraction: float = 0.0
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.clip_s < float("inf") or self.max_clip_bytes < 1:
            raise SourceError(
                f"VideoConfig: clip_s {self.clip_s} and max_clip_bytes {self.max_clip_bytes} must "
                "be positive"
            )
        if not 0 <= self.val_fraction < 1:
            raise SourceError(
                f"VideoConfig: val_fraction is {self.val_fraction}; give a number in [0, 1)"
            )


def video_samples(
    config: VideoConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """The clips of every video, in the order of paths and times.

    With `skip_bad`, clips before the place where a video turns out bad are kept.
    """
    report = report or ImportReport()
    files = sorted(
        file
        for file in config.root.rglob("*")
        if file.suffix.casefold() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise SourceError(f"{config.root}: no video here (looked for {', '.join(SUFFIXES)})")
    for file in files:
        name = file.relative_to(config.root).as_posix()
        split = "val" if hash_fraction(config.seed, name) < config.val_fraction else "train"
        try:
            caption = _caption(file)
            facts = video_facts(file)
            for number, clip in enumerate(_clips(config, file, facts)):
                yield split, _sample(name, number, clip, facts, caption)
        except (BadItemError, ClipError) as error:
            report.bad("video", str(file), str(error), skip=config.skip_bad)


def _clips(config: VideoConfig, file: Path, facts: VideoFacts) -> Iterator[Clip]:
    is_short = facts.is_mp4 and 0 < facts.duration_s <= config.clip_s
    if not is_short:
        yield from cut_video(file, config.clip_s, config.max_clip_bytes)
        return
    if file.stat().st_size > config.max_clip_bytes:
        raise ClipError(f"has more than {config.max_clip_bytes:,} bytes for {facts.duration_s} s")
    data = file.read_bytes()
    yield Clip(data, count_frames(data), 0.0, facts.duration_s)


def _sample(name: str, number: int, clip: Clip, facts: VideoFacts, caption: str) -> Sample:
    known = Annotations(
        width=facts.width,
        height=facts.height,
        fps=facts.fps,
        frames=clip.frames,
        begin_s=round(clip.begin_s, 6),
        end_s=round(clip.end_s, 6),
        source={"file_name": name, "clip": number},
    )
    stem = sample_key(name.rpartition(".")[0])
    # files that differ in their extension only are two videos
    stem = stem if name.endswith(".mp4") else sample_key(name)
    return Sample(f"{stem}_{number:04d}", b"", "", caption, known.to_info(), {"mp4": clip.data})


def _caption(file: Path) -> str:
    try:
        return file.with_suffix(".txt").read_text("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise BadItemError(f"its caption {file.stem}.txt cannot be read ({error})") from error
