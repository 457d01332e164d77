"""Export a module that was trained in full, and verify the files.

exports/diffusers/<folder>/                           the layout of diffusers
    diffusion_pytorch_model.safetensors               in one file,
    diffusion_pytorch_model-00001-of-00003.safetensors, …    or in shards with an index
exports/authors/<folder>/<name>.safetensors           the layout of the model's authors, if it was
                                                      loaded from their files
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
"""Largest size of a shard in bytes of tensors. A single larger tensor gets a shard of its own."""
_SUFFIX, _INDEX = ".safetensors", ".safetensors.index.json"


def export_full(
    config: TrainingConfig,
    record: RunRecord,
    model: ResolvedModel,
    name: str,
    own: Tensors,
    provenance: Mapping[str, object],
) -> list[Exported]:
    """Write a whole component for diffusers or transformers. If it was loaded from files in the
    authors' layout, write it in that layout too.

    Args:
        own: the tensors of the component in the checkpoint, named as in the files it was loaded
            from.

    Raises:
        OutputError: the folder cannot be written.
        WeightsError: see `_with_untrained`.
    """
    source = model.components[name]
    tensors = _with_untrained(config, record, model, name, from_layout_of(source, own))
    # Sorted, so that equal weights give equal bytes; contiguous, because safetensors requires it.
    tensors = {n: tensors[n].contiguous() for n in sorted(tensors)}
    exports = Path(config.output_path) / "exports"
    origin = json.dumps({**provenance, "trained": [name]}, sort_keys=True)
    notes = {PROVENANCE_KEY: origin, "format": "pt"}
    path = _write_diffusers(
        exports / "diffusers" / source.component.names.folder, source, tensors, notes
    )
    exported = [_exported(path, name, "diffusers")]
    original = in_layout_of(source, tensors)
    # Equal names mean that it was loaded from the layout of diffusers: one export is enough.
    if original.keys() != tensors.keys():
        path = (
            exports
            / "authors"
            / source.component.names.folder
            / f"{_authors_name(source)}{_SUFFIX}"
        )
        _remove_weights(path.parent, "", keep=path.name)
        exported.append(_exported(write_described(path, original, notes), name, "authors"))
    return exported


def _with_untrained(
    config: TrainingConfig, record: RunRecord, model: ResolvedModel, name: str, trained: Tensors
) -> Tensors:
    """All tensors of a component. Those that were not trained are read from the model files.

    Raises:
        WeightsError: the model files have changed since the training began.
    """
    # A checkpoint holds the whole component, unless only a part of it was trained.
    if all(n in trained for n, _ in build_empty(model.components[name]).named_parameters()):
        return trained
    with fact_cache_of(config.cache_path) as fact_cache:
        if component_digest(model, name, fact_cache) != record.base[name]:
            raise WeightsError(
                f"the files of '{name}' are not those that the training began with",
                where=model.components[name].entry.text,
                do="put those back: the checkpoint holds a part of the model, and the rest is theirs",
            )
    dtype = next(iter(trained.values())).dtype
    base = Models(model, torch.device("cpu"), dtype, on_cpu_first=True).get([name])[name]
    return {**base.state_dict(), **trained}


def _write_diffusers(
    folder: Path, source: ComponentFiles, tensors: Tensors, notes: Mapping[str, str]
) -> Path:
    """Write a module for `from_pretrained` of its library.

    Returns:
        Its file; its index if it has several shards.

    Raises:
        OutputError: the folder cannot be written.
    """
    module = build_empty(source)
    stem = _stem(module)
    shards = _in_shards(tensors, stem)
    single = f"{stem}{_SUFFIX}"
    # Before writing: an old index would combine new shards with old ones.
    _remove_weights(folder, stem, keep=single if single in shards else None)
    for file, names in shards.items():
        write_described(folder / file, {n: tensors[n] for n in names}, notes)
    _write_config(folder / "config.json", source, module)
    if single in shards:
        return folder / single
    files = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": _size(tensors.values())}, "weight_map": files}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    # The index last: it makes the shards a model, and all of them are written by now.
    return write_text(folder / f"{stem}{_INDEX}", text)


def _in_shards(tensors: Tensors, stem: str) -> dict[str, list[str]]:
    """Distribute tensors over files: file name → names of its tensors, in their order.

    `huggingface_hub.split_torch_state_dict_into_shards` is not used: it puts all views of one
    storage into the same shard.
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
    """The start of the weight files' names that the module's library expects."""
    return "model" if isinstance(module, PreTrainedModel) else "diffusion_pytorch_model"


