"""`exports/README.md`: a Hugging Face model card. It says what was trained, on which data, and how
to load each exported file."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.config.recipe import dump_config, read_values
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.export.chosen import Chosen
from diffsynth_dagster.export.exported import Exported
from diffsynth_dagster.export.loading import how_to_load
from diffsynth_dagster.facts import digest_text
from diffsynth_dagster.families.contract import Family
from diffsynth_dagster.families.lora import LoraRules
from diffsynth_dagster.files import write_text
from diffsynth_dagster.own_names import OLDER
from diffsynth_dagster.report.metrics import read_metrics
from diffsynth_dagster.report.svg import chart, whole
from diffsynth_dagster.run.record import LOGS, PICTURES, RunRecord
from diffsynth_dagster.run.up_to_date import changed_exports
from diffsynth_dagster.weights.header import read_header
from diffsynth_dagster.weights.resolved import ResolvedModel

CARD, CURVE = "README.md", "loss.svg"
_CURVE_SIZE = 720, 260
# The last line of a card is a comment with the digest of the text above it. If the digest does not
# match, a person has edited the card, and it is not overwritten.
_MARK = "<!-- diffsynth-dagster: this card is written anew by each export, unless it is edited: {} -->\n"
_MARKED = re.compile(r"(?s)(.*)" + re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{64})"))
# The YAML front matter that the hub reads.
_FRONT = re.compile(r"(?s)\A---\n.*?\n---\n")
# A model on a hub, such as `Qwen/Qwen-Image:transformer/*`: not a path, so it is shown whole.
_HUB_ENTRY = re.compile(r"[\w.-]+/[\w.-]+:.*")
_METHODS = {"lora": "a LoRA", "dora": "a DoRA", "lokr": "a LoKr", "oft": "OFT"}
# Left out of the recipe in the card: they only say where this machine keeps its files.
_OF_THE_MACHINE = ("output_path", "cache_path")
# Parameters that hold paths although their names do not end with _path or _paths.
_PATHS = ("fp8_models", "resume_from_checkpoint", "lora_checkpoint", "template_model_id_or_path")


@dataclass(frozen=True)
class Card:
    """The model card of a training.

    Attributes:
        path: the file of the card.
        text: the text made by this export. If `kept`, the file has another one.
        kept: whether the file was left alone because a person has edited it.
    """

    path: Path
    text: str
    kept: bool

    @property
    def shown(self) -> str:
        """The text without front matter, pictures and mark, for a page that cannot show files."""
        body = _FRONT.sub("", _MARKED.sub(r"\1", self.text))
        return re.sub(r"(?m)^!\[.*\n\n?", "", body).strip() + "\n"


def write_card(
    config: TrainingConfig,
    record: RunRecord,
    model: ResolvedModel,
    chosen: Chosen,
    files: Sequence[Exported],
) -> Card:
    """Write the model card and the loss curve of a training beside its exports.

    Equal trainings in run folders of the same name get equal cards.

    Args:
        config: the config of the training, used if the run folder has no `config.yaml`.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(config.output_path)
    recipe = _recipe(folder, config)
    changed = changed_exports(folder, record)
    curve = None if folder / LOGS[0] in changed else loss_svg(folder)
    parts = [
        _front_matter(config, record, model),
        f"# {_plain(_title(folder))}",
        _training(config, record, chosen, recipe),
        _base(record, model),
        _samples(folder, record, changed),
        "" if curve is None else f"## Loss\n\n![The loss of each step, and its mean]({CURVE})",
        _usage(folder / "exports", files, model.family),
        _recipe_section(recipe),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n\n"
    card = text + _MARK.format(digest_text(text))
    path = folder / "exports" / CARD
    if curve is not None:
        write_text(path.with_name(CURVE), curve)
    kept = path.exists() and not _is_unedited(path)
    if not kept:
        write_text(path, card)
    return Card(path, card, kept)


def loss_svg(folder: Path) -> str | None:
    """The loss of each step of a run folder and its running mean, as SVG; None without a finite loss."""
    drawn = chart(read_metrics(folder).loss_chart(), _CURVE_SIZE)
    return whole(*_CURVE_SIZE, drawn) if drawn else None


def _is_unedited(path: Path) -> bool:
    """Whether a card was written by an export, and nobody has edited it since."""
    try:
        marked = _MARKED.fullmatch(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return marked is not None and digest_text(marked[1]) == marked[2]


def _title(folder: Path) -> str:
    """The name of the run folder. For a training in `older/`, the run folder above it."""
    folder = folder.absolute()
    older = OLDER.fullmatch(f"{folder.parent.name}/{folder.name}")
    return (folder.parent.parent if older else folder).name or "model"


def _recipe(folder: Path, config: TrainingConfig) -> dict[str, Any]:
    """The parameters of a training that differ from their defaults, read from its `config.yaml`."""
    try:
        values, _ = read_values(folder / "config.yaml")
    except ParameterError:  # the file is missing, or was written by another version
        values = yaml.safe_load(dump_config(config))
    # Dumped and read back, so that the defaults have the same YAML types as the values.
    defaults = yaml.safe_load(dump_config(TrainingConfig()))
    return {name: v for name, v in values.items() if name not in defaults or v != defaults[name]}


def _front_matter(config: TrainingConfig, record: RunRecord, model: ResolvedModel) -> str:
    # Only the models that were trained count as base models, not the VAE and the text encoders.
    owners = dict.fromkeys(model.family.part(name).of for name in record.trained)
    repositories = [model.components[name].entry.repository for name in owners]
    bases = list(dict.fromkeys(r for r in repositories if r is not None))
    tags = ["diffsynth-dagster", record.family]
    tags += [str(record.lora.get("method", "lora"))] if record.lora is not None else []
    tags += ["full-training"] if _in_full(config, record) else []
    fields = {
        **({"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}),
        "library_name": "diffusers",
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _in_full(config: TrainingConfig, record: RunRecord) -> list[str]:
    """The components and parts that were trained in full, not through a LoRA."""
    return [name for name in record.trained if name not in config.lora_base_model]


def _training(
    config: TrainingConfig, record: RunRecord, chosen: Chosen, recipe: Mapping[str, Any]
) -> str:
    """The section that says what was trained, for how many steps, and on which data."""
    trained = [f"{_code(name)} in full" for name in _in_full(config, record)]
    if record.lora is not None:
        method = _METHODS[record.lora.get("method", "lora")]
        settings = [f"{name} {value}" for name, value in record.lora.items() if name != "method"]
        how = f"through {method} ({', '.join(settings)})"
        trained += [f"{_code(name)} {how}" for name in config.lora_base_model]
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
    """The size in pixels that samples were trained at, and their number of frames."""
    height, width, frames = (recipe.get(name) for name in ("height", "width", "num_frames"))
    if height is not None and width is not None:
        size = f"{width} × {height} pixels"
    else:
        limit = recipe.get("max_pixels", TrainingConfig().max_pixels)
        size = f"each sample in its own size, up to {limit:,} pixels"
    return size if frames is None else f"{size}, {frames} frames"


def _base(record: RunRecord, model: ResolvedModel) -> str:
    """The section with the model files that the training started from, and their digests."""
    lines: list[str] = []
    for name, digest in record.base.items():
        source = model.components.get(name)
        if source is None:
            origin = _code(model.tokenizers[name].name) if name in model.tokenizers else ""
        elif source.entry.repository is not None:
            origin = _code(source.entry.text)
        else:
            origin = ", ".join(_code(path.name) for path in source.files)
        lines.append(f"{_code(name)}: {origin}{', ' * bool(origin)}BLAKE3 {_code(digest)}")
    return f"## Base weights\n\n{_listed(lines)}"


def _samples(folder: Path, record: RunRecord, changed: Sequence[Path]) -> str:
    """The section with the newest pictures and clips whose files exist and are unchanged."""
    # Pictures are named step-<step>, before-<name> or after-<name>; clips step-<step>-<prompt>.
    steps = [name for name in record.pictures if name.startswith("step-")]
    after = [name for name in record.pictures if name.startswith("after-")]
    clips = [name for name in record.clips if steps and name.startswith(f"{steps[-1]}-")]
    lines: list[str] = []
    for name in [*steps[-1:], *after, *clips]:
        file = {**record.pictures, **record.clips}[name]
        path = folder / PICTURES / file
        # Markdown shows pictures but no videos: a clip becomes a link.
        if path.is_file() and path not in changed:
            lines.append(
                f"{'!' * (name not in clips)}[{_plain(name)}](../{PICTURES}/{quote(file)})"
            )
    return "\n\n".join(["## Samples", *lines]) if lines else ""


def _usage(exports: Path, files: Sequence[Exported], family: Family) -> str:
    """The section that says how to load each exported file."""
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
    """How to use an exported file in ComfyUI and DiffSynth-Studio, as far as that is known."""
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
    """Whether the tensor names in an exported diffusers file are those of the model's authors too,
    as far as those are known. They are for Qwen-Image. Never true for a model in shards."""
    if rules is None or rules.authors is None or item.path.suffix != ".safetensors":
        return False
    layers = {name.rpartition(".")[0] for name in read_header(item.path)}
    # None: the authors have no such layer, or its name is not known.
    # None: the authors have no such layer, or its name is not known.
    return all(rules.authors.theirs(layer) in (layer, None) for layer in layers)


def _comfyui_folder(name: str, folder: str, family: Family) -> str:
    """The folder under ComfyUI's `models/` for a component."""
    if any(name == denoiser.component for denoiser in family.denoisers):
        return "diffusion_models"
    starts = {"text_encoder": "text_encoders", "vae": "vae", "controlnet": "controlnet"}
    return next(
        (place for start, place in starts.items() if folder.startswith(start)), "checkpoints"
    )


def _recipe_section(recipe: Mapping[str, Any]) -> str:
    """The section with the recipe. Of paths, it shows only the last part."""
    values = {n: _without_folders(n, v) for n, v in recipe.items() if n not in _OF_THE_MACHINE}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()
    note = "Parameters at their defaults are left out. Of paths, only the last part is shown."
    return f"## Recipe\n\n{note}\n\n{_block(text, 'yaml')}"


def _without_folders(name: str, value: Any) -> Any:
    """The value of a parameter; of a path, only the last part, since folders are private."""
    if not (name in _PATHS or name.endswith(("_path", "_paths"))):
        return value
    if isinstance(value, list):
        return [_without_folders("_path", item) for item in value]
    if not isinstance(value, str) or _HUB_ENTRY.fullmatch(value):
        return value
    # The last part that is not empty: a path may end with a slash, or have Windows' backslashes.
    # The last part that is not empty: a path may end with a slash, or have Windows' backslashes.
    return next((part for part in reversed(re.split(r"[\\/]", value)) if part), value)


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(text: str) -> str:
    """A name with its Markdown characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


def _fence(text: str, least: int) -> str:
    """A code fence: at least `least` backticks, and more than any run of backticks in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _code(text: str) -> str:
    """A name as inline code."""
    text = " ".join(text.split())
    fence = _fence(text, 1)
    # CommonMark needs the space where a text may begin or end with a backtick.
    space = " " * (len(fence) > 1)
    return f"{fence}{space}{text}{space}{fence}"


def _block(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"
