"""Recognise model files by the names of their tensors. There is no table of file hashes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, cast

import torch

from diffsynth_dagster.config.entries import ModelEntry
from diffsynth_dagster.errors import ParameterError, WeightsError, reason_of
from diffsynth_dagster.families import each_family
from diffsynth_dagster.families.contract import Component, Family, Settings, Shapes
from diffsynth_dagster.weights.header import Header

_Settings = Literal["architecture", "scheduler"]
_NO_PART = ("attn_implementation", "experts_implementation", "auto_map")
"""Settings of a config.json that choose code, not the architecture."""


@dataclass(frozen=True)
class ComponentLocation:
    """A component that was found in files.

    Attributes:
        start: prefix of its tensor names in a whole checkpoint; empty in files of its own.
    """

    component: Component
    start: str = ""


def recognise(header: Header, component: Component) -> bool:
    """Whether the tensors are the component's, in any layout that it accepts."""
    return any(all(mark in header for mark in marks) for marks in component.recognition.signatures)


def below(header: Header, start: str) -> Header:
    """The tensors whose names start with a prefix, without the prefix."""
    if not start:
        return header
    return {n.removeprefix(start): info for n, info in header.items() if n.startswith(start)}


def components_in(header: Header, family: Family) -> list[ComponentLocation]:
    """The components of a family in a file or its shards: one, or several in a whole checkpoint;
    none if the file is of another family."""
    alone = next((ComponentLocation(c) for c in family.components if recognise(header, c)), None)
    in_checkpoint = [
        ComponentLocation(component, start)
        for component in family.components
        for start in component.recognition.checkpoint_prefixes
        if recognise(below(header, start), component)
        # A component in files of its own may have submodules that look like the component.
        and not (alone is not None and component is alone.component)
    ]
    return in_checkpoint if alone is None else [alone, *in_checkpoint]


def recognise_components(
    header: Header, family: Family, entry: ModelEntry
) -> list[ComponentLocation]:
    """The components of a family in an entry's files. Raises `WeightsError` if there are none."""
    locations = components_in(header, family)
    if locations:
        return locations
    names = ", ".join(sorted(header)[:3])
    known = ", ".join(c.name for c in family.components)
    raise WeightsError(
        f"the file is no component of {family.name}: its first tensors are {names}",
        where=f"{entry.parameter} = {entry.text}",
        do=f"the components of {family.name} are {known}; give their files, or another family",
    )


def recognise_family(headers: Mapping[ModelEntry, Header]) -> Family:
    """The one family that recognises all of these files.

    Raises:
        WeightsError: no family recognises them all.
        ParameterError: several families do.
    """
    fits = [
        family
        for family in each_family()
        if all(components_in(header, family) for header in headers.values())
    ]
    denoisers = [
        family
        for family in fits
        if any(
            location.component.name == family.denoiser
            for header in headers.values()
            for location in components_in(header, family)
        )
    ]
    if len(fits) == 1:
        return fits[0]
    # Families share VAEs and text encoders, so the denoiser decides.
    if len(denoisers) == 1:
        return denoisers[0]
    if fits:
        raise ParameterError(
            "several families have these files",
            where="family",
            do="give it: one of " + ", ".join(f.name for f in fits),
        )
    for entry, header in headers.items():
        if not any(components_in(header, family) for family in each_family()):
            names = ", ".join(sorted(header)[:3])
            raise WeightsError(
                f"the file is of an unknown kind: its first tensors are {names}",
                where=f"{entry.parameter} = {entry.text}",
                do="check that it is a model of a supported family",
            )
    raise WeightsError(
        "the files belong to different families",
        where=", ".join(entry.text for entry in headers),
        do="name the files of one family only",
    )