def _remove_weights(folder: Path, stem: str, keep: str | None) -> None:
    """Remove the weight files of an older export from a folder.

    Args:
        stem: the start of their names.
        keep: a file that is about to be replaced anyway.

    Raises:
        OutputError: a file cannot be removed.
    """
    # The index first: without it, a loader does not mistake the remaining shards for a model.
    paths = [*folder.glob(f"{stem}*{_INDEX}"), *folder.glob(f"{stem}*{_SUFFIX}")]
    for path in (p for p in paths if p.name != keep):
        remove_older(path)


def _write_config(path: Path, source: ComponentFiles, module: nn.Module) -> None:
    """Write the config.json that the module's library reads."""
    if isinstance(module, ConfigMixin):
        write_text(path, module.to_json_string())
    elif source.config is not None:  # the config.json that the component was loaded with
        write_text(path, json.dumps(source.config, indent=2) + "\n")
    else:
        assert isinstance(module, PreTrainedModel)
        # `save_pretrained` would set this; without it, nobody knows which class to load.
        module.config.architectures = [type(module).__name__]
        write_text(path, module.config.to_json_string())


def _authors_name(source: ComponentFiles) -> str:
    """The stem of the file that a component was loaded from. The component's folder name, if it was
    loaded from several files, or from a checkpoint of a whole pipeline."""
    single = len(source.files) == 1 and not source.start
    return source.files[0].stem if single else source.component.names.folder


def _exported(path: Path, component: str, target: ExportFormat) -> Exported:
    files = _files(path)
    count = sum(len(read_header(file)) for file in files if file.suffix == _SUFFIX)
    size = sum(file.stat().st_size for file in files)
    return Exported(path, target, (component,), "full", digest_of_files(files), count, size)


def _files(path: Path) -> list[Path]:
    """The files of an export: one file, or an index and the shards that it names.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the index cannot be read.
    """
    if not path.name.endswith(_INDEX):
        return [path]
    index = json.loads(path.read_text(encoding="utf-8"))
    return [path, *(path.parent / file for file in sorted({*index["weight_map"].values()}))]


def verify_full(exported: Exported, model: ResolvedModel) -> None:
    """Check that a module was written whole and matches its config.json. In the authors' layout,
    check that converting it gives the tensors of the diffusers export.

    Raises:
        WeightsError: a file is missing or damaged, or its tensors are wrong.
    """
    files = _whole_files(exported)
    source = model.components[exported.components[0]]
    if exported.format == "authors":
        _verify_authors(exported, source)
        return
    config = read_architecture(exported.path.parent, source.component)
    if config is None:
        raise unloadable(exported, "its config.json is missing, or of another architecture")
    # Built from the exported config on the meta device, as a reader of the export would build it.
    module = build_empty(replace(source, config=config))
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    weights = [file for file in files if file.suffix == _SUFFIX]
    shapes = {name: info.shape for name, info in read_headers(weights).items()}
    wrong = sorted(name for name in shapes if expected.get(name) != shapes[name])
    # transformers does not save a tied weight: the output layer may be the embedding.
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    wrong += sorted(name for name in expected if name not in shapes and name not in tied)
    if wrong:
        raise unloadable(exported, f"tensors differ from the architecture: {wrong[:3]}")
    if len(files) > 1:
        weight_map = json.loads(exported.path.read_text(encoding="utf-8"))["weight_map"]
        if weight_map != {name: file.name for file in weights for name in read_header(file)}:
            raise unloadable(exported, "its index names other tensors than the shards hold")


def _whole_files(exported: Exported) -> list[Path]:
    """The files of an export. Raises `WeightsError` if one is missing or was changed."""
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
    """Compare a file in the authors' layout with the export for diffusers. Raises
    `WeightsError`."""
    folder = exported.path.parents[2] / "diffusers" / source.component.names.folder
    converted = source.component.construction.convert(read_tensors([exported.path]))
    stem = _stem(build_empty(source))
    expected = read_tensors(sorted(folder.glob(f"{stem}*{_SUFFIX}")))
    wrong = sorted(converted.keys() ^ expected.keys())
    both = converted.keys() & expected.keys()
    wrong += sorted(name for name in both if not _equal(converted[name], expected[name]))
    if wrong:
        raise unloadable(exported, f"converted, it is another model: {wrong[:3]}")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
