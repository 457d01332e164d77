"""Going on from a state of the run folder: which state, and whether it is of the same training."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.order import StepOrder, total_steps
from diffsynth_dagster.errors import DamagedError, ParameterError
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.files import refusals, require_held
from diffsynth_dagster.fingerprint import Fingerprint
from diffsynth_dagster.older import is_moving
from diffsynth_dagster.run.earlier import clear, earlier_record, finish_moving
from diffsynth_dagster.run.record import LOGS, PICTURES, VERSION, RunRecord, written_files
from diffsynth_dagster.run.resume_point import state_folders
from diffsynth_dagster.run.start import parameters_of
from diffsynth_dagster.run.up_to_date import changed_files, say_changed
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.setup import TrainingState
from diffsynth_dagster.training.state import Notes, WrittenState, read_state
from diffsynth_dagster.versions import TRAINING

_BY_STEPS = ("num_epochs", "max_train_steps", "batch_size", "gradient_accumulation_steps")
"""Parameters whose values may differ: a longer training may go on from a shorter one, and the other
two are compared by the samples of each step."""
_EPOCHS = "the number of epochs, on which the learning rate depends"
"""A part of the identity in older states. It is ignored: the number of steps is compared
instead."""
_SAME_COURSE = ("constant", "constant_with_warmup")
"""Learning-rate schedules that do not depend on the number of steps."""
# Fields of the record that a training takes over from its state.
_CARRIED = (
    "first_loss",
    "final_loss",
    "all_losses_finite",
    "checkpoints",
    "newest",
    "held_out",
    "best",
    "evaluation",
    "beside",
    "pictures",
    "shown",
    "clips",
)


def identity_of(record: RunRecord) -> dict[str, Any]:
    """What the steps of a training depend on, by name: JSON values."""
    # From the record, since the launcher sets the precision if no parameter does.
    precision = record.mixed_precision
    return _of_each_step({**record.fingerprint.parts, "mixed_precision": precision})


def _of_each_step(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parts.items() if name not in _BY_STEPS}


def choose_state(
    config: TrainingConfig,
    record: RunRecord,
    data: StepDataset,
    can_restore: bool,
    warn: Callable[[str], None],
) -> WrittenState | None:
    """The newest whole state of the run folder to go on from; None to train from the beginning.

    A finished training with other parameters is not resumed. Checkpoints that were removed are
    not written again. If one was changed, an older state from before it is used, if there is one.

    Args:
        record: of the training that is about to start.
        data: the micro-batches of its steps.
        can_restore: see `Parallel.can_save_state`.

    Raises:
        ParameterError: the state belongs to another, unfinished training; or there is no whole
            state, and `resume` says that there must be one.
        OutputError: a state cannot be read.
    """
    output = Path(config.output_path)
    # A killed move to older/ is finished first, so that no state is half moved.
    finish_moving(output, warn)
    if config.resume == "never":
        return None
    earlier = earlier_record(output)
    is_finished = earlier is not None and earlier.finished
    # The newest state whose checkpoints were changed, and these: the last resort.
    newest: tuple[WrittenState, list[str]] | None = None
    for _, folder in state_folders(output):
        try:
            state = read_state(folder)
        except DamagedError as error:
            # A kill cannot cause this, but a full or failing disk can.
            warn(f"{error.what}; where: {folder}; an older state is looked for")
            continue
        names = _differing_values(config, state.identity, identity_of(record))
        names += _differing_steps(config, state, data.order)
        if not can_restore:
            names.append("DeepSpeed, which keeps the optimizer's state in parts")
        if names and (config.resume == "same" or (is_finished and config.resume == "auto")):
            before = "the training before" if is_finished else "the last state"
            warn(f"training from the beginning: changed since {before}: {', '.join(names)}")
            return None
        if names:
            raise _of_another(output, names)
        changed = _changed_checkpoints(output, state)
        if not changed:
            return _with_what_is_left(output, state, config.save_keep is not None, warn)
        newest = newest or (state, changed)
        warn(f"{changed[0]} is not what was written; an older state than {folder} is looked for")
    if newest is not None:
        state, changed = newest
        warn(f"no state is older than {changed[0]}, which is removed and not made again")
        return _with_what_is_left(output, state, config.save_keep is not None, warn, changed)
    if config.resume == "must":
        raise _no_state(output)
    return None


def require_going_on(
    config: TrainingConfig,
    record: RunRecord | None = None,
    order_on: Callable[[int], StepOrder] | None = None,
    processes: int | None = None,
) -> None:
    """Refuse a run folder that `choose_state` would refuse, as far as can be known before the
    training. Writes nothing.

    Args:
        record: of the training; None if the digest of its samples is not known. Its precision is
            ignored.
        order_on: (number of processes) → the order of the samples; None if there are none yet.
        processes: number of processes of the training; None for as many as the state's training
            had.

    Raises:
        ParameterError, OutputError: see `choose_state`.
    """
    output = Path(config.output_path)
    if config.resume == "never":
        return
    earlier = earlier_record(output)
    is_finished = earlier is not None and earlier.finished
    # The training first finishes an interrupted move to older/, after which no state is left.
    for _, folder in [] if is_moving(output) else state_folders(output):
        try:
            state = read_state(folder, tensors=False)
        except DamagedError:
            continue
        if config.resume == "same" or (is_finished and config.resume == "auto"):
            return
        names = _differing_as_far_as_known(config, state, record)
        if order_on is not None:
            as_before = max(1, _slots(state) // config.gradient_accumulation_steps)
            order = order_on(processes or as_before)
            # The first entry is the size of each bucket.
            if record is None and state.order[:1] != order.key[:1]:
                names.append("the samples")
            names += _differing_steps(config, state, order)
        if names:
            raise _of_another(output, names)
        return
    if config.resume == "must":
        raise _no_state(output)


def _differing_as_far_as_known(
    config: TrainingConfig, state: Notes, record: RunRecord | None
) -> list[str]:
    """What differs between a state and a training that has not begun, by name."""
    known = dict(state.identity)
    if record is not None:
        now = identity_of(record)
    else:
        now = _of_each_step({**parameters_of(config), VERSION: TRAINING})
        # What follows from the content of files is not compared.
        of_files = (
            *("the samples", "the held-out samples", "the table of samples"),
            *("the near copies that are left out", "the weights of "),
        )
        known = {name: value for name, value in known.items() if not name.startswith(of_files)}
    # If it is left out, the launcher decides: taken as equal.
    asked = config.mixed_precision
    now["mixed_precision"] = known.get("mixed_precision") if asked is None else asked
    return _differing_values(config, known, now)


def _slots(state: Notes) -> int:
    """Number of micro-batches of a state's steps, over all processes: see `StepOrder.key`."""
    return int(state.order[4]) if len(state.order) > 4 else 1


