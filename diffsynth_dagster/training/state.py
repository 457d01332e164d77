"""Resumable states: all that the steps to come depend on, as files.

    <run folder>/state/step-<n>/tensors.safetensors
    <run folder>/state/step-<n>/state.json    what the tensors are of, and digests of both files

A state is written into a hidden folder and renamed, so that it is whole or not there.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from diffsynth_dagster.errors import DamagedError, OutputError
from diffsynth_dagster.facts import digest_file, digest_of
from diffsynth_dagster.files import refusals, write_folder, write_tensors, write_text
from diffsynth_dagster.run.resume_point import FOLDER, state_folders
from diffsynth_dagster.training.packing import pack, unpack

_TENSORS, _MANIFEST = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Notes:
    """What a state says of a training after a step, beside its tensors.

    Attributes:
        step: optimizer steps that were made.
        done: of what is done beside the steps, in its order, how many were done after this one.
        identity: what the result depends on, by name: see `resume.identity_of`.
        order: what the samples of a step depend on: see `StepOrder.key`.
        record: `run.json` as it was.
        seconds: that the steps took.
        logs: name of a log → bytes that it had, and their digest.
    """

    step: int
    done: int
    identity: dict[str, Any]
    order: list[Any]
    record: dict[str, Any]
    seconds: float
    logs: dict[str, Any]


@dataclass(frozen=True)
class State(Notes):
    """A training after a step.

    Attributes:
        pieces: what `Parallel.state` gave, and more; nested, with tensors.
        weights: name → trained weight: a copy in CPU memory.
    """

    pieces: dict[str, Any]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class WrittenState(Notes):
    """A state as it lies in its folder, where its tensors stay until `whole` is given them.

    Attributes:
        packed: name of what a `State` has beside → its packed value.
    """

    folder: Path
    packed: dict[str, Any]

    @property
    def tensors(self) -> Path:
        """The file of its tensors."""
        return self.folder / _TENSORS

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """The state with its tensors."""
        notes = {field.name: getattr(self, field.name) for field in fields(Notes)}
        return State(**notes, **{name: unpack(p, tensors) for name, p in self.packed.items()})


class PackedState:
    """A copy of a state in CPU memory, which the training does not change any more.

    Raises:
        TypeError: the optimizer's state holds something else than numbers, texts and tensors.
    """

    def __init__(self, state: State) -> None:
        self.step = state.step
        self._tensors: dict[str, torch.Tensor] = {}
        self._packed = {
            name: pack(value, name, self._tensors, copy=name != "weights")
            for name, value in vars(state).items()
        }

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def write(self, run_folder: Path) -> Path:
        """Write it whole; returns its folder. Raises `OutputError`, and what was there stays."""

        def write(folder: Path) -> None:
            tensors = write_tensors(folder / _TENSORS, self._tensors, {"format": "pt"})
            digests = {"tensors": digest_file(tensors), "digest": digest_of(self._packed)}
            manifest = {**digests, "state": self._packed}
            write_text(folder / _MANIFEST, json.dumps(manifest) + "\n")

        return write_folder(run_folder / FOLDER / f"step-{self.step}", write, self.size)


def read_state(folder: Path) -> WrittenState:
    """The state in a folder, whose tensors are as they were written.

    One that another version of this program wrote, with other things in it, has an identity that no
    training has.

    Raises:
        DamagedError: it is not as it was written.
        OutputError: it cannot be read.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if digest_file(folder / _TENSORS) != manifest["tensors"]:
            raise ValueError(f"the bytes of {_TENSORS} have changed")
        packed: dict[str, Any] = manifest["state"]
        if digest_of(packed) != manifest["digest"]:
            raise ValueError(f"{_MANIFEST} has changed")
        if packed.keys() != {field.name for field in fields(State)}:
            return _of_another_version(packed, folder)
        notes = {field.name: unpack(packed.pop(field.name), {}) for field in fields(Notes)}
        return WrittenState(**notes, folder=folder, packed=packed)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"a state of the training is damaged: {error}",
            where=str(folder),
            do="remove it: the training then goes on from an older one",
        ) from error
    except OSError as error:
        raise OutputError(
            f"a state of the training cannot be read: {error}",
            where=str(folder),
            do="check the disk and the folder's permissions; or remove the state: the training then "
            "goes on from an older one, if there is one",
        ) from error


def _of_another_version(packed: Mapping[str, Any], folder: Path) -> WrittenState:
    """A whole state with other things in it, of which only its identity is read."""
    identity = unpack(packed.get("identity", {"dict": []}), {})
    layout = {"the layout of a state": sorted(packed)}
    order = unpack(packed.get("order"), {})
    return WrittenState(0, 0, {**identity, **layout}, order, {}, 0.0, {}, folder, {})


def keep_states(run_folder: Path, count: int) -> None:
    """Remove all but the newest states. Raises `OutputError`."""
    for _, folder in state_folders(run_folder)[count:]:
        with refusals("an older state of the training cannot be removed", folder):
            shutil.rmtree(folder)
