"""Lock the machine's devices (GPUs, or the CPU), so that each is used by one training at a time.

Dagster's queue limits the runs of one instance and does not know devices. Therefore each device has
a lock file in a folder that all launchers on the machine share, of all instances and without a
queue (`dagster job execute`). The lock is released when the last process that has the file open
ends. A training's supervisor inherits the open file: after `kill -9` of the run, the device becomes
free only when the training has really ended.
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
"""The device of a machine without a GPU."""
WAIT_SECONDS = 1.0
"""Time between two attempts to lock devices."""
SAY_EVERY_S = 600.0
"""Time between two log messages while waiting."""
_FRESH_EVERY_S = 3600.0
"""Time between two calls of `utime`: systems remove temporary files that are unused for days."""


@dataclass(frozen=True)
class Holder:
    """The run that uses a device, as written into the device's lock file.

    Attributes:
        asset: such as `demo/checkpoints`.
        run_id: id of Dagster's run.
        pid: id of the run's process.
        since: local time, ISO 8601.
    """

    asset: str
    run_id: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"{self.asset}, run {self.run_id}, process {self.pid}, since {self.since}"


class Place:
    """The devices that a training has locked. Use it in a `with` block, which releases them.

    Attributes:
        devices: ids of the GPUs; empty on a machine without one.
        descriptors: the open lock files. A process that inherits them holds the devices too.
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
        """Touch the lock files once an hour, so that the system does not remove them as unused."""
        if time.monotonic() - self._fresh > _FRESH_EVERY_S:
            self._fresh = time.monotonic()
            for descriptor in self.descriptors:
                os.utime(descriptor)


def holder(asset: str, run_id: str) -> Holder:
    """The holder for this process, from now on."""
    return Holder(asset, run_id, os.getpid(), datetime.now().isoformat(" ", "seconds"))


def take(
    devices: Sequence[str],
    count: int,
    who: Holder,
    say: Callable[[str], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> Place:
    """Lock `count` of the devices, all of them at the same moment. Waits until enough are free.

    Args:
        devices: ids of the GPUs to choose from; empty on a machine without one, to lock the CPU.
        count: how many to lock.
        who: written into the lock files, for the messages of others.
        say: logs a line about who uses the devices, at first and then every `SAY_EVERY_S`.
        meanwhile: called after each attempt; it can end the wait by raising.

    Raises:
        OutputError: the folder of the lock files cannot be written.
    """
    folder, last_said = places_folder(), None
    names = tuple(devices) or (CPU,)
    what = f"{count} of the GPUs {', '.join(devices)}" if devices else "the CPU"
    while True:
        place, busy = _try(folder, names, max(1, count), who)
        if place is not None:
            return place
        if last_said is None or time.monotonic() - last_said > SAY_EVERY_S:
            last_said = time.monotonic()
            say(f"waiting for {what}: {'; '.join(busy)}")
        meanwhile()
        time.sleep(WAIT_SECONDS)


def places_folder() -> Path:
    """The folder of the lock files of this machine's devices.

    Raises:
        OutputError: it cannot be written.
    """
    # Of the user by default: others may not write our files. Users who share GPUs set the variable.
    given = os.environ.get(VARIABLE)
    folder = Path(given or Path(tempfile.gettempdir(), f"diffsynth-places-{os.getuid()}"))
    require_writable(folder, VARIABLE)
    return folder


def _try(
    folder: Path, names: Sequence[str], count: int, who: Holder
) -> tuple[Place | None, list[str]]:
    """One attempt to lock `count` devices: the locked devices, or a line about each busy one."""
    busy: list[str] = []
    with _choosing(folder), ExitStack() as stack:
        free: dict[str, int] = {}
        for name in names:
            descriptor = _open(folder / quote(name, safe=""))  # an id may have a slash (MIG)
            if lock_descriptor(descriptor, blocking=False):
                stack.callback(os.close, descriptor)
                free[name] = descriptor
            else:
                busy.append(f"{name} is used by {_read(descriptor) or 'another process'}")
                os.close(descriptor)
            if len(free) == count:
                for locked in free.values():
                    os.ftruncate(locked, 0)
                    os.pwrite(locked, json.dumps(asdict(who)).encode(), 0)
                ids = tuple(device for device in free if device != CPU)
                # `pop_all`: the locks outlive this block.
                return Place(ids, tuple(free.values()), stack.pop_all()), []
    return None, busy  # the stack has closed, and so released, the free ones


@contextmanager
def _choosing(folder: Path) -> Generator[None]:
    """Let one process at a time choose devices. Otherwise two that each need both of two GPUs could
    get one each, and neither could start."""
    descriptor = _open(folder / "choosing")
    try:
        lock_descriptor(descriptor)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file, created if needed, so that other users can open it too."""
    # First without O_CREAT: with it, Linux may refuse a file of another user in a shared folder.
    # O_CLOEXEC: only a process that is given the descriptor inherits it.
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with suppress(PermissionError):  # the file belongs to another user of the folder
        os.fchmod(descriptor, 0o666)
    return descriptor


def _read(descriptor: int) -> Holder | None:
    """The holder that a lock file names; None if it cannot be read."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 65536, 0)))
    except (ValueError, TypeError):  # just being written, or by another version
        return None
