"""Write the exports of a checkpoint, a file for each module or format, and verify that each file
loads.

exports/<format>/pytorch_lora_weights.safetensors             the LoRAs in a format: see `formats`
exports/<format>/<folder>/pytorch_lora_weights.safetensors    a file for each LoRA, if their names
                                                              are equal: the experts of Wan2.2
exports/diffusers/<folder>/…, exports/authors/<folder>/…      a module trained in full: see `full`
exports/peft/<folder>/adapter_model.safetensors               a LoKr or OFT, for peft: pipelines of
                                                              diffusers do not load them
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
from diffsynth_dagster.formats import FORMATS, NamedTensors, find_format, peft
from diffsynth_dagster.formats.change import difference
from diffsynth_dagster.formats.contract import UnreadableLora
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
    """Split a checkpoint: trained component or part → its tensors, by their names in the module.

    Args:
        removed: the prefix that `remove_prefix_in_ckpt` removed from the names.
        prefixes: trained component or part → the prefix of its names before the removal.
    """
    modules: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        # Names that still begin with `pipe.` belong to components whose prefix was not removed.
        whole = name if name.startswith("pipe.") else removed + name
        owner = next(n for n, start in prefixes.items() if whole.startswith(start))
        modules.setdefault(owner, {})[whole.removeprefix(prefixes[owner])] = tensor
    return modules


def export_run(config: TrainingConfig, record: RunRecord, model: ResolvedModel) -> list[Exported]:
    """Choose a checkpoint and write its exports. Raises what `chosen_checkpoint` and
    `export_checkpoint` do."""
    chosen = chosen_checkpoint(config, record, model.family)
    return export_checkpoint(config, record, model, chosen)


def export_checkpoint(
    config: TrainingConfig, record: RunRecord, model: ResolvedModel, chosen: Chosen
) -> list[Exported]:
    """Write the exports of a checkpoint into `<output_path>/exports/`.

    Equal checkpoints give equal bytes. The headers of an unfinished training's exports say how far
    it was.

    Raises:
        OutputError: the folder cannot be written.
        WeightsError: see `export_full`.
    """
    unfinished = {} if chosen.unfinished is None else {"unfinished": chosen.unfinished}
    provenance = {**record.provenance, "checkpoint": chosen.digest, **unfinished}
    folder = Path(config.output_path) / "exports"
    family = model.family
    whole: dict[str, Tensors] = {}
    loras: dict[str, Lora] = {}
    others: dict[str, Tensors] = {}
    files = checkpoint_files("", family, record.trained, config.remove_prefix_in_ckpt)
    for file, path in zip(files, chosen.paths, strict=True):
        tensors = read_tensors([path])
        trained_in = [name for name in file.trained if name in config.lora_base_model]
        if trained_in and (record.lora or {}).get("method", "lora") == "lora":
            # Plain LoRAs are written in several formats; a DoRA, LoKr or OFT in one.
            own = of_loras(tensors)
            loras |= _loras_of(path, own, family, trained_in)
            tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
        prefixes = {name: family.prefix(name) for name in file.trained}
        for name, modules in split_modules(tensors, file.removed, prefixes).items():
            # Parts of one component make one file.
            kind = others if name in trained_in else whole
            kind.setdefault(family.part(name).of, {}).update(modules)
    order = dict.fromkeys(family.part(name).of for name in record.trained)
    # The main denoiser first: its names may have no prefix in a file.
    order = sorted(order, key=lambda name: name != family.denoiser)
    loras = {name: loras[name] for name in order if name in loras}
    exported: list[Exported] = []
    for name in export_formats(config, family) if loras else ():
        exported += _export_loras(folder / name, model, name, loras, provenance)
    if others:
        exported += _export_adapters(folder, model, others, record, provenance)
    for component, own in whole.items():
        exported += export_full(config, record, model, component, own, provenance)
    _remove_others(folder, exported)
    return exported


def _loras_of(
    path: Path, tensors: Tensors, family: Family, names: Sequence[str]
) -> dict[str, Lora]:
    """The LoRAs in a checkpoint. Raises `WeightsError`."""
    try:
        return loras_in(tensors, read_metadata(path), family, names)[0]
    except UnreadableLora as error:
        raise WeightsError(
            f"the LoRAs of the checkpoint cannot be read: {error}",
            where=str(path.absolute()),
            do="report this with the recipe; the checkpoint is unharmed",
        ) from error


def _remove_others(folder: Path, exported: Sequence[Exported]) -> None:
    """Remove LoRAs in formats that were not written now: their checkpoint may be another one."""
    written = {item.path.parent for item in exported}
    for name in FORMATS:
        for file in (LORA_FILE, PEFT_FILE, peft.CONFIG):
            for path in (folder / name).rglob(file):
                if path.parent not in written:
                    remove_older(path)


def _export_loras(
    folder: Path,
    model: ResolvedModel,
    name: LoraFormat,
    loras: Mapping[str, Lora],
    provenance: Mapping[str, object],
) -> list[Exported]:
    """Write all LoRAs in a format: into one file, unless their tensor names collide."""
    family = model.family
    files = _in_files(model, loras)
    # A file of peft is for one module.
    if name == "peft" and len(loras) > 1:
        files = {family.component(part).names.folder: {part: loras[part]} for part in loras}
    exported: list[Exported] = []
    for place, own in files.items():
        rules = {component: family.lora_rules(component) for component in own}
        spelled = find_format(name).write(own, rules)
        origin = {PROVENANCE_KEY: json.dumps({**provenance, "format": name}, sort_keys=True)}
        file = PEFT_FILE if name == "peft" else LORA_FILE
        # The config of peft is a file beside the weights; other notes go into the header.
        config = spelled.notes.get(peft.CONFIG)
        notes = {key: text for key, text in spelled.notes.items() if key != peft.CONFIG}
        path = write_described(
            folder / place / file, spelled.tensors, {**notes, **origin, "format": "pt"}
        )
        if config is not None:
            write_text(path.parent / peft.CONFIG, config)
        exported.append(replace(_exported(path, own, "lora", name), trained=own))
    return exported


def _in_files(model: ResolvedModel, trained: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """Distribute components over files: folder of a file → component → what is trained in it.

    All go into one file, unless two components have the same prefix in diffusers' files.
    """
    prefixes = [model.family.lora_rules(name).folder for name in trained]
    if len(set(prefixes)) == len(prefixes):
        return {"": dict(trained)}
    return {model.family.component(name).names.folder: {name: trained[name]} for name in trained}


def _export_adapters(
    folder: Path,
    model: ResolvedModel,
    trained: Mapping[str, Tensors],
    record: RunRecord,
    provenance: Mapping[str, object],
) -> list[Exported]:
    """Write a DoRA for the pipelines of diffusers, or a LoKr or OFT for peft."""
    assert record.lora is not None
    if record.lora["method"] != "dora":
        return [
            _export_peft(folder / "peft", model, component, tensors, record, provenance)
            for component, tensors in trained.items()
        ]
    exported: list[Exported] = []
    for place, together in _in_files(model, trained).items():
        tensors: Tensors = {}
        settings: dict[str, object] = {}
        for name, own in together.items():
            start = model.family.lora_rules(name).folder
            tensors |= {f"{start}.{n}": tensor for n, tensor in own.items()}
            settings |= dora_settings(start, own, record.lora["rank"], record.lora["alpha"])
        notes = {
            ADAPTER_KEY: json.dumps(settings, sort_keys=True),
            PROVENANCE_KEY: json.dumps(provenance, sort_keys=True),
            "format": "pt",
        }
        # diffusers takes rank and alpha from the header: DoRA files have no alpha tensors.
        path = write_described(folder / "diffusers" / place / LORA_FILE, tensors, notes)
        exported.append(_exported(path, together, "lora", "diffusers"))
    return exported


def _export_peft(
    folder: Path,
    model: ResolvedModel,
    name: str,
    tensors: Tensors,
    record: RunRecord,
    provenance: Mapping[str, object],
) -> Exported:
    """Write the LoKr or OFT of a component for peft's `PeftModel`."""
    assert record.lora is not None
    target = folder / model.family.component(name).names.folder
    settings = peft_settings(record.lora, sorted({layer_of(tensor) for tensor in tensors}))
    named = {PEFT_START + tensor: values for tensor, values in tensors.items()}
    notes = {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True), "format": "pt"}
    path = write_described(target / PEFT_FILE, named, notes)
    # JSON has no sets; sorted, so that equal trainings give equal bytes.
    values = {n: sorted(v) if isinstance(v, set) else v for n, v in settings.to_dict().items()}
    values["inference_mode"] = True
    write_text(target / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
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
"""Largest relative difference of ΔW, between a LoRA and its copy, that counts as rounding."""


def verify_export(exported: Exported, model: ResolvedModel) -> None:
    """Load an exported file into a module on the meta device, the way the file's tool does.

    Raises:
        WeightsError: the tool refuses the file, or ignores tensors in it, or changes a layer by
            another ΔW than the training.
    """
    if exported.kind == "full":
        verify_full(exported, model)
        return
    assert exported.format != "authors", "which no LoRA has"
    tensors, notes = read_tensors([exported.path]), read_metadata(exported.path)
    # A file with other tensors than A and B is a DoRA, LoKr or OFT.
    if not of_loras(tensors).keys() >= tensors.keys():
        if exported.format == "peft":
            _load_by_peft(exported, model, tensors)
        else:
            _load_dora(exported, model, tensors, notes)
        return
    config = exported.path.parent / peft.CONFIG
    more = {peft.CONFIG: config.read_text(encoding="utf-8")} if exported.format == "peft" else {}
    spelled = NamedTensors(tensors, {**notes, **more})
    rules = {name: model.family.lora_rules(name) for name in exported.components}
    for name in exported.components:
        module = build_empty(model.components[name])
        try:
            loaded = find_format(exported.format).try_load(spelled, name, module, rules)
        except UnreadableLora as error:
            raise unloadable(exported, str(error)) from error
        trained = exported.trained.get(name, loaded)
        # ΔW = s B A is compared, not A and B: a format may move the scale into them.
        deviation = difference(trained, loaded)
        if deviation > ROUNDING:
            raise unloadable(
                exported,
                f"it changes a layer of {name} by {deviation:.1e} of the change more or less",
            )


def _load_dora(
    exported: Exported, model: ResolvedModel, tensors: Tensors, notes: Mapping[str, str]
) -> None:
    """Load a DoRA as diffusers does. Raises `WeightsError`: it is refused, or tensors ignored."""
    taken = 0
    for name in exported.components:
        module = build_empty(model.components[name])
        try:
            settings = json.loads(notes[ADAPTER_KEY])
            model.family.lora_rules(name).load(module, tensors, settings)
        except REFUSALS as error:
            raise unloadable(exported, str(error)) from error
        taken += sum(".lora_" in n for n, _ in module.named_parameters())
    # diffusers skips unknown names with no more than a warning, so the loaded ones are counted.
    if taken != len(tensors):
        raise unloadable(exported, f"it takes {taken} of {len(tensors)} tensors")


def _load_by_peft(exported: Exported, model: ResolvedModel, tensors: Tensors) -> None:
    """Load a file as peft does. Raises `WeightsError` if that refuses it or ignores tensors."""
    module = build_empty(model.components[exported.components[0]])
    try:
        settings = PeftConfig.from_pretrained(str(exported.path.parent))
        # low_cpu_mem_usage: the layers of the adapter are made on the meta device too.
        inject_adapter_in_model(settings, module, ADAPTER, low_cpu_mem_usage=True)
        loaded: Any = set_peft_model_state_dict(module, tensors, ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, KeyError, RuntimeError, TypeError, AssertionError) as error:
        raise unloadable(exported, str(error)) from error
    # The file has no base weights, so those are always among the missing keys.
    wrong = [*filter(is_adapter, loaded.missing_keys), *loaded.unexpected_keys]
    if wrong:
        raise unloadable(exported, f"tensors are missing or unknown: {wrong[:3]}")
