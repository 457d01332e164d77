"""Write a module that is trained in full, whole, and check what was written.

exports/diffusers/<folder>/diffusion_pytorch_model.safetensors      in the layout of diffusers, or
exports/diffusers/<folder>/diffusion_pytorch_model-00001-of-00003.safetensors, …, with its index
exports/authors/<folder>/<name>.safetensors                         in that of the authors' files, where
                                                                    it was loaded from those
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ConfigMixin
from torch import nn
from transformers import PreTrainedModel

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.export.exported import (
    Exported,
    ExportFormat,
    digest_of_files,
    remove_older,
    unloadable,
)
from diffsynth_dagster.facts import fact_cache_of
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.files import write_text
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.weights.header import read_header, read_headers
from diffsynth_dagster.weights.layout import from_layout_of, in_layout_of
from diffsynth_dagster.weights.load import build_empty, read_tensors
from diffsynth_dagster.weights.lora import PROVENANCE_KEY
from diffsynth_dagster.weights.model_spec import write_described
from diffsynth_dagster.weights.models import Models, component_digest
from diffsynth_dagster.weights.recognise import read_architecture
from diffsynth_dagster.weights.resolved import ComponentFiles, ResolvedModel

MAX_SHARD = 10 * 10**9
"""Bytes of tensors in a file, but for a single tensor that has more."""
_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"


def export_full(
    config: TrainingConfig,
    record: RunRecord,
    found: ResolvedModel,
    name: str,
    own: Tensors,
    provenance: Mapping[str, object],
) -> list[Exported]:
    """Write a whole component for diffusers or transformers, and for the tools of the authors' files where
    it was loaded from those.

    Args:
        own: what a checkpoint holds of the component, in the layout of the files it was loaded from.

    Raises:
        OutputError: the folder cannot be written.
        WeightsError: see `_with_untrained`.
    """
    source = found.components[name]
    tensors = _with_untrained(config, record, found, name, from_layout_of(source, own))
    tensors = {n: tensors[n].contiguous() for n in sorted(tensors)}
    exports = Path(config.output_path) / "exports"
    said = json.dumps({**provenance, "trained": [name]}, sort_keys=True)
    notes = {PROVENANCE_KEY: said, "format": "pt"}
    path = _write_diffusers(
        exports / "diffusers" / source.component.names.folder, source, tensors, notes
    )
    exported = [_exported(path, name, "diffusers")]
    theirs = in_layout_of(source, tensors)
    if theirs.keys() != tensors.keys():
        path = (
            exports
            / "authors"
            / source.component.names.folder
            / f"{_authors_name(source)}{_SUFFIX}"
        )
        _remove_weights(path.parent, "", keep=path.name)
        exported.append(_exported(write_described(path, theirs, notes), name, "authors"))
    return exported


def _with_untrained(
    config: TrainingConfig, record: RunRecord, found: ResolvedModel, name: str, trained: Tensors
) -> Tensors:
    """The tensors of a whole component: those that were not trained come from the model files.

    Raises:
        WeightsError: the files are not those that were trained on.
    """
    if all(n in trained for n, _ in build_empty(found.components[name]).named_parameters()):
        return trained
    with fact_cache_of(config.cache_path) as fact_cache:
        if component_digest(found, name, fact_cache) != record.base[name]:
            raise WeightsError(
                f"the files of '{name}' are not those that the training began with",
                where=found.components[name].entry.text,
                do="put those back: the checkpoint holds a part of the model, and the rest is theirs",
            )
    kind = next(iter(trained.values())).dtype
    base = Models(found, torch.device("cpu"), kind, on_cpu_first=True).get([name])[name]
    return {**base.state_dict(), **trained}


def _write_diffusers(
    folder: Path, source: ComponentFiles, tensors: Tensors, notes: Mapping[str, str]
) -> Path:
    """Write a module as `from_pretrained` of its library loads it; returns its file, or its index.

    Raises:
        OutputError: the folder cannot be written.
    """
    module = build_empty(source)
    stem = _stem(module)
    shards = _in_shards(tensors, stem)
    single = f"{stem}{_SUFFIX}"
    # First: an old index would say that new shards beside old ones are one model.
    _remove_weights(folder, stem, keep=single if single in shards else None)
    for file, names in shards.items():
        write_described(folder / file, {n: tensors[n] for n in names}, notes)
    _write_config(folder / "config.json", source, module)
    if single in shards:
        return folder / single
    files = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": _size(tensors.values())}, "weight_map": files}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return write_text(folder / f"{stem}{_INDEX}", text)


def _in_shards(tensors: Tensors, stem: str) -> dict[str, list[str]]:
    """File → the tensors in it, in their order: one file where they fit into it.

    Not by `huggingface_hub.split_torch_state_dict_into_shards`, which keeps tensors together that are
    views of one storage.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}{_SUFFIX}": shards[0]}
    return {f"{stem}-{i:05}-of-{len(shards):05}{_SUFFIX}": own for i, own in enumerate(shards, 1)}


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _stem(module: nn.Module) -> str:
    """How the names of its files start in its library."""
    return "model" if isinstance(module, PreTrainedModel) else "diffusion_pytorch_model"


