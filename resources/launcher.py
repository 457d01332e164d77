"""The launcher: runs `accelerate launch -m diffsynth_dagster.train` for an asset."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import dagster as dg
from pydantic import Field

import diffsynth_dagster
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions, dump_config
from diffsynth_dagster.errors import ParameterError, UserError
from diffsynth_dagster.files import hidden_beside, require_writable, write_text
from diffsynth_dagster.run.events import Event, Warned
from diffsynth_dagster.run.failure import (
    EXIT_STOPPED,
    FAILURE_FOLDER,
    read_failures,
    read_silent,
)
from diffsynth_dagster.run.goes_on import newest_step, say_where_it_goes_on
from resources.deadline import Deadline
from resources.failing import StepFailure
from resources.messages import MessageReader

SUPERVISOR = Path(__file__).with_name("supervisor.py")
POLL_SECONDS = 0.2
_STOP_MARGIN = 10.0
_SHOWN_LINES = 30
_SCRATCH = "diffsynth-launch-"
_KILLED = (
    "if nobody killed it, the system did, for want of memory (`dmesg` says so): give it more, or "
    "lower batch_size or dataset_num_workers. Then "
)


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
    ) -> Iterator[Event]:
        """Run the config's task to its end, yielding the events that it reports while it works.

        However the iteration ends (done, failed, cancelled, dropped), no process of it is left.

        Raises:
            StepFailure: the processes failed, were stopped, or took longer than the run may.
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
        deadline = Deadline.of(context)
        with ExitStack() as leaving:
            # Not in the run folder: why a training failed must be told when its disk is full.
            scratch = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH)))
            leaving.callback(recipe.unlink, missing_ok=True)
            write_text(recipe, dump_config(config))
            failures = scratch / "failures"
            injector = dg.PipesFileContextInjector(str(scratch / "context"))
            reader = MessageReader(scratch / "messages")
            with dg.open_pipes_session(context, injector, reader) as session:
                pipes = session.get_bootstrap_env_vars()
                variables = {**pipes, FAILURE_FOLDER: str(failures)}
                late = False
                processes = Processes(command, _environment(variables), scratch, self.grace_seconds)
                try:
                    while processes.code() is None and not (late := deadline.is_over):
                        yield from _told(context, reader)
                        _require_parent()
                        time.sleep(POLL_SECONDS)
                finally:
                    processes.stop()
            yield from _told(context, reader)
            if late:
                do = f"allow more in the recipe's 'tags', or {_go_on(config)}"
                raise StepFailure(_said(deadline.told, None, do))
            _require_success(processes.code(), failures, processes.last_words, config)

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
        scratch: folder for a file with the last of the command's standard error. It is removed at the
            end if this process is killed.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], scratch: Path, grace: float
    ) -> None:
        self._grace = grace
        self._tail = scratch / "stderr"
        watch, self._hold = os.pipe()
        supervise = [sys.executable, str(SUPERVISOR), "--watch", str(watch)]
        supervise += ["--tail", str(self._tail), "--scratch", str(scratch)]
        supervise += ["--grace", str(grace), "--", *command]
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

    def last_words(self) -> str:
        """The end of what the command printed on standard error, when it is over."""
        text = self._tail.read_text(errors="replace") if self._tail.is_file() else ""
        lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
        return "\n".join(lines[-_SHOWN_LINES:])

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


def _told(context: dg.AssetExecutionContext, reader: MessageReader) -> Iterator[Event]:
    """What the processes said since the last time; their warnings go into the run's log."""
    for event in reader.new():
        if isinstance(event, Warned):
            context.log.warning(event.text)
        else:
            yield event


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
        raise StepFailure("the process of the run is gone")


def _require_success(
    code: int | None, folder: Path, last_words: Callable[[], str], config: TrainingConfig
) -> None:
    """Raise a `StepFailure` with what the processes reported, unless they succeeded.

    Args:
        folder: where they report; see `run.failure`.
        last_words: the end of their standard error, where none of them came as far as to report.
    """
    if code == 0:
        return
    task = config.task
    failures, silent = read_failures(folder), read_silent(folder)
    first = failures[0] if failures else None
    if first is not None and first.kind == "mistake":
        raise StepFailure.of(first)
    # With a process that reported nothing, the others may have been stopped because it was killed.
    stopped = first is not None and first.kind == "stopped" and len(failures) == first.processes
    if code == EXIT_STOPPED or stopped:
        raise StepFailure(_said(f"{task} was stopped by a signal", None, _go_on(config)))
    if first is not None and first.kind == "crash":
        if newest_step(Path(config.output_path)) is not None:
            first = replace(first, do=f"when the cause is gone, {_go_on(config)}")
        raise StepFailure.of(first)
    if silent:
        raise _silent_failure(silent, config)
    what = f"{task} could not be launched: exit code {code}"
    raise StepFailure(what, last_words() or None, allow_retries=True)


def _silent_failure(silent: Mapping[int, str], config: TrainingConfig) -> StepFailure:
    """The failure of processes that reported nothing.

    Args:
        silent: see `read_silent`.
    """
    for process, trace in silent.items():
        if trace:
            what = f"process {process} of {config.task} crashed in compiled code: {trace.splitlines()[0]}"
            return StepFailure(what, trace, allow_retries=True)
    who = ", ".join(str(process) for process in silent)
    return StepFailure(
        _said(
            f"{config.task} was killed by a signal from outside",
            f"process {who}, in {Path(config.output_path).absolute()}",
            _KILLED + _go_on(config),
        ),
        allow_retries=True,
    )


def _go_on(config: TrainingConfig) -> str:
    return f"run it again: {say_where_it_goes_on(config)}"


def _said(what: str, where: str | None, do: str) -> str:
    return str(UserError(what, where=where, do=do))