def _of_another(output: Path, names: Sequence[str]) -> ParameterError:
    return ParameterError(
        "the run folder holds the state of another training, which differs in: " + ", ".join(names),
        where=f"output_path = {output}",
        do="give another output_path; or resume: never, which moves what is there to older/ and "
        "trains from the beginning",
    )


def _no_state(output: Path) -> ParameterError:
    return ParameterError(
        "there is no whole state to go on from",
        where=f"resume = must, output_path = {output}",
        do="leave resume out, or correct output_path",
    )


def _differing_values(
    config: TrainingConfig, identity: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """What differs between the identities of a state and of a training, by name."""
    known = {name: value for name, value in identity.items() if name != _EPOCHS}
    if config.sample_cfg_scale is None and known.get("sample_cfg_scale") == 1.0:
        # In older states, leaving it out meant 1 (no guidance). Only samples change, and no step.
        known["sample_cfg_scale"] = now["sample_cfg_scale"]
    return Fingerprint(known).changes(Fingerprint(now))


def _differing_steps(config: TrainingConfig, state: Notes, order: StepOrder) -> list[str]:
    """What differs between the steps of a state and those of a training, by name."""
    names: list[str] = []
    if state.order != order.key:
        names.append(
            "the samples of each step (batch_size, or gradient_accumulation_steps times the number "
            "of processes)"
        )
    steps = total_steps(config, order.steps_per_epoch)
    # Cosine and others end at the last step: another length changes every step.
    planned = state.record.get("total_steps", steps)
    if config.lr_scheduler not in _SAME_COURSE and steps != planned:
        names.append(
            f"the number of steps, on which the learning rate depends ({steps}, and it was {planned})"
        )
    if state.step > steps:
        name = "num_epochs" if config.max_train_steps is None else "max_train_steps"
        names.append(f"{name} ({state.step} steps are made, and it gives {steps})")
    return names


def _changed_checkpoints(output: Path, state: Notes) -> list[str]:
    """The checkpoints of a state that exist, but are not as they were written."""
    known: Mapping[str, str] = state.record["checkpoints"]
    paths = {name: output / name for name in known if (output / name).is_file()}
    return [name for name, path in paths.items() if digest_file(path) != known[name]]


def _with_what_is_left(
    output: Path,
    state: WrittenState,
    may_be_gone: bool,
    warn: Callable[[str], None],
    changed: Sequence[str] = (),
) -> WrittenState:
    """The state, with a record that names only checkpoints that still exist. Samples that are missing or
    were changed are said, and not made again.

    Args:
        may_be_gone: whether older checkpoints are removed for newer ones, so that it is no surprise
            if some are gone.
        changed: checkpoints that are not to be named either.
    """
    record, best = state.record, state.record["best"]
    gone = [name for name in record["checkpoints"] if not (output / name).is_file()]
    # The best ones are removed by the training itself when better ones follow.
    removed = [name for name in gone if name not in best] if not may_be_gone else []
    if removed:
        warn(f"{', '.join(removed)} were removed since, and are not made again")
    beside = record.get("beside", {})  # states of before do not have it
    samples = {name: beside[name] for name in beside if name.startswith(f"{PICTURES}/")}
    if changed_samples := changed_files(output, samples):
        warn(say_changed(changed_samples))
    without = {*gone, *changed}
    left = {
        "checkpoints": {n: d for n, d in record["checkpoints"].items() if n not in without},
        "best": [name for name in best if name not in without],
        "newest": [name for name in record["newest"] if name not in without],
    }
    return replace(state, record={**record, **left})


def going_on(record: RunRecord, state: WrittenState | None) -> RunRecord:
    """The record of a training that goes on from a state, or starts from the beginning."""
    if state is None:
        return record
    # States of before do not have all of them.
    carried = {name: state.record[name] for name in _CARRIED if name in state.record}
    before = [*state.record["resumed_from"], state.step]
    return replace(record, **carried, resumed_from=before)


def restore(training: TrainingState, written: WrittenState) -> list[Any]:
    """Restore a training from a state, except for the random numbers. Collective.

    Returns:
        The random numbers of each process that wrote the state: see `Parallel.load_random`.
    """
    parallel = training.inputs.parallel
    state = written.whole(parallel.tensors_from_main(written.tensors))
    weights = {name: state.weights[name] for name in training.trained}
    parallel.load_state(
        training.model, weights, state.pieces, training.optimizer, training.schedule
    )
    training.losses.restore(state.pieces["losses"], parallel.is_main_process)
    training.average.restore(state.pieces["average"])
    return state.pieces["random"]


class Logs:
    """The growing logs of a run folder. Each byte is read only once."""

    def __init__(self, output: Path) -> None:
        self._read = {output / name: (0, blake3()) for name in LOGS}

    def flush(self) -> None:
        """Let what the logs hold reach the disk, as the states that tell of it do. Raises `OutputError`."""
        for path in self._read:
            with refusals("a log of the training cannot be written", path):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())

    def positions(self) -> dict[str, Any]:
        """Name of each log that exists → its size in bytes, and their digest."""
        for path, (size, digest) in self._read.items():
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(size)
                    more = file.read()
                digest.update(more)
                # Only what is new is read: logs of long trainings are large.
                self._read[path] = (size + len(more), digest)
        return {
            path.name: {"bytes": size, "digest": digest.hexdigest()}
            for path, (size, digest) in self._read.items()
            if path.is_file()
        }


