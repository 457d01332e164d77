"""Split the chosen checkpoint into one file for each module, in the layout of diffusers.

exports/<format>/pytorch_lora_weights.safetensors              LoRAs in a format: see `formats`
exports/<format>/<folder>/pytorch_lora_weights.safetensors     one each, where a file cannot hold
                                                               them all: the experts of Wan2.2
exports/diffusers/<folder>/…, exports/authors/<folder>/…       a module trained in full: see `full`
exports/peft/<folder>/adapter_model.safetensors                a LoKr or OFT, which diffusers'
                                                               pipelines do not load, for peft
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.export.chosen import Chosen, chosen_checkpoint
from diffsynth_dagster.export.exported import Exported, remove_older, unloadable
from diffsynth_dagster.export.full import export_full, verify_full
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.lora import Lora, LoraFormat
from diffsynth_dagster.files import write_text
from diffsynth_dagster.formats import FORMATS, Spelled, find_format, peft
from diffsynth_dagster.formats.change import difference
from diffsynth_dagster.formats.contract import Unread
from diffsynth_dagster.formats.diffusers import ADAPTER_KEY, REFUSALS, dora_settings
from diffsynth_dagster.formats.reading import of_loras
from diffsynth_dagster.run.record import RunRecord
from diffsynth_dagster.training.adapters import ADAPTER, is_adapter, peft_settings
from diffsynth_dagster.training.checkpoint import checkpoint_files
from diffsynth_dagster.training.lora_formats import export_formats
from diffsynth_dagster.weights.adapter_files import PEFT_START, layer_of
from diffsynth_dagster.weights.header import read_header, read_metadata
from diffsynth_dagster.weights.load import build_empty, read_tensors
from diffsynth_dagster.weights.lora import PROVENANCE_KEY, loras_in
from diffsynth_dagster.weights.model_spec import write_described
from diffsynth_dagster.weights.resolved import ResolvedModel

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
_T = TypeVar("_T")


def split_modules(
    tensors: Mapping[str, torch.Tensor], removed: str, prefixes: Mapping[str, str]
) -> dict[str, Tensors]:
    """Split a checkpoint: trained component or part → its tensors by the names of the module.

    Args:
        removed: the prefix that `remove_prefix_in_ckpt` removed from the names.
        prefixes: trained component or part → how its names started before.
    """
    modules: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        whole = name if name.startswith("pipe.") else removed + name
        owner = next(n for n, start in prefixes.items() if whole.startswith(start))
        modules.setdefault(owner, {})[whole.removeprefix(prefixes[owner])] = tensor
    return modules


def export_run(config: TrainingConfig, record: RunRecord, found: ResolvedModel) -> list[Exported]:
    """Choose a checkpoint of a training and write its exports. Raises: see the two functions."""
    chosen = chosen_checkpoint(config, record, found.family)
    return export_checkpoint(config, record, found, chosen)


def export_checkpoint(
    config: TrainingConfig, record: RunRecord, found: ResolvedModel, chosen: Chosen
) -> list[Exported]:
    """Write the exports of a checkpoint into `<output_path>/exports/`.

    Equal checkpoints give equal bytes, unless the training is unfinished: then the files say so.

    Raises:
        OutputError: the folder cannot be written.
        WeightsError: see `export_full`.
    """
    unfinished = {} if chosen.unfinished is None else {"unfinished": chosen.unfinished}
    provenance = {**record.provenance, "checkpoint": chosen.digest, **unfinished}
    folder = Path(config.output_path) / "exports"
    family = found.family
    whole: dict[str, Tensors] = {}
    loras: dict[str, Lora] = {}
    others: dict[str, Tensors] = {}
    files = checkpoint_files("", family, record.trained, config.remove_prefix_in_ckpt)
    for file, path in zip(files, chosen.paths, strict=True):
        tensors = read_tensors([path])
        trained_in = [name for name in file.trained if name in config.lora_base_model]
        if trained_in and (record.lora or {}).get("method", "lora") == "lora":
            own = of_loras(tensors)
            loras |= _loras_of(path, own, family, trained_in)
            tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
        prefixes = {name: family.prefix(name) for name in file.trained}
        for name, modules in split_modules(tensors, file.removed, prefixes).items():
            # Parts of one component make one file.
            kind = others if name in trained_in else whole
            kind.setdefault(family.part(name).of, {}).update(modules)
    order = dict.fromkeys(family.part(name).of for name in record.trained)
    # The one that a file names without a start comes first.
    order = sorted(order, key=lambda name: name != family.denoiser)
    loras = {name: loras[name] for name in order if name in loras}
    exported: list[Exported] = []
    for name in export_formats(config, family) if loras else ():
        exported += _export_loras(folder / name, found, name, loras, provenance)
    if others:
        exported += _export_adapters(folder, found, others, record, provenance)
    for component, own in whole.items():
        exported += export_full(config, record, found, component, own, provenance)
    _remove_others(folder, exported)
    return exported


def _loras_of(
    path: Path, tensors: Tensors, family: Family, names: Sequence[str]
) -> dict[str, Lora]:
    """The LoRAs in a checkpoint. Raises `WeightsError`."""
    try:
        return loras_in(tensors, read_metadata(path), family, names)[0]
    except Unread as error:
        raise WeightsError(
            f"the LoRAs of the checkpoint cannot be read: {error}",
            where=str(path.absolute()),
            do="report this with the recipe; the checkpoint is unharmed",
        ) from error


def _remove_others(folder: Path, exported: Sequence[Exported]) -> None:
    """Remove the LoRAs of earlier exports in formats that are no longer asked for: they may be of another
    checkpoint."""
    written = {item.path.parent for item in exported}
    for name in FORMATS:
        for file in (LORA_FILE, PEFT_FILE, peft.CONFIG):
            for path in (folder / name).rglob(file):
                if path.parent not in written:
                    remove_older(path)


def _export_loras(
    folder: Path,
    found: ResolvedModel,
    name: LoraFormat,
    loras: Mapping[str, Lora],
    provenance: Mapping[str, object],
) -> list[Exported]:
    """Write the LoRAs of some components in a format: into one file, unless two would have equal names."""
    family = found.family
    files = _in_files(found, loras)
    if name == "peft" and len(loras) > 1:
        files = {family.component(part).names.folder: {part: loras[part]} for part in loras}
    exported: list[Exported] = []
    for place, own in files.items():
        rules = {component: family.lora_rules(component) for component in own}
        spelled = find_format(name).write(own, rules)
        said = {PROVENANCE_KEY: json.dumps({**provenance, "format": name}, sort_keys=True)}
        file = PEFT_FILE if name == "peft" else LORA_FILE
        config = spelled.notes.get(peft.CONFIG)
        notes = {key: text for key, text in spelled.notes.items() if key != peft.CONFIG}
        path = write_described(
            folder / place / file, spelled.tensors, {**notes, **said, "format": "pt"}
        )
        if config is not None:
            write_text(path.parent / peft.CONFIG, config)
        exported.append(replace(_exported(path, own, "lora", name), trained=own))
    return exported


def _in_files(found: ResolvedModel, trained: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """Folder of a file → component → what is trained. All in one, unless two would have equal names."""
    starts = [found.family.lora_rules(name).folder for name in trained]
    if len(set(starts)) == len(starts):
        return {"": dict(trained)}
    return {found.family.component(name).names.folder: {name: trained[name]} for name in trained}


def _export_adapters(
    folder: Path,
    found: ResolvedModel,
    trained: Mapping[str, Tensors],
    record: RunRecord,
    provenance: Mapping[str, object],
) -> list[Exported]:
    """Write a DoRA as diffusers' pipelines load it, and LoKr and OFT for peft."""
    assert record.lora is not None
    if record.lora["method"] != "dora":
        return [
            _export_peft(folder / "peft", found, component, tensors, record, provenance)
            for component, tensors in trained.items()
        ]
    exported: list[Exported] = []
    for place, together in _in_files(found, trained).items():
        tensors: Tensors = {}
        settings: dict[str, object] = {}
        for name, own in together.items():
            start = found.family.lora_rules(name).folder
            tensors |= {f"{start}.{n}": tensor for n, tensor in own.items()}
            settings |= dora_settings(start, own, record.lora["rank"], record.lora["alpha"])
        notes = {
            ADAPTER_KEY: json.dumps(settings, sort_keys=True),
            PROVENANCE_KEY: json.dumps(provenance, sort_keys=True),
            "format": "pt",
        }
        path = write_described(folder / "diffusers" / place / LORA_FILE, tensors, notes)
        exported.append(_exported(path, together, "lora", "diffusers"))
    return exported