def _remove_weights(folder: Path, stem: str, keep: str | None) -> None:
    """Remove the weights that an older export left in a folder, the index first.

    Args:
        stem: how their names start.
        keep: a file that is about to be replaced.

    Raises:
        OutputError: that cannot be done.
    """
    paths = [*folder.glob(f"{stem}*{_INDEX}"), *folder.glob(f"{stem}*{_SUFFIX}")]
    for path in (p for p in paths if p.name != keep):
        remove_older(path)


def _write_config(path: Path, source: ComponentFiles, module: nn.Module) -> None:
    """The settings of the module, as the config.json of the library that reads it."""
    if isinstance(module, ConfigMixin):
        write_text(path, module.to_json_string())
    elif source.config is not None:
        write_text(path, json.dumps(source.config, indent=2) + "\n")
    else:
        assert isinstance(module, PreTrainedModel)
        module.config.architectures = [type(module).__name__]
        write_text(path, module.config.to_json_string())


def _authors_name(source: ComponentFiles) -> str:
    """The name of the file that a component was loaded from, without its ending; that of its folder where
    it was loaded from several, or from a whole checkpoint."""
    alone = len(source.files) == 1 and not source.start
    return source.files[0].stem if alone else source.component.names.folder


def _exported(path: Path, component: str, target: ExportFormat) -> Exported:
    files = _files(path)
    count = sum(len(read_header(file)) for file in files if file.suffix == _SUFFIX)
    size = sum(file.stat().st_size for file in files)
    return Exported(path, target, (component,), "full", digest_of_files(files), count, size)


def _files(path: Path) -> list[Path]:
    """A file; or an index, and the shards that it names.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the index cannot be read.
    """
    if not path.name.endswith(_INDEX):
        return [path]
    index = json.loads(path.read_text(encoding="utf-8"))
    return [path, *(path.parent / file for file in sorted({*index["weight_map"].values()}))]


def verify_full(exported: Exported, found: ResolvedModel) -> None:
    """Check that a module was written whole, and is the architecture that its config.json names; in the
    layout of the authors, that converting it gives the tensors of the export for diffusers.

    Raises:
        WeightsError: a file is missing or damaged, or is not what the training made.
    """
    files = _whole_files(exported)
    source = found.components[exported.components[0]]
    if exported.format == "authors":
        _verify_authors(exported, source)
        return
    config = read_architecture(exported.path.parent, source.component)
    if config is None:
        raise unloadable(exported, "its config.json is missing, or of another architecture")
    module = build_empty(replace(source, config=config))
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    weights = [file for file in files if file.suffix == _SUFFIX]
    have = {name: info.shape for name, info in read_headers(weights).items()}
    wrong = sorted(name for name in have if wanted.get(name) != have[name])
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    wrong += sorted(name for name in wanted if name not in have and name not in tied)
    if wrong:
        raise unloadable(exported, f"tensors differ from the architecture: {wrong[:3]}")
    if len(files) > 1:
        named = json.loads(exported.path.read_text(encoding="utf-8"))["weight_map"]
        if named != {name: file.name for file in weights for name in read_header(file)}:
            raise unloadable(exported, "its index names other tensors than the shards hold")


def _whole_files(exported: Exported) -> list[Path]:
    """The files of an export, with the bytes that were written. Raises `WeightsError`."""
    try:
        files = _files(exported.path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unloadable(exported, f"its index cannot be read: {error}") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise unloadable(exported, f"{missing[0]} is missing")
    if digest_of_files(files) != exported.digest:
        raise unloadable(exported, "it was changed since it was written")
    return files


def _verify_authors(exported: Exported, source: ComponentFiles) -> None:
    """Compare a file in the authors' layout with the export for diffusers. Raises `WeightsError`."""
    folder = exported.path.parents[2] / "diffusers" / source.component.names.folder
    given = source.component.construction.convert(read_tensors([exported.path]))
    stem = _stem(build_empty(source))
    wanted = read_tensors(sorted(folder.glob(f"{stem}*{_SUFFIX}")))
    wrong = sorted(given.keys() ^ wanted.keys())
    wrong += sorted(n for n in given.keys() & wanted.keys() if not _equal(given[n], wanted[n]))
    if wrong:
        raise unloadable(exported, f"converted, it is another model: {wrong[:3]}")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
