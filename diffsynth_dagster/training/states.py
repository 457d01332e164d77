"""Writes the states of a training between its steps, now and then."""

import threading
import time
from dataclasses import asdict
from pathlib import Path

from diffsynth_dagster.errors import OutputError, ParameterError
from diffsynth_dagster.files import require_held
from diffsynth_dagster.training.periodic import SavePoints
from diffsynth_dagster.training.resume import Logs, identity_of
from diffsynth_dagster.training.setup import TrainingState
from diffsynth_dagster.training.state import PackedState, State, keep_states


class States:
    """Writes a state every `state_steps` or `state_minutes`, with each checkpoint, and after the last
    step.

    The training waits only while a state is copied; a thread writes it. If it cannot be written,
    the training goes on with a warning, and the previous state stays.

    Raises:
        ParameterError: `state_steps` is given, and states cannot be written.
    """

    def __init__(self, training: TrainingState, points: SavePoints) -> None:
        config, parallel = training.inputs.config, training.inputs.parallel
        self._every = config.state_steps
        self._seconds = config.state_minutes * 60
        self._points, self._total = points, training.total_steps
        self._writes = config.writes_states and parallel.can_save_state
        if self._every is not None and not self._writes:
            raise ParameterError(
                "DeepSpeed keeps the optimizer's state in parts, which cannot be written as a state",
                where=f"state_steps = {self._every}",
                do="leave it out, or train without DeepSpeed",
            )
        self._parallel = parallel
        self._thread: threading.Thread | None = None
        # Filled by the thread, and reported by the main thread: listeners are not thread-safe.
        self._failed: list[str] = []
        self._reporter = training.inputs.reporter
        self._output = Path(config.output_path)
        self._logs = Logs(self._output)
        self._began = self._written = time.monotonic()
        state = training.inputs.state
        self._newest, self._before = (0, 0.0) if state is None else (state.step, state.seconds)

    @property
    def seconds(self) -> float:
        """Duration of all steps, including those before the training went on from a state."""
        return self._before + time.monotonic() - self._began

    @property
    def late(self) -> bool:
        """Whether the newest state is `state_minutes` old by the clock of this process.

        Others may disagree for a moment, so the processes agree on it in `train_step`.
        """
        if not self._writes or self._seconds == 0:
            return False
        return time.monotonic() - self._written >= self._seconds

    def due(self, step: int) -> bool:
        """Whether a state is due after a step because of its number; see `late` for the time."""
        self._warn()
        if not self._writes or step == 0:
            return False
        if step == self._total or self._points.name(step) is not None:
            return True
        return self._every is not None and step % self._every == 0

    def run(self, training: TrainingState, step: int, done: int) -> None:
        """Copy the state after a step, and start writing it. Collective.

        Args:
            done: see `Notes`.

        Raises:
            OutputError: a person removed or renamed the run folder. (A state that cannot be written
                only causes a warning.)
        """
        # A stop may come right after a state of the same step.
        if not self._writes or step == self._newest:
            return
        inputs = training.inputs
        self._newest, self._written = step, time.monotonic()
        if self._parallel.is_main_process:
            require_held(self._output)
            self.close()  # two copies of a state may not fit into memory
        # On every process: gathering is collective. Only the main process keeps the result.
        pieces = self._parallel.state(training.optimizer, training.schedule)
        # Beside the optimizer's: what this project itself carries from step to step.
        pieces["losses"] = training.losses.pieces(self._parallel)
        pieces["average"] = training.average.weights
        weights = dict(self._parallel.whole_weights(training.model, training.trained))
        if not self._parallel.is_main_process:
            return
        record = inputs.run_file.record
        state = State(
            step=step,
            done=done,
            identity=identity_of(record),
            order=training.data.order.key,
            record=asdict(record),
            seconds=self.seconds,
            logs=self._logs.positions(),
            pieces=pieces,
            weights=weights,
        )
        try:
            packed = PackedState(state)
        # The optimizer may be a user's own class, whose state may hold anything.
        except TypeError as error:
            inputs.reporter.warn(f"the state after step {step} is not written: {error}")
            return

        def write() -> None:
            try:
                self._logs.flush()
                packed.write(self._output)
            except OutputError as error:
                self._failed.append(f"the state after step {step} is not written: {error.what}")
            else:
                # Only now, so that there is a whole state at every moment.
                self._keep(inputs.config.state_keep)

        # No daemon: at the end of the program, Python waits until the state is whole.
        self._thread = threading.Thread(target=write, name=f"state-{step}")
        self._thread.start()

    def finish(self) -> None:
        """Keep only the newest state: the training has ended, and a longer one may go on from
        there."""
        self.close()
        if self._writes and self._parallel.is_main_process:
            self._keep(1)
            self._warn()

    def _keep(self, count: int) -> None:
        try:
            keep_states(self._output, count)
        except OutputError as error:
            self._failed.append(f"{error.what}; where: {error.where}")

    def close(self) -> None:
        """Wait until the state that is being written is whole."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._warn()

    def _warn(self) -> None:
        """Report, from the main thread, what the writing thread could not write."""
        while self._failed:
            self._reporter.warn(self._failed.pop())