def _export_peft(
    folder: Path,
    found: ResolvedModel,
    name: str,
    tensors: Tensors,
    record: RunRecord,
    provenance: Mapping[str, object],
) -> Exported:
    """Write what is trained in the layers of a component as peft's `PeftModel` loads it."""
    assert record.lora is not None
    target = folder / found.family.component(name).names.folder
    settings = peft_settings(record.lora, sorted({layer_of(tensor) for tensor in tensors}))
    named = {PEFT_START + tensor: values for tensor, values in tensors.items()}
    notes = {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True), "format": "pt"}
    path = write_described(target / PEFT_FILE, named, notes)
    said = {n: sorted(v) if isinstance(v, set) else v for n, v in settings.to_dict().items()}
    said["inference_mode"] = True
    write_text(target / "adapter_config.json", json.dumps(said, indent=2, sort_keys=True) + "\n")
    return _exported(path, [name], "lora", "peft")


def _exported(path: Path, components: Iterable[str], kind: str, target: LoraFormat) -> Exported:
    header = read_header(path)
    return Exported(
        path,
        target,
        tuple(components),
        kind,
        digest_file(path),
        len(header),
        path.stat().st_size,
    )


ROUNDING = 1e-5
"""The largest relative difference of the change of a layer that counts as rounding."""


