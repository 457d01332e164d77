"""The launcher: runs `accelerate launch -m diffsynth_dagster.train` for an asset."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
from pydantic import Field

import diffsynth_dagster
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions, dump_config
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.files import hidden_beside, require_writable, write_text
from diffsynth_dagster.training.failure import (
    EXIT_STOPPED,
    FAILURE_FOLDER,
    Failure,
    read_failures,
)
from resources.messages import Message, MessageReader

SUPERVISOR = Path(__file__).with_name("supervisor.py")
POLL_SECONDS = 0.2
_STOP_MARGIN = 10.0
_SHOWN_LINES = 30


class Launcher(dg.ConfigurableResource):
    """Runs training processes and takes them down with whoever asked for them."""

    num_processes: int | None = Field(
        default=None, description="Training processes; left out: the recipe's, or one for each GPU."
    )
    accelerate_config: str | None = Field(
        default=None,
        description="Configuration file of accelerate; left out: the recipe's, if any.",
    )
    grace_seconds: float = Field(
        default=10.0,
        gt=0,
        le=20,
        description="Seconds that a training has to stop by itself when the run is cancelled.",
    )

    def run(
        self,
        context: dg.AssetExecutionContext,
        config: TrainingConfig,
        options: RecipeOptions,
    ) -> Iterator[Message]:
        """Run the config's task to its end, yielding what it says while it works.

        However the iteration ends (done, failed, cancelled, dropped), no process of it is left.

        Raises:
            dagster.Failure: the processes failed or were stopped.
            OutputError: the run folder cannot be written.
            ParameterError: the configuration of accelerate does not exist.
        """
        output = Path(config.output_path).absolute()
        require_writable(output, "output_path")
        # A name of its own: another run may be about to read its file in this folder.
        recipe = hidden_beside(output / "launch.yaml")
        command = [*self._launch(config, options), "-m", "diffsynth_dagster.train"]
        command += ["--recipe", str(recipe), "--checkpoints_only"]
        context.log.debug(f"running {' '.join(command)}")
        with ExitStack() as leaving:
            scratch = leaving.enter_context(tempfile.TemporaryDirectory(prefix="diffsynth-launch-"))
            leaving.callback(recipe.unlink, missing_ok=True)
            write_text(recipe, dump_config(config))
            tail, failures = Path(scratch) / "stderr", Path(scratch) / "failures"
            reader = MessageReader()
            with dg.open_pipes_session(
                context, dg.PipesTempFileContextInjector(), reader
            ) as session:
                pipes = session.get_bootstrap_env_vars()
                variables = {**pipes, FAILURE_FOLDER: str(failures)}
                processes = Processes(command, _environment(variables), tail, self.grace_seconds)
                try:
                    while processes.code() is None:
                        yield from _told(context, reader)
                        _require_parent()
                        time.sleep(POLL_SECONDS)
                finally:
                    processes.stop()
            yield from _told(context, reader)
            _require_success(processes.code(), read_failures(failures), tail, config.task)

    def _launch(self, config: TrainingConfig, options: RecipeOptions) -> list[str]:
        """`accelerate launch` with every option that it would warn about when left out.

        Raises:
            ParameterError: its configuration does not exist.
        """
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        file = self.accelerate_config or options.accelerate_config
        count = self.num_processes or options.num_processes
        if file is not None:
            if not Path(file).is_file():
                raise ParameterError(
                    "the configuration of accelerate does not exist",
                    where=f"accelerate_config = {Path(file).absolute()}",
                    do="correct the path",
                )
            command += ["--config_file", file]
            return command + (["--num_processes", str(count)] if count else [])

        import torch

        gpus = torch.cuda.device_count()
        count = count or max(1, gpus)
        # accelerate gives each process one thread unless asked otherwise, which is right beside a
        # GPU and wastes the machine without one.
        threads = 1 if gpus else max(1, torch.get_num_threads() // count)
        return [
            *command,
            *("--num_processes", str(count)),
            *("--num_machines", "1"),
            *("--mixed_precision", config.mixed_precision or "no"),
            *("--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", str(threads)),
            *(["--multi_gpu"] if count > 1 and gpus > 1 else []),
        ]


class Processes:
    """A command under the supervisor, alive only as long as this process is.

    Args:
        tail: file that gets the last of the command's standard error.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], tail: Path, grace: float
    ) -> None:
        self._grace = grace
        watch, self._hold = os.pipe()
        supervise = [sys.executable, str(SUPERVISOR), "--watch", str(watch)]
        supervise += ["--tail", str(tail), "--grace", str(grace), "--", *command]
        try:
            # A session of its own: a Ctrl-C in the terminal reaches only Dagster, which then
            # stops the processes in order.
            self._process = subprocess.Popen(
                supervise, env=dict(env), pass_fds=[watch], start_new_session=True
            )
        except BaseException:
            os.close(self._hold)
            raise
        finally:
            os.close(watch)

    def code(self) -> int | None:
        """The exit code; None while the processes run."""
        return self._process.poll()

    def stop(self) -> None:
        """Let go: the supervisor stops what still runs, and this waits for it."""
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        try:
            self._process.wait(timeout=2 * self._grace + _STOP_MARGIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _told(context: dg.AssetExecutionContext, reader: MessageReader) -> Iterator[Message]:
    """What the processes said since the last time; their warnings go into the run's log."""
    for message in reader.new():
        if message["event"] == "warning":
            context.log.warning(message["text"])
        else:
            yield message


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    root = str(Path(diffsynth_dagster.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        # Progress bars go into log files here.
        "TQDM_MININTERVAL": "10",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        **variables,
    }


def _require_parent() -> None:
    """Under the multiprocess executor this is a child of the run's process, and would go on as an
    orphan that no one can cancel when that one is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise dg.Failure("the process of the run is gone", allow_retries=False)


def _require_success(code: int | None, failures: Sequence[Failure], tail: Path, task: str) -> None:
    """Raise a `dagster.Failure` with the cause that the processes reported, unless they succeeded.

    Args:
        failures: those of all processes, the cause of the others first.
        tail: the end of their standard error, shown as it is when none could report anything
            (a process that was killed, or that crashed in compiled code).
    """
    if code == 0:
        return
    first = failures[0] if failures else None
    if first is not None and first.kind == "mistake":
        raise dg.Failure(str(first), allow_retries=first.may_retry)
    # With a process that reported nothing, the others may have been stopped because it was killed.
    stopped = first is not None and first.kind == "stopped" and len(failures) == first.processes
    if code == EXIT_STOPPED or stopped:
        raise dg.Failure(f"{task} was stopped by a signal", allow_retries=False)
    if first is not None and first.traceback is not None:
        who, words = f"process {first.process} of {task}", first.traceback
    else:
        who = task
        words = tail.read_text(errors="replace") if tail.is_file() else ""
    raise dg.Failure(
        f"{who} failed with exit code {code}; its last words:\n{_last_lines(words)}",
    )


def _last_lines(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(lines[-_SHOWN_LINES:])
