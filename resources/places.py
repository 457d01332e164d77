"""Which training has which device: each device has one training at a time, on the whole machine.

Dagster's queue holds back runs of one instance, and knows no devices. So each device has a lock file
in a folder of the machine, which every launcher goes by, whatever instance its run is of, also
`dagster job execute`, which no queue holds back. The lock ends with the last process that has the file
open: the supervisor of a training is one of them, so that after `kill -9` of a run the device is free
when its training has really ended.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from filelock import lock_descriptor

from diffsynth_dagster.files import require_writable

VARIABLE = "DIFFSYNTH_DAGSTER_PLACES"
CPU = "cpu"
"""The one place of a machine without a GPU."""
WAIT_SECONDS = 1.0
SAY_EVERY_S = 600.0
_FRESH_EVERY_S = 3600.0
"""Systems remove files under the temporary directory that nobody touched for days."""


@dataclass(frozen=True)
class Holder:
    """Who has a device: its lock file says so.

    Attributes:
        asset: such as `demo/checkpoints`.
        run_id: Dagster's run.
        pid: the run's process.
        since: local time.
    """

    asset: str
    run_id: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"{self.asset}, run {self.run_id}, process {self.pid}, since {self.since}"


class Place:
    """The devices that a training has, until it is closed.

    Attributes:
        devices: their ids; empty where the machine has no GPU.
        descriptors: of the lock files: a process that inherits them holds the devices too.
    """

    def __init__(self, devices: tuple[str, ...], descriptors: tuple[int, ...], stack: ExitStack):
        self.devices = devices
        self.descriptors = descriptors
        self._stack = stack
        self._fresh = time.monotonic()

    def __enter__(self) -> "Place":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def freshen(self) -> None:
        """Touch the lock files now and then, so that they do not look forgotten."""
        if time.monotonic() - self._fresh > _FRESH_EVERY_S:
            self._fresh = time.monotonic()
            for descriptor in self.descriptors:
                os.utime(descriptor)


def holder(asset: str, run_id: str) -> Holder:
    """This process as one who takes devices."""
    return Holder(asset, run_id, os.getpid(), datetime.now().isoformat(" ", "seconds"))


def take(
    devices: Sequence[str],
    count: int,
    who: Holder,
    say: Callable[[str], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> Place:
    """Take some of the devices, all at once or none; waits until so many are free.

    Args:
        devices: ids; none where the machine has no GPU, which is one place.
        say: gets a line on whom it waits for, at first and then now and again.
        meanwhile: called at each look; what it raises ends the waiting.

    Raises:
        OutputError: the folder of the lock files cannot be written.
    """
    folder, said = places_folder(), None
    names = tuple(devices) or (CPU,)
    what = f"{count} of the GPUs {', '.join(devices)}" if devices else "the CPU"
    while True:
        place, busy = _try(folder, names, max(1, count), who)
        if place is not None:
            return place
        if said is None or time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"waiting for {what}: {'; '.join(busy)}")
        meanwhile()
        time.sleep(WAIT_SECONDS)


def places_folder() -> Path:
    """Where the lock files of this machine's devices are.

    Raises:
        OutputError: it cannot be written.
    """
    given = os.environ.get(VARIABLE)
    folder = Path(given or Path(tempfile.gettempdir(), f"diffsynth-places-{os.getuid()}"))
    require_writable(folder, VARIABLE)
    return folder


def _try(
    folder: Path, names: Sequence[str], count: int, who: Holder
) -> tuple[Place | None, list[str]]:
    """The place, or who has the devices that are missing."""
    busy: list[str] = []
    with _choosing(folder), ExitStack() as stack:
        free: dict[str, int] = {}
        for name in names:
            descriptor = _open(folder / quote(name, safe=""))
            if lock_descriptor(descriptor, blocking=False):
                stack.callback(os.close, descriptor)
                free[name] = descriptor
            else:
                busy.append(f"{name} is used by {_read(descriptor) or 'another process'}")
                os.close(descriptor)
            if len(free) == count:
                for each in free.values():
                    os.ftruncate(each, 0)
                    os.pwrite(each, json.dumps(asdict(who)).encode(), 0)
                ids = tuple(each for each in free if each != CPU)
                return Place(ids, tuple(free.values()), stack.pop_all()), []
    return None, busy


@contextmanager
def _choosing(folder: Path) -> Generator[None]:
    """One chooses at a time: two that need several devices each would take half of them."""
    descriptor = _open(folder / "choosing")
    try:
        lock_descriptor(descriptor)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:  # Linux may refuse to "create" what another user has made in a shared folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with suppress(PermissionError):  # another user's, who shares the folder
        os.fchmod(descriptor, 0o666)
    return descriptor


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 65536, 0)))
    except (ValueError, TypeError):  # of another version
        return None