def verify_export(exported: Exported, found: ResolvedModel) -> None:
    """Load an exported file the way the tool it is for does, into a module on the meta device.

    Raises:
        WeightsError: that tool's loader refuses it, or leaves tensors out, or would change a layer in
            another way than the training did.
    """
    if exported.kind == "full":
        verify_full(exported, found)
        return
    assert exported.format != "authors", "which no LoRA has"
    tensors, notes = read_tensors([exported.path]), read_metadata(exported.path)
    if not of_loras(tensors).keys() >= tensors.keys():
        if exported.format == "peft":
            _load_by_peft(exported, found, tensors)
        else:
            _load_dora(exported, found, tensors, notes)
        return
    config = exported.path.parent / peft.CONFIG
    more = {peft.CONFIG: config.read_text(encoding="utf-8")} if exported.format == "peft" else {}
    spelled = Spelled(tensors, {**notes, **more})
    rules = {name: found.family.lora_rules(name) for name in exported.components}
    for name in exported.components:
        module = build_empty(found.components[name])
        try:
            loaded = find_format(exported.format).try_load(spelled, name, module, rules)
        except Unread as error:
            raise unloadable(exported, str(error)) from error
        trained = exported.trained.get(name, loaded)
        apart = difference(trained, loaded)
        if apart > ROUNDING:
            raise unloadable(
                exported, f"it changes a layer of {name} by {apart:.1e} of the change more or less"
            )


def _load_dora(
    exported: Exported, found: ResolvedModel, tensors: Tensors, notes: Mapping[str, str]
) -> None:
    """Load a DoRA as diffusers does. Raises `WeightsError`: it leaves tensors out."""
    taken = 0
    for name in exported.components:
        module = build_empty(found.components[name])
        try:
            settings = json.loads(notes[ADAPTER_KEY])
            found.family.lora_rules(name).load(module, tensors, settings)
        except REFUSALS as error:
            raise unloadable(exported, str(error)) from error
        taken += sum(".lora_" in n for n, _ in module.named_parameters())
    if taken != len(tensors):
        raise unloadable(exported, f"it takes {taken} of {len(tensors)} tensors")


def _load_by_peft(exported: Exported, found: ResolvedModel, tensors: Tensors) -> None:
    """Load an exported file as peft does. Raises `WeightsError`: it leaves tensors out."""
    module = build_empty(found.components[exported.components[0]])
    try:
        settings = PeftConfig.from_pretrained(str(exported.path.parent))
        inject_adapter_in_model(settings, module, ADAPTER, low_cpu_mem_usage=True)
        loaded: Any = set_peft_model_state_dict(module, tensors, ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, KeyError, RuntimeError, TypeError, AssertionError) as error:
        raise unloadable(exported, str(error)) from error
    wrong = [*filter(is_adapter, loaded.missing_keys), *loaded.unexpected_keys]
    if wrong:
        raise unloadable(exported, f"tensors are missing or unknown: {wrong[:3]}")
