"""Find the model of a config: its files, family, tokenizers and preset LoRA."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffsynth_dagster.config.entries import (
    ModelEntry,
    float8_entries,
    folder_entry,
    model_entries,
)
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, WeightsError, nearest, reason_of
from diffsynth_dagster.families import family_names, family_of, find_family
from diffsynth_dagster.families.contract import Family, Settings, Tokenizer
from diffsynth_dagster.weights.contents import Contents
from diffsynth_dagster.weights.header import read_headers
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.recognise import (
    below,
    guess_components,
    read_architecture,
    read_schedule,
    recognise_components,
    recognise_family,
)
from diffsynth_dagster.weights.resolved import (
    ComponentFiles,
    Preset,
    ResolvedModel,
    Storage,
    as_used,
    resolve,
)


def find_model(config: TrainingConfig, hub: ModelHub) -> ResolvedModel:
    """Locate every file of the model list and recognise which component each is.

    Raises:
        WeightsError: a file is missing or of an unknown kind, or two entries are the same
            component.
        DownloadError: a file could not be downloaded.
        ParameterError: the files fit several families, or the family refuses the config.
    """
    contents = Contents(again=config.verify_content)
    family, found = _find_components(config, hub, contents)
    model = resolve(config, family, _schedule(family, found), found)
    needed = _needed_tokenizers(config, model)
    return replace(
        model,
        tokenizers={t.name: _find_tokenizer(t, config, found, hub) for t in needed},
        storage=_storage(config, found),
        presets=_presets(config, family, found),
        contents=contents,
    )


def _schedule(family: Family, found: Mapping[str, ComponentFiles]) -> Settings:
    """The published scheduler settings of the denoiser. Raises: see `read_schedule`."""
    if family.denoiser not in found:
        return {}
    denoiser = found[family.denoiser]
    # `denoiser.header` has the denoiser's tensors only; marks of the scheduler are beside them.
    whole = read_headers(denoiser.files) if denoiser.start else denoiser.header
    return read_schedule(denoiser.files[0].parent, whole, family)


def _find_components(
    config: TrainingConfig, hub: ModelHub, contents: Contents
) -> tuple[Family, dict[str, ComponentFiles]]:
    """The family as the config uses it, and component → its files. Raises: see `find_model`."""
    entries = model_entries(config)
    files = {entry: tuple(hub.files(entry)) for entry in entries}
    # Before any header is read: see `Contents.note`.
    for entry in entries:
        contents.note(files[entry])
        contents.note(filter(Path.is_file, {f.parent / "config.json" for f in files[entry]}))
    headers = {entry: read_headers(files[entry]) for entry in entries}
    family = find_family(config.family) if config.family else recognise_family(headers)
    parts = [
        ComponentFiles(
            place.component,
            entry,
            files[entry],
            below(headers[entry], place.start),
            read_architecture(files[entry][0].parent, place.component),
            place.start,
        )
        for entry in entries
        for place in recognise_components(headers[entry], family, entry)
    ]
    found = _each_once(_assign_experts(parts, family))
    family = _as_used(family, config, found)
    # The config may change a component's architecture (more input channels, for example).
    found = {name: replace(f, component=family.component(name)) for name, f in found.items()}
    return family, found


def _as_used(family: Family, config: TrainingConfig, found: Mapping[str, ComponentFiles]) -> Family:
    """The family as the config uses it with these files.

    Raises:
        ParameterError: see `check_trainable`, or the family refuses the config.
        WeightsError: tensors that the family reads settings from are missing or have odd shapes.
    """
    check_trainable(config, family)
    given = {name: f.shapes for name, f in found.items()}
    try:
        return as_used(family, config, given)
    # A family computes settings from shapes; this is what missing or odd shapes raise there.
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise WeightsError(
            f"the files are not whole models of {family.name}: {reason_of(error)}",
            where=", ".join(f.entry.text for f in found.values()),
            do="name every shard of each model and nothing else",
        ) from error


def _assign_experts(parts: Sequence[ComponentFiles], family: Family) -> list[ComponentFiles]:
    """Tell experts apart by their paths: their tensor names are identical (Wan2.2)."""
    counts = Counter(part.component.name for part in parts)
    assigned: list[ComponentFiles] = []
    for part in parts:
        by_path = [
            component
            for component in family.components
            if counts[part.component.name] > 1  # a single expert is the first, whatever its path
            and component.recognition.signatures == part.component.recognition.signatures
            and any(mark in part.entry.text for mark in component.recognition.path_marks)
        ]
        assigned.append(replace(part, component=by_path[0]) if by_path else part)
    return assigned


def _each_once(parts: Sequence[ComponentFiles]) -> dict[str, ComponentFiles]:
    """Component → its files. Separate files replace the same component in a whole checkpoint.

    Raises:
        WeightsError: two entries are the same component.
    """
    found: dict[str, ComponentFiles] = {}
    for part in parts:
        name = part.component.name
        earlier = found.get(name)
        # A component with a `start` is in a whole checkpoint.
        if earlier is not None and bool(earlier.start) == bool(part.start):
            raise WeightsError(
                f"two entries are the component '{name}'",
                where=f"{earlier.entry.text} and {part.entry.text}",
                do="name each model once; shards of one model go into one pattern or nested list; "
                "of two experts, the path of the second says which it is, as low_noise_model does",
            )
        if earlier is None or earlier.start:
            found[name] = part
    return found


def _needed_tokenizers(config: TrainingConfig, model: ResolvedModel) -> list[Tokenizer]:
    """The tokenizers to find: those of the training step if the captions are already encoded, else
    all of the family."""
    # Captions of sample images, and an evaluation of the user's own, are encoded during training.
    if not config.reads_encoded or config.makes_samples or config.customized_evaluation:
        return list(model.family.tokenizers)
    used = {name for stage in model.step_stages for name in stage.uses}
    return [tokenizer for tokenizer in model.family.tokenizers if tokenizer.name in used]


def _storage(config: TrainingConfig, found: Mapping[str, ComponentFiles]) -> dict[str, Storage]:
    """Component → "float8" if `fp8_models` names its entry, else "full". Raises
    `ParameterError`."""
    entries = float8_entries(config)
    return {name: "float8" if files.entry in entries else "full" for name, files in found.items()}


def check_trainable(config: TrainingConfig, family: Family) -> None:
    """Check that every model that is trained or gets a LoRA is one of the family's.

    Raises:
        ParameterError: a name is not.
    """
    named = [("trainable_models", name) for name in config.trainable_models]
    named += [("lora_base_model", name) for name in config.lora_base_model]
    named.append(("preset_lora_model", config.preset_lora_model or family.denoiser))
    for parameter, name in named:
        if name not in family.trainable:
            hint = nearest(name, family.trainable)
            raise ParameterError(
                f"{family.name} has no model '{name}'" + (f"; {hint}" if hint else ""),
                where=parameter,
                do=f"its models are {', '.join(family.trainable)}",
            )


def _presets(
    config: TrainingConfig, family: Family, found: Mapping[str, ComponentFiles]
) -> Mapping[str, Preset]:
    """The component that `preset_lora_path` is fused into → the LoRA; empty without the parameter.

    Raises:
        WeightsError: the model list does not have the component, or the LoRA file does not exist.
    """
    if config.preset_lora_path is None:
        return {}
    trained = config.preset_lora_model or family.denoiser
    name = family.part(trained).of
    path = Path(config.preset_lora_path)
    if name not in found:
        raise WeightsError(
            f"the model list lacks the component '{name}'",
            where="preset_lora_model",
            do="add its files to the model list",
        )
    if not path.is_file():
        raise WeightsError(
            "the LoRA file does not exist",
            where=f"preset_lora_path = {path.absolute()}",
            do="correct the path",
        )
    return {name: Preset(trained, path)}


def guess_model(config: TrainingConfig) -> ResolvedModel:
    """The model of a config whose files may not exist yet: the result has no files.

    Raises:
        ParameterError: the family is not clear, or refuses the config.
    """
    return resolve(config, _guess_family(config))


def _guess_family(config: TrainingConfig) -> Family:
    """The family as a config uses it, from name, repositories or files. Raises `ParameterError`."""
    entries = model_entries(config)
    # From the cheapest to the most expensive: a parameter, the repository's name, files' headers.
    if config.family:
        return _guessed(find_family(config.family), config, entries)
    named = family_of(e.repository or e.paths[0] for e in entries)
    if named is not None:
        return _guessed(find_family(named), config, entries)
    hub = ModelHub(Path(), skip_download=True)
    try:
        return _find_components(config, hub, Contents())[0]
    except WeightsError as error:
        raise ParameterError(
            f"the family is not clear without the files ({error.what})",
            where="family",
            do=f"give the family: one of {', '.join(family_names())}",
        ) from error


def _guessed(family: Family, config: TrainingConfig, entries: Sequence[ModelEntry]) -> Family:
    """The family as a config uses it, with components guessed from the text of the model list."""
    check_trainable(config, family)
    names = guess_components(entries, family)
    return as_used(family, config, {name: {} for name in names if name is not None})


def _find_tokenizer(
    tokenizer: Tokenizer, config: TrainingConfig, found: Mapping[str, ComponentFiles], hub: ModelHub
) -> Path:
    """The folder of a tokenizer: the one that its parameter names, else one beside the model's
    files, else the published one. Raises `WeightsError` or `DownloadError`."""
    given = getattr(config, tokenizer.parameter)
    if given is not None:
        return hub.folder(folder_entry(given, tokenizer.parameter))
    published = tokenizer.default.partition(":")[2]
    # Downloads are not searched while the hub may be contacted: a download may be incomplete, and
    # `hub.folder` completes it.
    local = [f for f in found.values() if f.entry.repository is None or hub.skip_download]
    for beside in (files.files[0].parent for files in local):
        # In diffusers' layout the tokenizer is beside the component's folder, in the authors'
        # layout beside its files.
        for folder in (beside.parent / tokenizer.name, beside / tokenizer.name, beside / published):
            if folder.is_dir():
                return folder
    return hub.folder(folder_entry(tokenizer.default, tokenizer.parameter))
