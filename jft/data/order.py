"""Which examples come when: pure functions of the seed and the step, so that any position can be taken up again."""

import functools
import math
import sys
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32, Int64


def permutation(n: int, *key: int) -> Int64[np.ndarray, "n"]:
    """A random order of 0..n-1, fixed by the key of non-negative integers.

    By sorting raw random bits: these numpy promises to keep, while `Generator.permutation` may change with its version.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


class Order:
    """Position → example: each epoch a new permutation of all n examples, one after another without end.

    With `labels` [n], class indices, every class comes equally often, to within one in an epoch of n positions,
    whatever the number of its examples: within a class they follow each other as the whole does without labels, so that
    those of a small class come again sooner.

    A random-access source for Grain, which batches it. The permutations are drawn here and not by Grain's `shuffle`:
    that costs 11 µs an example and has seed s + 1 repeat in epoch e what seed s did in epoch e + 1.

    >>> Order(3, seed=0).take(0, 6)
    array([0, 1, 2, 2, 0, 1], dtype=int32)
    """

    def __init__(self, n: int, seed: int, labels: Int32[np.ndarray, "n"] | None = None):
        if n < 1:
            raise ValueError("there are no examples to put in order")
        self.n, self.seed = n, seed
        self.members = [] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
        self._latest: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        epoch, i = divmod(int(position), self.n)
        return int(self.epoch(epoch)[i])

    def __repr__(self) -> str:  # Grain prints its sources
        return f"Order(n={self.n}, seed={self.seed}, classes={len(self.members)})"

    def epoch(self, number: int) -> Int32[np.ndarray, "n"]:
        """The examples of an epoch."""
        return self._balanced(number)[0] if self.members else _epoch(self.n, self.seed, number)

    def _balanced(self, number: int) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
        """The examples of an epoch, and how often each has come before."""
        latest = self._latest  # read once: threads share the order
        if latest is not None and latest[0] == number:
            return latest[1:]
        k, (whole, rest) = len(self.members), divmod(self.n, len(self.members))
        drawn, passes = [], []
        for c, members in enumerate(self.members):
            # The places that do not divide evenly go to the classes in turn, through all epochs.
            begin, end = (whole * e + (rest * e - c + k - 1) // k for e in (number, number + 1))
            drawn.append(members[Order(len(members), _mixed(self.seed, c)).take(begin, end)])
            passes.append(np.arange(begin, end) // len(members))
        shuffled = permutation(self.n, self.seed, number)
        examples, before = (np.concatenate(v).astype(np.int32)[shuffled] for v in (drawn, passes))
        self._latest = (number, examples, before)
        return examples, before

    def take(self, start: int, stop: int) -> Int32[np.ndarray, "k"]:
        """The examples at positions start..stop-1."""
        return self._span(start, stop, self.epoch)

    def passes(self, start: int, stop: int) -> Int32[np.ndarray, "k"]:
        """How often each of the examples at positions start..stop-1 has come before."""
        if not self.members:
            return (np.arange(start, stop) // self.n).astype(np.int32)
        return self._span(start, stop, lambda epoch: self._balanced(epoch)[1])

    def _span(self, start: int, stop: int, epoch: Callable[[int], np.ndarray]) -> Int32[np.ndarray, "k"]:
        first, last = start // self.n, -(-stop // self.n)
        epochs = [epoch(number) for number in range(first, last)]
        if not epochs:
            return np.empty(0, np.int32)
        return np.concatenate(epochs)[start - first * self.n : stop - first * self.n]


def tickets(index: Int32[np.ndarray, "s b"], n: int) -> Int32[np.ndarray, "s b"]:
    """What an example's randomness hangs on beside the step, by batches: its index, plus n for each time before.

    An example that stands several times in a batch, of few images or balanced ones, is then another picture each time;
    modulo n a ticket is the index.

    >>> tickets(np.array([[2, 0, 2, 2]], np.int32), 3)
    array([[2, 0, 5, 8]], dtype=int32)
    """
    by_index = np.argsort(index, axis=1, kind="stable")
    ordered, places = np.take_along_axis(index, by_index, 1), np.arange(index.shape[1])[None]
    first = np.where(np.diff(ordered, axis=1, prepend=-1) != 0, places, 0)
    times = np.empty_like(index)
    np.put_along_axis(times, by_index, (places - np.maximum.accumulate(first, axis=1)).astype(np.int32), 1)
    return index + n * (times % np.int32(max(1, (2**31 - 1) // n)))  # within int32, whatever n is


class Tickets:
    """The `tickets` of an order's batches by position, of each batch these rows alone: what one process reads."""

    def __init__(self, order: Order, rows: Int64[np.ndarray, "k"], batch: int):
        self.order, self.rows, self.batch = order, rows, batch
        self.step = functools.lru_cache(maxsize=4)(self._step)  # threads are not all at the same one

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        step, i = divmod(int(position), len(self.rows))
        return int(self.step(step)[i])

    def _step(self, step: int) -> Int32[np.ndarray, "k"]:
        whole = self.order.take(step * self.batch, (step + 1) * self.batch)
        return tickets(whole[None], self.order.n)[0, self.rows]

    def __repr__(self) -> str:
        return f"Tickets({len(self.rows)} of {self.batch} of {self.order})"


@functools.lru_cache(maxsize=4)
def _epoch(n: int, seed: int, epoch: int) -> Int32[np.ndarray, "n"]:
    order = permutation(n, seed, epoch).astype(np.int32)
    order.flags.writeable = False
    return order


def _mixed(seed: int, c: int) -> int:
    """A seed for one class's own order, so that classes of one size are not in step."""
    return int(np.random.SeedSequence((seed, c)).generate_state(1, np.uint64)[0])


def batch_indices(n: int, batch: int, seed: int, step: int) -> Int32[np.ndarray, "b"]:
    """The examples of one step. Batches run on across the ends of epochs, so all have the same size."""
    return Order(n, seed).take(step * batch, (step + 1) * batch)


def steps_indices(n: int, batch: int, seed: int, start: int, stop: int) -> Int32[np.ndarray, "s b"]:
    """The examples of the steps start..stop-1: row i is `batch_indices(n, batch, seed, start + i)`."""
    return Order(n, seed).take(start * batch, stop * batch).reshape(stop - start, batch)


def evaluation_batches(n: int, batch: int) -> tuple[Int32[np.ndarray, "s b"], Bool[np.ndarray, "s b"]]:
    """Indices and mask of batches that have each of n examples exactly once; padding (mask False) repeats example 0.

    >>> evaluation_batches(3, 2)
    (array([[0, 1],
           [2, 0]], dtype=int32), array([[ True,  True],
           [ True, False]]))
    """
    steps = math.ceil(n / batch)
    positions = np.arange(steps * batch, dtype=np.int32).reshape(steps, batch)
    mask = positions < n
    return np.where(mask, positions, np.int32(0)), mask
