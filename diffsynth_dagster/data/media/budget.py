"""How many pixels are decoded at a time, by all threads of a process together.

What decoding costs goes with the pixels of a file, not with the files: eight small pictures are
nothing, eight of the largest ones take more memory than many machines have.
"""

from collections.abc import Generator
from contextlib import contextmanager
from threading import Condition, Lock, local

from diffsynth_dagster.config.dataset import DatasetParameters
from diffsynth_dagster.errors import OutOfMemory


class PixelBudget:
    """Pixels that may be in memory at a time. Safe for any number of threads.

    Attributes:
        megapixels: how many, in millions; may be set at any time.
    """

    def __init__(self, megapixels: int) -> None:
        self.megapixels = megapixels
        self._used = 0
        self._turn = Lock()
        self._changed = Condition()
        self._here = local()

    @contextmanager
    def hold(self, pixels: int) -> Generator[None]:
        """Wait until so many pixels fit into the budget, and count them while the block runs.

        More than the whole budget are let in when no others are. Threads are let in one after the
        other, so that small files do not keep a large one waiting. A thread holds one at a time.
        """
        assert not getattr(self._here, "holds", False), (
            "a thread that holds some would wait for itself"
        )
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._fits(pixels))
            self._used += pixels
        self._here.holds = True
        try:
            yield
        finally:
            self._here.holds = False
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()

    def _fits(self, pixels: int) -> bool:
        return not self._used or self._used + pixels <= self.megapixels * 1_000_000


DECODING = PixelBudget(DatasetParameters.model_fields["decode_megapixels"].default)
"""The budget of this process; `decode_megapixels` says how large it is."""


def short_of_memory(kind: str, where: str) -> OutOfMemory:
    """The error for the user, where memory was not enough to read a file, whose fault that is not.

    Args:
        kind: what the file is, for the message.
        where: the file, and what names it.
    """
    return OutOfMemory(
        f"the memory is not enough to read the {kind}",
        where=where,
        do=f"give a smaller decode_megapixels (it is {DECODING.megapixels}) or fewer "
        "dataset_num_workers, make the file smaller, end other programs, or use a machine with more",
    )