def converted_shapes(header: Header, component: Component, where: str) -> Shapes:
    """Tensor name of the built module → shape, from the headers of its files.

    Args:
        where: the entry, for messages.

    Raises:
        WeightsError: a tensor that the conversion needs is missing.
    """
    # The conversion itself runs on meta tensors, so it needs no second version for shapes.
    try:
        tensors = {name: torch.empty(i.shape, device="meta") for name, i in header.items()}
        return {name: tuple(t.shape) for name, t in component.construction.convert(tensors).items()}
    except Exception as error:
        raise WeightsError(
            f"the files are not a whole '{component.name}': {reason_of(error)}",
            where=where,
            do="name every shard of the model and nothing else",
        ) from error


def guess_component(entry: ModelEntry, family: Family) -> str | None:
    """Guess the component of an entry from its folder and file name; None if unclear."""
    for component in family.components:
        if component.names.folder == entry.folder_hint:
            return component.name
    text = entry.pattern if entry.repository else entry.paths[0]
    for component in family.components:
        if any(
            fnmatch(text, glob) or fnmatch(text, f"*/{glob}")
            for glob in component.recognition.original_globs
        ):
            return component.name
    return None


def guess_components(entries: Sequence[ModelEntry], family: Family) -> list[str | None]:
    """Guess the component of each entry of a model list: see `guess_component`."""
    names = [guess_component(entry, family) for entry in entries]
    # Experts look alike: where the list has both, the path tells the second one apart.
    for second in (c for c in family.components if c.recognition.path_marks):
        first = next(
            c
            for c in family.components
            if c.recognition.signatures == second.recognition.signatures
        )
        pair = [i for i, name in enumerate(names) if name in (first.name, second.name)]
        for i in pair:
            is_second = len(pair) > 1 and any(
                mark in entries[i].text for mark in second.recognition.path_marks
            )
            names[i] = second.name if is_second else first.name
    return names


def read_architecture(folder: Path, component: Component) -> Mapping[str, object] | None:
    """Read a component's config.json from a folder; None if there is none, or of another class.

    Raises:
        WeightsError: it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    loaded = _read_mapping(path, "architecture")
    # diffusers writes `_class_name`, transformers writes `architectures`.
    named = (loaded.get("_class_name"), *(loaded.get("architectures") or ()))
    return loaded if any(name in component.construction.classes for name in named) else None


def read_schedule(folder: Path, header: Header, family: Family) -> Settings:
    """Read the published scheduler settings of a denoiser.

    They are in a scheduler_config.json in diffusers' layout. Some authors' files mark them instead
    by a tensor that is not used otherwise, such as `v_pred`.

    Args:
        folder: of the denoiser's files.
        header: of these files, with all tensors.

    Raises:
        WeightsError: the scheduler's file is damaged.
    """
    marked = [settings for mark, settings in family.scheduler_marks.items() if mark in header]
    # A whole checkpoint is beside the scheduler's folder; a denoiser is in a folder beside it.
    paths = [p / "scheduler" / "scheduler_config.json" for p in (folder, folder.parent)]
    path = next((p for p in paths if p.is_file()), None)
    # A mark in the file itself is more certain than a scheduler that happens to be beside it.
    if marked or path is None:
        return {name: value for settings in marked for name, value in settings.items()}
    return _read_mapping(path, "scheduler")


def _read_mapping(path: Path, what: _Settings) -> dict[str, Any]:
    """Read the settings in a JSON file.

    Args:
        what: the thing that the settings are for, for messages.

    Raises:
        WeightsError: the file is damaged.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), object_hook=_architecture_only)
    except (OSError, ValueError) as error:
        raise _damaged(path, what, str(error)) from error
    if not isinstance(loaded, dict):
        raise _damaged(path, what, "they are not a mapping")
    return cast(dict[str, Any], loaded)


def _architecture_only(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that choose code: libraries would look for that code on a hub."""
    return {n: v for n, v in settings.items() if not n.strip("_").startswith(_NO_PART)}


def _damaged(path: Path, what: _Settings, reason: str) -> WeightsError:
    """The error for a JSON file that cannot be read as settings."""
    instead = ", or remove it: the settings then come from the shapes"
    return WeightsError(
        f"the settings of the {what} cannot be read: {reason}",
        where=str(path),
        do="download the file again" + (instead if what == "architecture" else ""),
    )
