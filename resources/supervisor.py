"""Runs a command and makes sure that none of its processes outlives the process that asked for it.

    python supervisor.py --watch FD --tail FILE --grace SECONDS [--scratch FOLDER] -- command …

The asking process holds the writing end of a pipe, whose reading end is FD. When it closes the pipe
or dies, every descendant of the supervisor is stopped: with SIGINT, after the grace with SIGTERM,
after another half of the grace with SIGKILL. (Signalling a process group would not do: training
processes run in sessions of their own.)

The end of the command's standard error goes into FILE. The exit code is the command's, or 130 if it
was stopped. If the asking process is dead by then, FOLDER is removed on its behalf.

This file is run by path and imports nothing of the project, so that it starts fast and stays small.
"""

import argparse
import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

EXIT_STOPPED = 130
TICK = 0.2
TAIL_BYTES = 32 * 1024
LEFTOVER_SECONDS = 2.0
"""How long descendants may go on after the command itself has ended."""
_PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h


def become_subreaper() -> None:
    """Become the parent of orphaned descendants (on Linux), so that none escapes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Supervisor:
    """Runs one command.

    Args:
        watch: descriptor to read; its end of file means that the command is to be stopped.
        tail: path of the file for the end of the command's standard error.
        grace: seconds between SIGINT and SIGTERM.
    """

    def __init__(self, watch: int, tail: str, grace: float) -> None:
        self._tail_path = tail
        self._grace = grace
        self._tail = bytearray()
        self._code: int | None = None
        self._stop_since: float | None = None
        self._was_asked = False
        self._phase = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(watch, selectors.EVENT_READ, self._read_watch)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A handler and not SIG_IGN, because the command would inherit ignored signals.
            signal.signal(number, self._handle)

    def run(self, command: Sequence[str]) -> int:
        """Run a command until it ends or is stopped; returns the exit code."""
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert child.stderr is not None
        self._selector.register(child.stderr.fileno(), selectors.EVENT_READ, self._read_stderr)
        self._watch_over(child.pid)
        self._drain(child.stderr.fileno())
        self._write_tail()
        assert self._code is not None
        child.returncode = self._code  # `_reap` has waited for it already: Popen must not
        if self._was_asked and self._code != 0:
            return EXIT_STOPPED
        # A negative code is a signal: exit as a shell does, with 128 + its number.
        return self._code if self._code >= 0 else 128 - self._code

    def _watch_over(self, child: int) -> None:
        """Return when the child and all of its descendants are gone."""
        ended: float | None = None
        while True:
            for key, _ in self._selector.select(TICK):
                key.data(key.fd)
            self._reap(child)
            # Listing all processes is slow. While the command simply runs, nobody needs the list.
            if self._code is None and self._stop_since is None:
                continue
            alive = psutil.Process().children(recursive=True)
            if self._code is not None:
                if not alive:
                    return
                # The command is over, but some descendants live, such as workers of a data loader.
                ended = ended or time.monotonic()
                if self._stop_since is None and time.monotonic() - ended > LEFTOVER_SECONDS:
                    self._stop_since = time.monotonic()
            self._stop(alive, child)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        if not self._was_asked:
            self._was_asked = True
            self._stop_since = self._stop_since or time.monotonic()

    def _read_watch(self, descriptor: int) -> None:
        if not os.read(descriptor, 1024):
            self._selector.unregister(descriptor)
            self._ask_to_stop()

    def _read_stderr(self, descriptor: int) -> None:
        data = os.read(descriptor, 65536)
        if not data:
            self._selector.unregister(descriptor)
            return
        # Keep only the end, and pass everything on: it is the output that Dagster captures.
        self._tail += data
        del self._tail[:-TAIL_BYTES]
        with contextlib.suppress(OSError):  # the reader of our own standard error may be gone
            os.write(2, data)

    def _drain(self, descriptor: int) -> None:
        """Read what is left in the pipe of standard error."""
        while descriptor in self._selector.get_map():
            if not self._selector.select(0):
                return
            self._read_stderr(descriptor)

    def _reap(self, pid: int) -> None:
        """Collect the exit codes of the child and of adopted descendants; leaves no zombies."""
        with contextlib.suppress(ChildProcessError):
            while True:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if ended == 0:
                    return
                if ended == pid:
                    self._code = os.waitstatus_to_exitcode(status)

    def _stop(self, alive: list[psutil.Process], child: int) -> None:
        """Send the signal that is due, if the command is being stopped. Called at every tick."""
        if self._stop_since is None:
            return
        passed = time.monotonic() - self._stop_since
        if self._phase == 0:
            # Not to the direct child, `accelerate launch`: it only waits for the training
            # processes, and on SIGINT it would end them before they have saved their state.
            workers = [process for process in alive if process.pid != child]
            _signal(workers or alive, signal.SIGINT)
            self._phase = 1
        elif self._phase == 1 and passed > self._grace:
            _signal(alive, signal.SIGTERM)
            self._phase = 2
        elif passed > 1.5 * self._grace:
            _signal(alive, signal.SIGKILL)

    def _write_tail(self) -> None:
        with contextlib.suppress(OSError), open(self._tail_path, "wb") as file:
            file.write(self._tail)


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def main(argv: Sequence[str]) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--watch", type=int, required=True)
    parser.add_argument("--tail", required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--scratch")
    parser.add_argument("command", nargs="+")
    options, asker = parser.parse_args(argv), os.getppid()
    become_subreaper()
    code = Supervisor(options.watch, options.tail, options.grace).run(options.command)
    if options.scratch is not None and os.getppid() != asker:
        shutil.rmtree(options.scratch, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
