"""Resumable states: everything that later steps depend on, as files.

    <run folder>/state/step-<n>/tensors.safetensors
    <run folder>/state/step-<n>/state.json    all that is no tensor, and the digests of both files

A state is written to a hidden folder, which is then renamed: it is whole or does not exist.
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
    """The part of a state that is no tensor: what it says of a training after a step.

    Attributes:
        step: optimizer steps that were made.
        done: how many of the periodic things were done after this step: see `periodic.run_due`.
        identity: what the result depends on, by name: see `resume.identity_of`.
        order: what the samples of a step depend on: see `StepOrder.key`.
        record: `run.json` as it was.
        seconds: duration of the steps.
        logs: name of a log → its size in bytes, and their digest.
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
        pieces: what `Parallel.state` returned, the losses and the average; nested, with tensors.
        weights: name → trained weight, as a copy in CPU memory.
    """

    pieces: dict[str, Any]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class WrittenState(Notes):
    """A state in its folder. Its tensors are not read yet.

    Attributes:
        packed: name of each other field of `State` → its packed value.
    """

    folder: Path
    packed: dict[str, Any]

    @property
    def tensors(self) -> Path:
        """The file with the tensors."""
        return self.folder / _TENSORS

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> State:
        """The state with its tensors, which the caller has read."""
        notes = {field.name: getattr(self, field.name) for field in fields(Notes)}
        return State(**notes, **{name: unpack(p, tensors) for name, p in self.packed.items()})


class PackedState:
    """A copy of a state in CPU memory, which the training no longer changes.

    Raises:
        TypeError: the optimizer's state holds something other than numbers, texts and tensors.
    """

    def __init__(self, state: State) -> None:
        self.step = state.step
        self._tensors: dict[str, torch.Tensor] = {}
        # The weights are copies already.
        self._packed = {
            name: pack(value, name, self._tensors, copy=name != "weights")
            for name, value in vars(state).items()
        }

    @property
    def size(self) -> int:
        """Size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def write(self, run_folder: Path) -> Path:
        """Write the state; returns its folder. Raises `OutputError`; then an older state stays as
        it is."""

        def write(folder: Path) -> None:
            tensors = write_tensors(folder / _TENSORS, self._tensors, {"format": "pt"})
            digests = {"tensors": digest_file(tensors), "digest": digest_of(self._packed)}
            # The digest of the JSON values, too: a damaged number would still be valid JSON.
            manifest = {**digests, "state": self._packed}
            write_text(folder / _MANIFEST, json.dumps(manifest) + "\n")

        return write_folder(run_folder / FOLDER / f"step-{self.step}", write, self.size)


def read_state(folder: Path, tensors: bool = True) -> WrittenState:
    """Read the state in a folder, and check the digests of its files.

    Args:
        tensors: False: without the digest of the tensors, which may be of many gigabytes.

    If another version of this program wrote it with other fields, its identity equals that of no
    training.

    Raises:
        DamagedError: the files are not as they were written.
        OutputError: they cannot be read.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if tensors and digest_file(folder / _TENSORS) != manifest["tensors"]:
            raise ValueError(f"the bytes of {_TENSORS} have changed")
        packed: dict[str, Any] = manifest["state"]
        if digest_of(packed) != manifest["digest"]:
            raise ValueError(f"{_MANIFEST} has changed")
        # Older or newer versions: refused by name later, not called damaged.
        if packed.keys() != {field.name for field in fields(State)}:
            return _of_another_version(packed, folder)
        notes = {field.name: unpack(packed.pop(field.name), {}) for field in fields(Notes)}
        return WrittenState(**notes, folder=folder, packed=packed)
    # JSON errors are ValueErrors.
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
    """A whole state with other fields, of which only the identity and the order are read."""
    # The extra part of the identity names, in the message of a refusal, what differs.
    identity = unpack(packed.get("identity", {"dict": []}), {})
    layout = {"the layout of a state": sorted(packed)}
    order = unpack(packed.get("order"), {}) or []
    return WrittenState(0, 0, {**identity, **layout}, order, {}, 0.0, {}, folder, {})


def keep_states(run_folder: Path, count: int) -> None:
    """Remove all but the newest states. Raises `OutputError`."""
    for _, folder in state_folders(run_folder)[count:]:
        with refusals("an older state of the training cannot be removed", folder):
            shutil.rmtree(folder)
