"""`exports/README.md`: what was trained on what, and how each exported file is used, as a model card of
the Hugging Face hub."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from diffsynth_dagster.config.output import TABLES
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe import dump_config, read_values
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.export.chosen import Chosen
from diffsynth_dagster.export.curve import loss_svg
from diffsynth_dagster.export.exported import Exported
from diffsynth_dagster.export.loading import how_to_load
from diffsynth_dagster.facts import digest_text
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.files import write_text
from diffsynth_dagster.own_names import OLDER
from diffsynth_dagster.run.record import PICTURES, RunRecord
from diffsynth_dagster.run.up_to_date import changed_beside
from diffsynth_dagster.weights.header import read_header
from diffsynth_dagster.weights.resolved import ResolvedModel

CARD, CURVE = "README.md", "loss.svg"
_MARK = "<!-- diffsynth-dagster: this card is written anew by each export, unless it is edited: {} -->\n"
_MARKED = re.compile(r"(?s)(.*)" + re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{64})"))
_FRONT = re.compile(r"(?s)\A---\n.*?\n---\n")
_HUB_ENTRY = re.compile(r"[\w.-]+/[\w.-]+:.*")
_METHODS = {"lora": "a LoRA", "dora": "a DoRA", "lokr": "a LoKr", "oft": "OFT"}
_OF_THE_MACHINE = ("output_path", "cache_path")
_PATHS = ("fp8_models", "resume_from_checkpoint", "lora_checkpoint", "template_model_id_or_path")
"""Parameters that name files or folders, beside those whose names say so."""


@dataclass(frozen=True)
class Card:
    """The model card of a training.

    Attributes:
        path: its file.
        text: as it is now made, whether it was written or not.
        kept: whether one that a person has edited was left in its place.
    """

    path: Path
    text: str
    kept: bool

    @property
    def shown(self) -> str:
        """The text for a page that has no files beside it: without front matter, pictures and mark."""
        body = _FRONT.sub("", _MARKED.sub(r"\1", self.text))
        return re.sub(r"(?m)^!\[.*\n\n?", "", body).strip() + "\n"


def write_card(
    config: TrainingConfig,
    record: RunRecord,
    found: ResolvedModel,
    chosen: Chosen,
    files: Sequence[Exported],
) -> Card:
    """Write the card of a training beside its exports, and its loss curve. Equal trainings of folders of
    one name have equal cards.

    Args:
        config: of the training, for a run folder without a `config.yaml`.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(config.output_path)
    recipe = _recipe(folder, config)
    changed = changed_beside(folder, record)
    metrics = folder / "metrics.csv"
    curve = None if metrics in changed else loss_svg(metrics)
    parts = [
        _front_matter(config, record, found),
        f"# {_plain(_title(folder))}",
        _training(config, record, chosen, recipe),
        _base(record, found),
        _samples(folder, record, changed),
        "" if curve is None else f"## Loss\n\n![The loss of each step, and its mean]({CURVE})",
        _usage(folder / "exports", files, found.family),
        _said_recipe(recipe),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    card = text + _MARK.format(digest_text(text))
    path = folder / "exports" / CARD
    if curve is not None:
        write_text(path.with_name(CURVE), curve)
    kept = path.exists() and not _is_ours(path)
    if not kept:
        write_text(path, card)
    return Card(path, card, kept)


def _is_ours(path: Path) -> bool:
    """Whether a card is as it was written here."""
    try:
        marked = _MARKED.fullmatch(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return marked is not None and digest_text(marked[1]) == marked[2]


def _title(folder: Path) -> str:
    """The name of the run folder; for an older training, of the one that it lies in."""
    place = folder.absolute()
    older = OLDER.fullmatch(f"{place.parent.name}/{place.name}")
    return (place.parent.parent if older else place).name or "model"


def _recipe(folder: Path, config: TrainingConfig) -> dict[str, Any]:
    """The parameters of a training that are not left at their defaults, as its `config.yaml` says."""
    try:
        values, _ = read_values(folder / "config.yaml")
    except ParameterError:  # there is none, or of another version
        values = yaml.safe_load(dump_config(config))
    defaults = yaml.safe_load(dump_config(TrainingConfig()))
    return {name: v for name, v in values.items() if name not in defaults or v != defaults[name]}


def _front_matter(config: TrainingConfig, record: RunRecord, found: ResolvedModel) -> str:
    owners = dict.fromkeys(found.family.part(name).of for name in record.trained)
    repositories = [found.components[name].entry.repository for name in owners]
    bases = list(dict.fromkeys(r for r in repositories if r is not None))
    tags = ["diffsynth-dagster", record.family]
    tags += [str(record.lora.get("method", "lora"))] if record.lora is not None else []
    tags += ["full-training"] if _in_full(config, record) else []
    said = {
        **({"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}),
        "library_name": "diffusers",
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---"


def _in_full(config: TrainingConfig, record: RunRecord) -> list[str]:
    """The components and parts whose own weights are trained."""
    return [name for name in record.trained if name not in config.lora_base_model]


def _training(
    config: TrainingConfig, record: RunRecord, chosen: Chosen, recipe: Mapping[str, Any]
) -> str:
    """What was trained, how far, and on what."""
    trained = [f"{_code(name)} in full" for name in _in_full(config, record)]
    if record.lora is not None:
        method = _METHODS[record.lora.get("method", "lora")]
        facts = [f"{name} {value}" for name, value in record.lora.items() if name != "method"]
        said = f"through {method} ({', '.join(facts)})"
        trained += [f"{_code(name)} {said}" for name in config.lora_base_model]
    lines = {
        "Family": _code(record.family),
        "Trained": "; ".join(trained),
        "Steps": f"{record.total_steps or record.steps:,}",
        "Checkpoint": ", ".join(_code(path.name) for path in chosen.paths),
        "Rows": f"{record.samples:,}, with the digest {_code(record.samples_digest)}",
        "Resolution": _resolution(recipe),
        "Trainer": f"diffsynth-dagster {record.version}",
    }
    if record.first_loss is not None and record.final_loss is not None:
        lines["Loss"] = (
            f"{record.first_loss:.4g} in the first step, {record.final_loss:.4g} in the last"
        )
    unfinished = (
        f"This training is unfinished: its weights are those of {chosen.unfinished}.\n\n"
        if chosen.unfinished is not None
        else ""
    )
    return (
        f"{unfinished}## Training\n\n{_listed(f'{name}: {text}' for name, text in lines.items())}"
    )


def _resolution(recipe: Mapping[str, Any]) -> str:
    """The size that samples were trained at."""
    height, width, frames = (recipe.get(name) for name in ("height", "width", "num_frames"))
    if height is not None and width is not None:
        size = f"{width} × {height} pixels"
    else:
        most = recipe.get("max_pixels", TrainingConfig().max_pixels)
        size = f"each sample in its own size, up to {most:,} pixels"
    return size if frames is None else f"{size}, {frames} frames"


def _base(record: RunRecord, found: ResolvedModel) -> str:
    """The weights that the training began with."""
    lines: list[str] = []
    for name, digest in record.base.items():
        source = found.components.get(name)
        if source is None:
            told = _code(found.tokenizers[name].name) if name in found.tokenizers else ""
        elif source.entry.repository is not None:
            told = _code(source.entry.text)
        else:
            told = ", ".join(_code(path.name) for path in source.files)
        lines.append(f"{_code(name)}: {told}{', ' * bool(told)}BLAKE3 {_code(digest)}")
    return f"## Base weights\n\n{_listed(lines)}"


def _samples(folder: Path, record: RunRecord, changed: Sequence[Path]) -> str:
    """The newest samples of each kind, where their files are as they were written."""
    steps = [name for name in record.pictures if name.startswith("step-")]
    after = [name for name in record.pictures if name.startswith("after-")]
    clips = [name for name in record.clips if steps and name.startswith(f"{steps[-1]}-")]
    lines: list[str] = []
    for name in [*steps[-1:], *after, *clips]:
        file = {**record.pictures, **record.clips}[name]
        path = folder / PICTURES / file
        if path.is_file() and path not in changed:
            lines.append(
                f"{'!' * (name not in clips)}[{_plain(name)}](../{PICTURES}/{quote(file)})"
            )
    return "\n\n".join(["## Samples", *lines]) if lines else ""


def _usage(exports: Path, files: Sequence[Exported], family: Family) -> str:
    """How each exported file is loaded."""
    parts = ["## Use", "The paths start at the folder of this file."]
    for item in files:
        name = item.path.relative_to(exports).as_posix()
        parts.append(f"### {_code(name)}")
        if item.format != "authors":
            line = how_to_load(item, family, exports)
            parts.append(f"diffusers:\n\n{_block(line, 'python')}")
        parts += _in_other_tools(item, name, family)
    return "\n\n".join(parts)


def _in_other_tools(item: Exported, name: str, family: Family) -> Iterator[str]:
    """How ComfyUI and DiffSynth-Studio take an exported file, as far as that is known."""
    component = family.component(item.components[0])
    rules = component.names.lora
    if item.kind == "full":
        place = _comfyui_folder(component.name, component.names.folder, family)
        if item.format == "authors" or _has_authors_names(item, rules):
            yield f"ComfyUI: copy {_code(name)} into {_code(f'models/{place}')}."
        if item.format == "authors":
            yield "DiffSynth-Studio: name it in the place of the file that the model was loaded from."
        return
    if rules is None or item.format == "peft" or not item.trained:
        return
    if item.format in rules.read_by_comfyui:
        yield f"ComfyUI: copy {_code(name)} into {_code('models/loras')}."
    else:
        formats = " or ".join(_code(name) for name in rules.read_by_comfyui)
        yield f"ComfyUI does not read this format: it reads {formats} (`export_formats`)."
    if item.format in rules.read_by_guide:
        yield f"DiffSynth-Studio: {_code(f'pipe.load_lora(pipe.{component.name}, ...)')} with this file."


def _has_authors_names(item: Exported, rules: LoraRules | None) -> bool:
    """Whether a single file in the layout of diffusers has the names of the authors as well, as far as
    these are known: those of Qwen-Image are the same."""
    if rules is None or rules.authors is None or item.path.suffix != ".safetensors":
        return False
    layers = {name.rpartition(".")[0] for name in read_header(item.path)}
    return all(rules.authors.theirs(layer) in (layer, None) for layer in layers)


def _comfyui_folder(name: str, folder: str, family: Family) -> str:
    """The folder under `models/` in which ComfyUI looks for a component."""
    if any(name == denoiser.component for denoiser in family.denoisers):
        return "diffusion_models"
    starts = {"text_encoder": "text_encoders", "vae": "vae", "controlnet": "controlnet"}
    return next(
        (place for start, place in starts.items() if folder.startswith(start)), "checkpoints"
    )


def _said_recipe(recipe: Mapping[str, Any]) -> str:
    """The recipe in a block, with the names of files alone."""
    values = {n: _nameless(n, v) for n, v in recipe.items() if n not in _OF_THE_MACHINE}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()
    said = "What is left at its default is left out, and of paths all but the last name."
    return f"## Recipe\n\n{said}\n\n{_block(text, 'yaml')}"


def _nameless(name: str, value: Any) -> Any:
    """A value of a parameter without the folders of the machine that it names."""
    texts = value if isinstance(value, list) else [value]
    table = name == "sample_prompts" and len(texts) == 1 and str(texts[0]).endswith(TABLES)
    if not (table or name in _PATHS or name.endswith(("_path", "_paths"))):
        return value
    if isinstance(value, list):
        return [_nameless("_path", item) for item in value]
    if not isinstance(value, str) or _HUB_ENTRY.fullmatch(value):
        return value
    return next((part for part in reversed(re.split(r"[\\/]", value)) if part), value)


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(text: str) -> str:
    """A name as text in which nothing is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _fence(text: str, least: int) -> str:
    """More backticks than stand together in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _code(text: str) -> str:
    """A name as code."""
    text = " ".join(text.split())
    fence = _fence(text, 1)
    space = " " * (len(fence) > 1)
    return f"{fence}{space}{text}{space}{fence}"


def _block(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"
