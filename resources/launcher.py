"""The launcher: runs `accelerate launch -m diffsynth_dagster.train` for an asset."""

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
_SHOWN_LINES = 30
_SCRATCH = "diffsynth-launch-"


class Launcher(dg.ConfigurableResource):
    """Runs training processes and takes them down with whoever asked for them."""

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
        """Run the config's task to its end, yielding the events that it reports while it works. It first
        waits until the devices that it takes are free.

        However the iteration ends (done, failed, cancelled, dropped), no process of it is left.

        Raises:
            StepFailure: the processes failed, were stopped, or took longer than the run may.
            OutputError: the run folder cannot be written.
            ParameterError: the configuration of accelerate does not exist, or there are not the devices
                that the recipe asks for.
        """
        output = Path(config.output_path).absolute()
        require_writable(output, "output_path")
        self._configuration(options)
        pool = pool_of(options)
        devices = devices_of(pool)
        count = how_many(options, pool, devices)
        warn_of_waiting(context, pool)
        who = holder(context.asset_key.to_user_string(), context.run.run_id)
        alive = _watch_parent(context)
        with take(devices, count, who, context.log.info, alive) as place:
            if place.devices:
                context.log.info(f"on GPU {', '.join(place.devices)}")
            yield from self._run(context, config, options, place, alive)

    def given(self) -> dict[str, Any]:
        """What takes the place of a recipe's options: name → value."""
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
        # A name of its own: another run may be about to read its file in this folder.
        recipe = hidden_beside(Path(config.output_path).absolute() / "launch.yaml")
        command = [*self._launch(config, options, place.devices), "-m", "diffsynth_dagster.train"]
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
            reader = MessageReader(FileMessages(scratch / "messages"))
            with dg.open_pipes_session(context, injector, reader) as session:
                pipes = session.get_bootstrap_env_vars()
                env = _environment({**pipes, FAILURE_FOLDER: str(failures)}, place.devices)
                held, late = place.descriptors, False
                processes = Processes(command, env, scratch, self.grace_seconds, held)
                try:
                    while processes.code() is None and not (late := deadline.is_over):
                        yield from told(context, reader)
                        require_alive()
                        place.freshen()
                        time.sleep(POLL_SECONDS)
                finally:
                    processes.stop()
            yield from told(context, reader)
            if late:
                raise took_too_long(deadline.told, config)
            require_success(processes.code(), failures, processes.last_words, config)

    def _configuration(self, options: RecipeOptions) -> str | None:
        """The configuration of accelerate, if any. Raises `ParameterError` if it does not exist."""
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
        """`accelerate launch` with every option that it would warn about when left out.

        Args:
            devices: those that the processes see.

        Raises:
            ParameterError: its configuration does not exist.
        """
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        # Those that they see are theirs: a configuration that names others would undo that.
        command += ["--gpu_ids", "all"] if devices else []
        file = self._configuration(options)
        count = self.num_processes or options.num_processes
        if file is not None:
            count = count or (len(devices) if options.gpus else None)
            command += ["--config_file", file]
            return command + (["--num_processes", str(count)] if count else [])

        count = count or max(1, len(devices))
        # accelerate gives each process one thread unless asked otherwise, which is right beside a
        # GPU and wastes the machine without one.
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
    """A command under the supervisor, alive only as long as this process is.

    Args:
        scratch: folder for a file with the last of the command's standard error. It is removed at the
            end if this process is killed.
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
        watch, self._hold = os.pipe()
        supervise = [sys.executable, str(SUPERVISOR), "--watch", str(watch)]
        supervise += ["--tail", str(self._tail), "--scratch", str(scratch)]
        supervise += ["--grace", str(grace), "--", *command]
        try:
            # A session of its own: a Ctrl-C in the terminal reaches only Dagster, which then
            # stops the processes in order.
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


def _environment(variables: Mapping[str, str], devices: Sequence[str]) -> dict[str, str]:
    root = str(Path(diffsynth_dagster.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        # Progress bars go into log files here.
        "TQDM_MININTERVAL": "10",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
        **variables,
    }


def _threads() -> int:
    """The threads that torch has without being told: a core each."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(cores, may_use)


def _watch_parent(context: dg.AssetExecutionContext) -> Callable[[], None]:
    """What raises a `StepFailure` when the run's process is gone. Under the multiprocess executor this
    process is a child of it, and would go on as an orphan that no one can cancel.

    The run's process itself may be a child too, of the code server, and outlives that.
    """
    parent = multiprocessing.parent_process()
    lock = locks_folder(context.instance) / context.run.run_id

    def require() -> None:
        if parent is not None and not parent.is_alive():
            raise StepFailure("the process of the run is gone")

    return (lambda: None) if process_of(lock) == os.getpid() else require
