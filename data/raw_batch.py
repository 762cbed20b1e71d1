"""The members of many samples in one buffer, without an object for each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwork.data.samples import SampleError
from groundwork.data.shard_index import MISSING

#: Key and members of a sample, or why it cannot be used.
RawSample = tuple[str, dict[str, bytes]] | SampleError
#: The same, the members as parts of a buffer.
RawView = tuple[str, dict[str, memoryview]] | SampleError


@dataclass(frozen=True, eq=False)
class RawBatch:
    """Keys and verified members of N samples, undecoded. Can be pickled.

    batch[i] -> (key, {field: memoryview}), or the SampleError that says why it cannot be used.

    fields: that occur in the batch, sorted; F of them.
    buffer: (bytes,) uint8, all members and keys. A view of a member keeps all of it.
    places, sizes: (N, F + 1) int64, in the buffer, of each of `fields`, and of the key (UTF-8) in
        the last column; size MISSING where the sample lacks the field.
    errors: of the samples that cannot be used, by their number; all their sizes are MISSING.
    """

    fields: tuple[str, ...]
    buffer: NDArray[np.uint8]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    errors: Mapping[int, SampleError] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        import torch  # here, because the processes that build shards do without these two seconds

        # from a worker to its rank a tensor travels in shared memory, an array through a pipe
        return {**self.__dict__, "buffer": torch.from_numpy(self.buffer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "buffer": state["buffer"].numpy()})

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> RawView:
        number = range(len(self))[i]
        if (error := self.errors.get(number)) is not None:
            return error
        view = self._view()
        places, sizes = self.places[number].tolist(), self.sizes[number].tolist()
        *members, key = [view[p : p + s] for p, s in zip(places, sizes, strict=True)]
        found = zip(self.fields, members, sizes, strict=False)  # the last size is the key's
        return str(key, "utf-8"), {name: part for name, part, size in found if size != MISSING}

    def __iter__(self) -> Iterator[RawView]:
        return (self[i] for i in range(len(self)))

    def _view(self) -> memoryview:
        return self.buffer.data.toreadonly()

    def key(self, i: int) -> str:
        """The key of a sample. Raises its SampleError if it cannot be used."""
        number = range(len(self))[i]
        if (error := self.errors.get(number)) is not None:
            raise error
        begin, size = int(self.places[number, -1]), int(self.sizes[number, -1])
        return str(self._view()[begin : begin + size], "utf-8")

    def samples(self) -> list[RawSample]:
        """A copy of each sample by itself."""
        view, fields, errors = self._view(), self.fields, self.errors
        results: list[RawSample] = []
        for i, (places, sizes) in enumerate(
            zip(self.places.tolist(), self.sizes.tolist(), strict=True)
        ):
            if i in errors:
                results.append(errors[i])
                continue
            begin = places[-1]
            key = str(view[begin : begin + sizes[-1]], "utf-8")
            members = {
                name: view[place : place + size].tobytes()
                for name, place, size in zip(fields, places, sizes, strict=False)
                if size != MISSING
            }
            results.append((key, members))
        return results


def pack_samples(samples: Sequence[RawSample]) -> RawBatch:
    """Samples that are there already as a batch."""
    fields = tuple(
        sorted({name for sample in samples if isinstance(sample, tuple) for name in sample[1]})
    )
    columns = {name: column for column, name in enumerate(fields)}
    places = np.zeros((len(samples), len(fields) + 1), np.int64)
    sizes = np.full((len(samples), len(fields) + 1), MISSING, np.int64)
    parts: list[bytes] = []
    errors, end = {}, 0
    for i, sample in enumerate(samples):
        if isinstance(sample, SampleError):
            errors[i] = sample
            continue
        key, members = sample
        contents = [(columns[name], content) for name, content in members.items()]
        for column, content in (*contents, (-1, key.encode())):
            places[i, column], sizes[i, column] = end, len(content)
            parts.append(content)
            end += len(content)
    return RawBatch(fields, np.frombuffer(bytearray().join(parts), np.uint8), places, sizes, errors)


def replace_samples(batch: RawBatch, samples: Mapping[int, RawSample]) -> RawBatch:
    """A batch with some samples from elsewhere."""
    numbers = np.array(list(samples), np.int64)
    other = pack_samples(list(samples.values()))
    fields = tuple(sorted({*batch.fields, *other.fields}))
    places = np.zeros((len(batch), len(fields) + 1), np.int64)
    sizes = np.full(places.shape, MISSING, np.int64)
    everyone = np.arange(len(batch))
    for rows, part, begin in ((everyone, batch, 0), (numbers, other, len(batch.buffer))):
        places[rows], sizes[rows] = 0, MISSING
        columns = [*(fields.index(name) for name in part.fields), -1]
        grid = np.ix_(rows, np.array(columns))
        places[grid] = part.places + begin
        sizes[grid] = part.sizes
    errors = {int(numbers[i]): error for i, error in other.errors.items()}
    kept = {i: error for i, error in batch.errors.items() if i not in samples}
    buffer = np.concatenate([batch.buffer, other.buffer])
    return RawBatch(fields, buffer, places, sizes, {**kept, **errors})
