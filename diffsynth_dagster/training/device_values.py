"""Times and numbers of a GPU, read when they are there.

A GPU works behind the process that drives it. A process that reads a loss as soon as it has asked for it
waits for all that the GPU still has to do, and then the GPU waits for the process. So a number is asked for
at once and read later.
"""

import time

import torch


class Moment:
    """When a device gets to where the process that drives it is now: on a CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Wait until the device is there."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds from an earlier moment of the same device. The device must be there: see `wait`."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000


class Numbers:
    """Numbers (n,) on their way from a device to this process, with the moment that they are there."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.there = Moment(values.device)

    def read(self) -> list[float]:
        """The numbers. Waits for them."""
        self.there.wait()
        return self._values.tolist()
