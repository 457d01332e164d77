"""Reads times and numbers of a GPU without making it wait.

A GPU runs behind the process that queues its work. A process that reads a loss at once waits until
the queue is empty; then the GPU waits until the process has queued more. So a number is copied
asynchronously, and read later.
"""

import time

import torch


class Moment:
    """The time at which a device reaches the present end of its queue; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has reached it."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds from an earlier moment of the same device, which must have reached both: see
        `wait`."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000  # milliseconds


class Numbers:
    """Numbers (n,) that are being copied from a device to this process.

    Attributes:
        there: the moment at which they have arrived.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # torch pins the target memory itself
        self.there = Moment(values.device)

    def read(self) -> list[float]:
        """The numbers, after waiting for them."""
        self.there.wait()
        return self._values.tolist()
