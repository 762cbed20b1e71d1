"""Filters: which samples to show. A data set has no index of texts, so they are read one by one."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from groundwork.data.browse.collection import Split
from groundwork.data.browse.description import brief, image_size
from groundwork.data.samples import Sample, SampleError

#: Bounds of one scan, in seconds and matches; the page goes on from `next` if asked to.
MAX_SECONDS = 60.0
MAX_MATCHES = 240
#: Seconds between two lines that say how far the scan is.
PROGRESS_S = 0.2


@dataclass(frozen=True)
class Filters:
    """What a sample must be; None and "" ask nothing.

    text: in its key, its text or any string of its `json` member, whatever the case. label: its
    class. smallest, largest: bounds of the shorter and of the longer side in pixels. boxes: True
    with, False without boxes. bad: only samples that cannot be read or decoded.
    """

    text: str = ""
    label: int | None = None
    smallest: int | None = None
    largest: int | None = None
    boxes: bool | None = None
    bad: bool = False

    def find(self, split: Split, number: int) -> dict[str, Any] | None:
        """The tile of a sample that passes, else None."""
        try:
            sample = split.read(number)
        except SampleError as error:
            if not self.bad or self.text.lower() not in split.where(number)[1].lower():
                return None
            return {**brief(split, number), "error": str(error)}
        if not self._pass(sample):
            return None
        diagnosis = split.diagnosis(number) if self.bad else None
        if self.bad and diagnosis is None:
            return None
        entry = brief(split, number)
        return entry if diagnosis is None else {**entry, "error": diagnosis}

    def _pass(self, sample: Sample) -> bool:
        info = sample.info
        if self.label is not None and info.get("label", -1) != self.label:
            return False
        if self.boxes is not None and bool(info.get("boxes")) is not self.boxes:
            return False
        if self.text and not _mentions(sample, self.text.lower()):
            return False
        if self.smallest is not None or self.largest is not None:
            size = image_size(sample.image)
            if size is None:
                return False
            if self.smallest is not None and min(size) < self.smallest:
                return False
            if self.largest is not None and max(size) > self.largest:
                return False
        return True


def scan(split: Split, filters: Filters, start: int, *, training: bool) -> Iterator[dict[str, Any]]:
    """Look through a split from place `start` on.

    training: in the order of its first epoch, else in file order.
    Yields {"match": tile}, {"scanned": next place}, and last {"done": True, "next": place or None};
    None says that the split is at its end.
    """
    deadline = time.monotonic() + MAX_SECONDS
    told, matches, place = time.monotonic(), 0, start
    while place < len(split) and matches < MAX_MATCHES:
        now = time.monotonic()
        if now > deadline:
            break
        if now - told > PROGRESS_S:
            told = now
            yield {"scanned": place}
        number = split.order(place) if training else place
        entry = filters.find(split, number)
        if entry is not None:
            matches += 1
            yield {"match": {**entry, "position": place if training else None}}
        place += 1
    yield {"scanned": place}
    yield {"done": True, "next": place if place < len(split) else None}


def _mentions(sample: Sample, wanted: str) -> bool:
    return any(wanted in text.lower() for text in (sample.key, sample.text, *_strings(sample.info)))


def _strings(info: Any) -> Iterator[str]:
    """Every string of a JSON value (keys of objects are no content)."""
    waiting = [info]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
