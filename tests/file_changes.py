"""Other files, and the same under another name, for every parameter that counts by content."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parameter_changes import Place


@dataclass(frozen=True)
class FileChange:
    """What a parameter names before; the same content under another name; other content."""

    before: Mapping[str, Any]
    renamed: Mapping[str, Any]
    changed: Mapping[str, Any] | None


def copied(source: Path, target: Path, change: Callable[[Path], None] | None = None) -> str:
    """A copy of a folder, or of a file and its neighbours; changed where it is asked for."""
    shutil.copytree(source if source.is_dir() else source.parent, target, dirs_exist_ok=True)
    copy = target if source.is_dir() else target / source.name
    if change is not None:
        change(copy)
    return str(copy)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_first_file(folder: Path) -> None:
    (first,) = folder.glob("0.*")
    shutil.copy(first.with_stem("1"), first)


def rewrite_captions(table: Path) -> None:
    table.write_text(table.read_text(encoding="utf-8").replace("number", "count"))


def add_file(folder: Path) -> None:
    (folder / "more.json").write_text("{}")


def file_change(place: Place, name: str) -> FileChange:
    """The change of a parameter that counts by content."""
    values, new = place.values({}), place.folder / name
    if name == "family":  # No other family takes these files.
        return FileChange({}, {"family": None}, None)
    if name in ("lora_checkpoint", "preset_lora_path"):
        one, same, two = (str(place.folder / f"{n}.safetensors") for n in ("one", "same", "two"))
        more = {"preset_lora_model": "text_encoder"} if name == "preset_lora_path" else {}
        return FileChange({name: one, **more}, {name: same, **more}, {name: two, **more})
    if name == "resume_from_checkpoint":
        whole = {"lora_base_model": None, "trainable_models": [place.case.base]}
        files = (str(place.folder / f"{n}.safetensors") for n in ("one", "same", "two"))
        return FileChange(*({name: file, **whole} for file in files))
    if name == "model_paths":
        return FileChange({}, *(with_other_vae(place, new / n / "vae", c) for n, c in COPIES))
    if name == "model_id_with_origin_paths":
        return FileChange(*(with_hub_vae(place, f"a/{n}", c) for n, c in (("z", None), *COPIES)))
    if name == "fp8_models":
        (encoder,) = (p for p in values["model_paths"] if "/text_encoder/" in str(p))
        copy = copied(Path(encoder), new)
        paths = [copy if path == encoder else path for path in values["model_paths"]]
        stored = {name: [encoder]}
        return FileChange(stored, {"model_paths": paths, name: [copy]}, {"model_paths": paths})
    if name in ("validation_metadata_path", "sample_table"):
        table = Path(values["dataset_metadata_path"])
        changes = (("renamed", None), ("changed", rewrite_captions))
        others = ({name: copied(table, new / n, change)} for n, change in changes)
        return FileChange({name: str(table)}, *others)
    changes = {"dataset_base_path": swap_first_file, "dataset_metadata_path": rewrite_captions}
    source = Path(values.get(name) or place.model / "diffusers" / "tokenizer")
    change = changes.get(name, add_file)
    return FileChange(
        {},
        {name: copied(source, new / "renamed")},
        {name: copied(source, new / "changed", change)},
    )


COPIES = (("renamed", None), ("changed", flip_last_byte))


def vae_of(place: Place) -> str:
    (vae,) = (p for p in place.values({})["model_paths"] if "/vae" in str(p))
    return vae


def with_other_vae(
    place: Place, folder: Path, change: Callable[[Path], None] | None
) -> dict[str, Any]:
    """The model list with a copy of the VAE in place of its own."""
    vae = vae_of(place)
    copy = copied(Path(vae), folder, change)
    paths = place.values({})["model_paths"]
    return {"model_paths": [copy if path == vae else path for path in paths]}


def with_hub_vae(
    place: Place, repository: str, change: Callable[[Path], None] | None
) -> dict[str, Any]:
    """The model list with the VAE from a repository."""
    vae = Path(vae_of(place))
    copied(vae, place.folder / "hub" / repository / "vae", change)
    paths = [path for path in place.values({})["model_paths"] if path != str(vae)]
    entry = f"{repository}:vae/{vae.name}"
    return {"model_paths": paths, "model_id_with_origin_paths": [entry]}