def make_ready(output: Path, state: Notes | None, warn: Callable[[str], None]) -> None:
    """Bring a run folder to the point where the training starts: remove what is newer than its
    state. Without a state, move the training that is there to `older/`.

    Raises:
        OutputError: the folder cannot be written.
    """
    if state is None:
        clear(output, warn)
        return
    require_held(output)
    with refusals(f"what the training wrote after step {state.step} cannot be removed", output):
        for step, folder in state_folders(output):
            if step > state.step:
                shutil.rmtree(folder)
        record = earlier_record(output)
        # After the states: a kill in between must not leave a newer state without its files.
        newer = set() if record is None else written_files(asdict(record))
        for name in newer - written_files(state.record):
            (output / name).unlink(missing_ok=True)
        _cut_logs(output, state, warn)


def _cut_logs(output: Path, state: Notes, warn: Callable[[str], None]) -> None:
    """Cut off the lines of later steps from the logs. A log that does not match its digest is
    emptied."""
    for name in LOGS:
        path, known = output / name, state.logs.get(name)
        content = path.read_bytes() if path.is_file() else b""
        kept = content[: known["bytes"]] if known is not None else b""
        if known is not None and blake3(kept).hexdigest() != known["digest"]:
            warn(f"{path} is damaged; what it said of the first {state.step} steps is lost")
            kept = b""
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(len(kept))
