"""Limit how many pixels all threads of a process decode at the same time.

The memory that decoding takes depends on the pixels, not on the number of files: eight small
pictures take little, eight of the largest ones take more memory than many machines have.
"""

from collections.abc import Generator
from contextlib import contextmanager
from threading import Condition, Lock, local

from diffsynth_dagster.config.dataset import DatasetParameters
from diffsynth_dagster.errors import OutOfMemory


class PixelBudget:
    """A limit of the pixels that are in memory at the same time. It is thread-safe.

    A pixel stands for about 12 bytes: three channels of float32.

    Attributes:
        megapixels: the limit in millions of pixels; may be set at any time.
    """

    def __init__(self, megapixels: int) -> None:
        self.megapixels = megapixels
        self._used = 0
        self._turn = Lock()  # held by the thread that is next: the others queue up behind it
        self._changed = Condition()
        self._thread = local()

    @contextmanager
    def hold(self, pixels: int) -> Generator[None]:
        """Wait until `pixels` fit into the budget, and count them as used while the block runs.

        A file with more pixels than the whole budget is admitted when nothing else is. Threads are
        admitted one after the other, so that a stream of small files cannot starve a large one.
        Blocks must not be nested.
        """
        assert not getattr(self._thread, "holds", False), (
            "a thread that already holds pixels would wait for itself"
        )
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._fits(pixels))
            self._used += pixels
        self._thread.holds = True
        try:
            yield
        finally:
            self._thread.holds = False
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()

    def _fits(self, pixels: int) -> bool:
        return not self._used or self._used + pixels <= self.megapixels * 1_000_000


DECODING = PixelBudget(DatasetParameters.model_fields["decode_megapixels"].default)
"""The budget of this process. The parameter `decode_megapixels` sets its size."""


def short_of_memory(kind: str, where: str) -> OutOfMemory:
    """The error to raise if there was not enough memory to read a file. The file may be sound.

    Args:
        kind: what the file is, for the message.
        where: the file, and the row or parameter that names it.
    """
    return OutOfMemory(
        f"the memory is not enough to read the {kind}",
        where=where,
        do=f"give a smaller decode_megapixels (it is {DECODING.megapixels}) or fewer "
        "dataset_num_workers, make the file smaller, end other programs, or use a machine with more",
    )
