"""Run trainings in processes that are forked from one that has imported the large libraries.

That saves the imports: about ten seconds for each process.
"""

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar

import pytest
from soak_support import begin, start_server


@dataclass(frozen=True)
class Done:
    """Output of processes, and the exit code of the one that failed first; 0 if none did."""

    returncode: int
    stderr: str
    stdout: str = ""


def train_in_process(recipe: Path, environment: dict[str, str], log: Path) -> None:
    """Run the trainer's command line as a launcher would. This is the target of a process.

    Args:
        log: file for everything that it prints.
    """
    begin()
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    from diffsynth_dagster.train import main

    code = main(["--recipe", str(recipe)])
    sys.stderr.flush()
    sys.exit(code)


def run_python(arguments: Sequence[str], first: tuple[Any, ...], log: Path) -> None:
    """Run Python with arguments. This is the target of the process that `python` starts."""
    begin()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    prepare, *given = first
    prepare(*given)
    kind, code, *rest = arguments
    if kind == "-m":
        sys.argv[:] = [code, *rest]
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def python(*arguments: str, first: tuple[Any, ...] = (bool,)) -> Done:
    """Run `python -m module …` or `python -c code …` in a forked process.

    Args:
        first: a function and its arguments, which the process calls first.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start_server().Process(target=run_python, args=(arguments, first, log))
        process.start()
        process.join(240)
        assert process.exitcode is not None, f"it hangs: {arguments}"
        said = {name: Path(f"{log}.{name}").read_text(errors="replace") for name in ("out", "err")}
    return Done(process.exitcode, said["err"], said["out"])


def in_processes(count: int, config: dict[str, Any], recipe: Path, seconds: float = 120) -> Done:
    """Train with `count` processes on the CPU, which find each other as those of torchrun do.

    If one fails, the others are killed, because they would wait for it.
    """
    recipe.write_text(json.dumps(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # port 0: the system chooses a free one
        port = free.getsockname()[1]
    server = start_server()
    logs = [recipe.with_name(f"{recipe.name}.{rank}.log") for rank in range(count)]
    shared = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    jobs: list[Any] = []
    for rank, log in enumerate(logs):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        jobs.append(server.Process(target=train_in_process, args=(recipe, own, log)))
    for job in jobs:
        job.start()
    code, until = 0, time.monotonic() + seconds
    while code == 0 and (left := [job for job in jobs if job.exitcode is None]):
        assert wait([job.sentinel for job in left], until - time.monotonic()), "it hangs"
        codes = [job.exitcode for job in jobs]
        code = next((each for each in codes if each), 0)
    for job in jobs:
        job.join(5 if code else None)  # time to print a message of its own
        job.kill()
        job.join()
    return Done(code, "".join(log.read_text(encoding="utf-8") for log in logs))


def two_processes(config: dict[str, Any], recipe: Path) -> Done:
    """Train with two processes on the CPU."""
    return in_processes(2, config, recipe)


def launched(arguments: Sequence[str], variables: Mapping[str, str], said: Path) -> None:
    """Run the trainer's command line with the launcher's environment. This is the target of a
    process of `ForkedProcesses`.

    Args:
        said: file for its standard error.
    """
    begin()
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from diffsynth_dagster.train import main

    code = main(arguments)
    sys.stderr.flush()
    sys.exit(code)


class ForkedProcesses:
    """A replacement for the launcher's `Processes`: one training process, which is forked.

    It is for tests of what a run makes, and saves the ten seconds of `accelerate launch` and the
    imports. Tests of how processes are started and stopped use the real class.

    Attributes:
        newest: the process that was started last; None if there was none.
    """

    newest: ClassVar[Any] = None

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        scratch: Path,
        grace: float,
        held: Sequence[int],
    ) -> None:
        self._grace = grace
        self._said = scratch / "stderr"
        # The launcher's own arguments come before the module.
        arguments = command[command.index("diffsynth_dagster.train") + 1 :]
        variables = {**env, "ACCELERATE_MIXED_PRECISION": "no"}
        self._process = start_server().Process(
            target=launched, args=(list(arguments), variables, self._said)
        )
        self._process.start()
        ForkedProcesses.newest = self._process

    def code(self) -> int | None:
        """The exit code; None while the process runs."""
        code = self._process.exitcode
        # Killed by signal n: -n in `multiprocessing`, 128 + n in a shell and in `Processes`.
        return code if code is None or code >= 0 else 128 - code

    def last_words(self) -> str:
        """What the process printed on standard error."""
        return self._said.read_text(errors="replace")

    def stop(self) -> None:
        """Interrupt the process, and kill it if it does not end."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, signal.SIGINT)
            self._process.join(self._grace)
            self._process.kill()
        self._process.join()


@contextmanager
def forked_launches() -> Iterator[None]:
    """While the block runs, the launcher forks its trainings: see `ForkedProcesses`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resources.launcher.Processes", ForkedProcesses)
        yield
