"""The launcher: runs `accelerate launch -m diffsynth_dagster.train` for an asset.

Three processes take part: this one (the step of a Dagster run) starts the supervisor, and the
supervisor starts `accelerate launch`, which starts the training processes.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from pydantic import Field

import diffsynth_dagster
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions, dump_config
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.files import hidden_beside, require_writable, write_text
from diffsynth_dagster.run.events import Event
from diffsynth_dagster.run.failure import FAILURE_FOLDER
from resources.deadline import Deadline
from resources.ending import require_success, took_too_long
from resources.failing import StepFailure
from resources.messages import FileMessages, MessageReader, told
from resources.places import Place, holder, take
from resources.pools import devices_of, how_many, pool_of, warn_of_waiting
from resources.run_locks import locks_folder, process_of

SUPERVISOR = Path(__file__).with_name("supervisor.py")
POLL_SECONDS = 0.2
_STOP_MARGIN = 10.0
"""Seconds that the supervisor may take longer than its graces before it is killed itself."""
_SHOWN_LINES = 30
"""Lines of standard error that a failure shows if the processes could not report it."""
_SCRATCH = "diffsynth-launch-"


class Launcher(dg.ConfigurableResource):
    """Runs training processes, and stops them when the step ends for whatever reason."""

    num_processes: int | None = Field(
        default=None,
        description="Training processes; left out: the recipe's, or one for each GPU that it takes.",
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
        """Run the config's task to its end. Waits for free devices first, then yields the events
        that the training reports.

        However the iteration ends (done, failed, cancelled, dropped), no process is left behind.

        Raises:
            StepFailure: the processes failed, were stopped, or exceeded the time limit of the run.
            OutputError: the run folder cannot be written.
            ParameterError: the configuration of accelerate does not exist, or there are fewer
                devices than the recipe asks for.
        """
        output = Path(config.output_path).absolute()
        require_writable(output, "output_path")
        pool = pool_of(options)
        devices = devices_of(pool)
        count = how_many(options, pool, devices)
        self._require_one_each(options, count)
        warn_of_waiting(context, pool)
        who = holder(context.asset_key.to_user_string(), context.run.run_id)
        alive, deadline = _watch_parent(context), Deadline.of(context)

        # Called again and again while waiting for devices; ends the wait by raising.
        def meanwhile() -> None:
            alive()
            if deadline.is_over:
                raise took_too_long(f"{deadline.told}: it waited for a GPU until then", config)

        with take(devices, count, who, context.log.info, meanwhile) as place:
            if place.devices:
                context.log.info(f"on GPU {', '.join(place.devices)}")
            yield from self._run(context, config, options, place, alive)

    def _require_one_each(self, options: RecipeOptions, devices: int) -> None:
        """Refuse more processes than devices (without a GPU: more than one), unless there is a
        configuration of accelerate, which decides then.

        Raises:
            ParameterError: too many processes; or see `_configuration`.
        """
        count = self.num_processes or options.num_processes
        if self._configuration(options) is None and count is not None and count > max(1, devices):
            there = f"GPU{'s' * (devices > 1)}" if devices else "CPU"
            raise ParameterError(
                f"{count} processes do not fit on {max(1, devices)} {there}",
                where=f"num_processes = {count}",
                do="lower it, or leave it out: then each GPU that is taken has one process",
            )

    def given(self) -> dict[str, Any]:
        """The options that the run sets, which replace the recipe's: name → value."""
        values = {name: getattr(self, name) for name in ("num_processes", "accelerate_config")}
        return {name: value for name, value in values.items() if value is not None}

    def _run(
        self,
        context: dg.AssetExecutionContext,
        config: TrainingConfig,
        options: RecipeOptions,
        place: Place,
        require_alive: Callable[[], None],
    ) -> Iterator[Event]:
        # A unique name: another run may be about to read its own file in this folder.
        recipe = hidden_beside(Path(config.output_path).absolute() / "launch.yaml")
        command = [*self._launch(config, options, place.devices), "-m", "diffsynth_dagster.train"]
        command += ["--recipe", str(recipe), "--checkpoints_only"]
        context.log.debug(f"running {' '.join(command)}")
        deadline = Deadline.of(context)
        with ExitStack() as leaving:
            # Not in the run folder: failures must get through even if its disk is full.
            scratch = Path(leaving.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH)))
            leaving.callback(recipe.unlink, missing_ok=True)
            write_text(recipe, dump_config(config))
            failures = scratch / "failures"
            injector = dg.PipesFileContextInjector(str(scratch / "context"))
            reader = MessageReader(FileMessages(scratch / "messages"))
            with dg.open_pipes_session(context, injector, reader) as session:
                pipes = session.get_bootstrap_env_vars()
                env = _environment({**pipes, FAILURE_FOLDER: str(failures)}, place.devices)
                # The supervisor inherits the locks of the devices: they stay locked until the last
                # training process is gone, even if this process is killed.
                held, late = place.descriptors, False
                processes = Processes(command, env, scratch, self.grace_seconds, held)
                try:
                    while processes.code() is None and not (late := deadline.is_over):
                        yield from told(context, reader)
                        require_alive()
                        place.freshen()
                        time.sleep(POLL_SECONDS)
                finally:
                    # Reached in every case: a consumer that drops this generator raises at `yield`.
                    processes.stop()
            # The session has read all messages by now: yield those that came after the last poll.
            yield from told(context, reader)
            if late:
                raise took_too_long(deadline.told, config)
            require_success(processes.code(), failures, processes.last_words, config)

    def _configuration(self, options: RecipeOptions) -> str | None:
        """The configuration file of accelerate, if any. Raises `ParameterError` if missing."""
        file = self.accelerate_config or options.accelerate_config
        if file is not None and not Path(file).is_file():
            raise ParameterError(
                "the configuration of accelerate does not exist",
                where=f"accelerate_config = {Path(file).absolute()}",
                do="correct the path",
            )
        return file

    def _launch(
        self, config: TrainingConfig, options: RecipeOptions, devices: Sequence[str]
    ) -> list[str]:
        """The command `accelerate launch`, with every option that it warns about if left out.

        Args:
            devices: ids of the devices that the processes see.

        Raises:
            ParameterError: the configuration of accelerate does not exist.
        """
        # With this Python, not the script `accelerate`, which may be of another environment.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        # CUDA_VISIBLE_DEVICES already selects the devices. Without "all", `gpu_ids` of a
        # configuration file would replace the selection.
        command += ["--gpu_ids", "all"] if devices else []
        file = self._configuration(options)
        count = self.num_processes or options.num_processes
        if file is not None:
            count = count or (len(devices) if options.gpus else None)
            command += ["--config_file", file]
            return command + (["--num_processes", str(count)] if count else [])

        count = count or max(1, len(devices))
        # By default accelerate gives each process one thread. That is right with a GPU, but without
        # one most cores would idle.
        threads = 1 if devices else max(1, _threads() // count)
        return [
            *command,
            *("--num_processes", str(count)),
            *("--num_machines", "1"),
            *("--mixed_precision", config.mixed_precision or "no"),
            *("--dynamo_backend", "no"),
            *("--num_cpu_threads_per_process", str(threads)),
            *(["--multi_gpu"] if count > 1 and len(devices) > 1 else []),
        ]


class Processes:
    """A command under the supervisor. It does not outlive this process.

    Args:
        command: the command with its arguments.
        env: its environment variables.
        scratch: folder for a file with the end of the command's standard error. The supervisor
            removes the folder if this process was killed.
        grace: seconds that the command has to stop by itself.
        held: descriptors of lock files, which the supervisor keeps open until no process is left.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        scratch: Path,
        grace: float,
        held: Sequence[int],
    ) -> None:
        self._grace = grace
        self._tail = scratch / "stderr"
        # The supervisor watches one end of a pipe. When this process closes the other end or dies,
        # the supervisor sees the end of the file and stops the command.
        watch, self._hold = os.pipe()
        supervise = [sys.executable, str(SUPERVISOR), "--watch", str(watch)]
        supervise += ["--tail", str(self._tail), "--scratch", str(scratch)]
        supervise += ["--grace", str(grace), "--", *command]
        try:
            # In a session of its own, so that Ctrl-C in the terminal reaches only Dagster, which
            # then stops the processes in the right order.
            self._process = subprocess.Popen(
                supervise, env=dict(env), pass_fds=[watch, *held], start_new_session=True
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
        """The last lines of the command's standard error, once it has ended."""
        text = self._tail.read_text(errors="replace") if self._tail.is_file() else ""
        # Progress bars end their lines with a carriage return.
        lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
        return "\n".join(lines[-_SHOWN_LINES:])

    def stop(self) -> None:
        """Make the supervisor stop what still runs, and wait for it."""
        if self._hold >= 0:
            os.close(self._hold)
            self._hold = -1
        try:
            self._process.wait(timeout=2 * self._grace + _STOP_MARGIN)
        except subprocess.TimeoutExpired:
            # The supervisor itself hangs.
            self._process.kill()
            self._process.wait()


def _environment(variables: Mapping[str, str], devices: Sequence[str]) -> dict[str, str]:
    """The environment variables of the processes: this process's, with others added."""
    # The processes must import this very package, also from a checkout that is not installed.
    root = str(Path(diffsynth_dagster.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        # Progress bars go into log files here, where each update is another line.
        "TQDM_MININTERVAL": "10",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
        **variables,
    }


def _threads() -> int:
    """The threads that torch uses by default: one for each core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(cores, may_use)


def _watch_parent(context: dg.AssetExecutionContext) -> Callable[[], None]:
    """A function that raises a `StepFailure` when the run's process is gone.

    With the multiprocess executor, this process is a child of the run's process. When that one is
    killed, this one would go on as an orphan that nobody can cancel.
    """
    parent = multiprocessing.parent_process()
    lock = locks_folder(context.instance) / context.run.run_id

    def require() -> None:
        if parent is not None and not parent.is_alive():
            raise StepFailure("the process of the run is gone")

    # If this is the run's process itself, its parent may be the code server, which it may outlive.
    return (lambda: None) if process_of(lock) == os.getpid() else require
