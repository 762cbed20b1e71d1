"""What an import left out or mended, and how one bad item ends it or is passed over."""

import logging
from collections import Counter
from collections.abc import Callable

from groundwork.data.sources.errors import SourceError

logger = logging.getLogger(__name__)

#: Called with the place (file, record) of a bad item, and the reason.
OnBad = Callable[[str, str], None]


class BadItemError(Exception):
    """Why one item (picture, record, line) cannot be used."""


class ImportReport:
    """Counts of one import, filled while its samples are drawn.

    skipped: bad items that were passed over, by kind. mended: what was changed, by kind, such as
    boxes cut to their picture.
    """

    def __init__(self, on_bad: OnBad | None = None) -> None:
        self.skipped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.on_bad = on_bad

    def bad(self, kind: str, where: str, reason: str, *, skip: bool) -> None:
        """Count and tell a bad item, or raise SourceError where such items are not to be skipped.

        kind: one of few words ("image", "box"), for the counts. where: file and id, line or key.
        """
        if not skip:
            raise SourceError(
                f"{where}: {reason}; mend or remove it, or pass over such items with --skip-bad "
                "(skip_bad: true)"
            )
        self.skipped[kind] += 1
        if self.on_bad is None:
            logger.warning("skipped %s: %s", where, reason)
        else:
            self.on_bad(where, reason)

    def summary(self) -> str:
        """One line for people; empty where there is nothing to tell."""
        parts = [f"{count:,} {kind} skipped" for kind, count in sorted(self.skipped.items())]
        parts += [f"{count:,} {kind}" for kind, count in sorted(self.mended.items())]
        return ", ".join(parts)
