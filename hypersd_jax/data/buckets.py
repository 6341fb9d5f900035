"""Aspect buckets: which sizes there are, and an endless stream whose batches each come from one of them.

As NovelAI's and kohya's trainers do it: images are sorted by shape into sizes of about equal area, so that little is
cropped away. Each size compiles its own program.
"""

from __future__ import annotations

import numpy as np

from hypersd_jax.data.order import Shuffle, mix

# No bucket is more than twice as long as wide, nor much smaller in area than the square one.
MAX_ASPECT = 2
MIN_AREA = 0.9
BATCHES, ITEMS = 0, 1


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """List the (height, width) of all buckets: multiples of ``step``, as near to ``resolution`` squared as can be.

    Raises:
        ValueError: ``resolution`` is not a multiple of ``step``.
    """
    if resolution % step:
        raise ValueError(f"bucket_step={step} must divide the resolution {resolution}")
    found = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = min(resolution * resolution // short // step * step, MAX_ASPECT * short)
        if long * short >= MIN_AREA * resolution * resolution:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(sizes: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """Find the bucket of each image (N, 2), by the aspect ratio's logarithm: indices into ``buckets``, int64 (N,)."""
    aspects = np.log(sizes[:, 0] / sizes[:, 1])
    shapes = np.asarray(buckets, np.float64)
    distance = np.abs(aspects[:, None] - np.log(shapes[:, 0] / shapes[:, 1]))
    return np.argmin(distance.round(12), axis=1)


class Stream:
    """An endless, shuffled stream over groups of items, in which each batch comes from one group.

    Every group is an endless stream of its own that holds each of its items once an epoch, cut into batches; what is
    left of a group at the end of an epoch begins its first batch of a later one. So nothing is left out or repeated,
    and a group smaller than a batch has one only every few epochs. The batches of an epoch are shuffled among the
    groups. With one group and ``batch_size`` 1 that is a plain shuffled stream.
    """

    def __init__(self, counts: list[int], batch_size: int, seed: int) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._batch_size = batch_size
        self._seed = seed
        self._orders = [Shuffle(n, int(mix(seed, ITEMS, g)[0])) for g, n in enumerate(counts)]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the group of each position (B,) and the offset into that group's own stream, both int64 (B,)."""
        positions = np.asarray(positions, np.int64)
        if len(self._counts) == 1:
            return np.zeros_like(positions), positions
        numbers, within = np.divmod(positions, self._batch_size)
        found = {int(number): self._batch(int(number)) for number in np.unique(numbers)}
        groups, batches = np.asarray([found[int(number)] for number in numbers], np.int64).reshape(-1, 2).T
        return groups, batches * self._batch_size + within

    def item(self, group: int, offset: int, after: int = 0) -> int:
        """Find the item of a group at an offset into its stream, or ``after`` items later in the same epoch.

        Beyond the epoch's end its beginning follows, so that ``after`` from 0 up to the group's size comes to every
        item once.
        """
        count = int(self._counts[group])
        epoch, within = divmod(offset, count)
        return int(self._orders[group](np.asarray([epoch * count + (within + after) % count]))[0])

    def _batch(self, number: int) -> tuple[int, int]:
        """The group of the batch with this number, and how many batches that group had before."""
        epoch = number * self._batch_size // int(self._counts.sum())
        while self._before(epoch + 1).sum() <= number:
            epoch += 1
        first, end = self._before(epoch), self._before(epoch + 1)
        groups = np.repeat(np.arange(len(first)), end - first)
        order = np.argsort(mix(self._seed, BATCHES, epoch, np.arange(len(groups))), kind="stable")
        mixed = groups[order]
        index = number - int(first.sum())
        group = int(mixed[index])
        return group, int(first[group] + np.count_nonzero(mixed[:index] == group))

    def _before(self, epoch: int) -> np.ndarray:
        """The number of full batches of each group before an epoch, (G,)."""
        return epoch * self._counts // self._batch_size
