"""A loader that is interrupted, as a kill would."""

from collections.abc import Iterator
from typing import Any

from fitcompress.data import Batches


def dying(whole: Batches, last: int) -> Batches:
    """Return a loader like ``whole`` that stops instead of yielding its batch ``last``.

    Batches are counted over all passes.
    """

    class DyingBatches(Batches):
        calls = 0

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                self.calls += 1
                if self.calls == last:
                    raise KeyboardInterrupt
                yield batch

    return DyingBatches(
        whole.inputs,
        whole.targets,
        batch_size=whole.batch_size,
        shuffle=whole.shuffle,
        seed=whole.seed,
    )
