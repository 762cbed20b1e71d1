"""Which sample training sees at a position: the bridge to the global order, kept in one place."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from groundwork.data.decode import decode_image
from groundwork.data.order import GlobalOrder, replacement
from groundwork.data.samples import Sample, SampleError, class_label
from groundwork.data.stream import MAX_ATTEMPTS

#: (sample, position) -> anything. Raises SampleError where training could not use the sample there.
Check = Callable[[Sample, int], object]


#: Position of the order of training -> number of the sample that stands there.
Order = Callable[[int], int]


def global_order(num_samples: int, seed: int, *, shuffle: bool) -> Order:
    """The order of a run that trains on one split alone."""
    order = GlobalOrder(num_samples, seed, shuffle)
    return lambda position: int(order.indices(np.array([position], np.int64))[0])


@dataclass(frozen=True)
class Replaced:
    """A bad sample whose place another one takes. number: in its split."""

    number: int
    reason: str


@dataclass(frozen=True)
class Placed:
    """What training sees at a position. replaced: the bad samples that were drawn before.

    number: None where MAX_ATTEMPTS samples in a row are bad, at which training stops.
    """

    position: int
    number: int | None
    replaced: tuple[Replaced, ...]


def placed(
    position: int,
    order: Order,
    num_samples: int,
    seed: int,
    *,
    read: Callable[[int], Sample],
    check: Check,
) -> Placed:
    """Draw as `Stream` does: the sample of the order, then its stand-ins until one is good."""
    number = order(position)
    replaced = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            check(read(number), position)
        except SampleError as error:
            replaced.append(Replaced(number, str(error)))
            number = replacement(seed, num_samples, position, attempt)
        else:
            return Placed(position, number, tuple(replaced))
    return Placed(position, None, tuple(replaced))


def check_sample(sample: Sample, _position: int) -> None:
    """What every decoder asks of a sample: a label that is one, an image that decodes."""
    class_label(sample)
    if sample.image:
        decode_image(sample.image)
