"""The entries of a recipe's model list, and names for them, before any file is downloaded."""

import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from diffsynth_dagster.config.declare import names_model_folder
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError, is_text, nearest

SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
"""The part of a file name with the number of the shard and of all shards."""
_REPOSITORY = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_USUAL = ("diffusion_pytorch_model*.safetensors", "model*.safetensors")
"""File names of diffusers and transformers for any component: only the folder tells which."""

_DISTINCT_PART = re.compile(r"[A-Za-z0-9_.*-]*[A-Za-z0-9*][A-Za-z0-9_.*-]*")
"""A part of a path that `_as_name` turns into a name that still identifies it."""


def mark_of_text(text: str) -> str:
    """A digest of a text, 6 hexadecimal digits, to tell similar names apart."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()


def _as_name(text: str) -> str:
    """A text with only characters that Dagster accepts in a key."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text.replace("*", "all")).strip("_") or "_"


@dataclass(frozen=True)
class ModelEntry:
    """One model: files in a repository of the hub, or local files.

    Attributes:
        parameter: the parameter that names the model, for messages.
        repository: `owner/name` on ModelScope; None for local files.
        pattern: glob within the repository. A folder if it ends with "/"; the whole repository if
            it is empty.
        paths: local files, folders or globs that make up the model: several for shards.
    """

    parameter: str
    repository: str | None = None
    pattern: str = ""
    paths: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The entry as the user wrote it."""
        return f"{self.repository}:{self.pattern}" if self.repository else ", ".join(self.paths)

    @property
    def same(self) -> str:
        """The text in a normal form: entries that have the same one are the same model."""
        if self.repository:
            return self.text
        return ", ".join(str(PurePosixPath(path.replace("\\", "/"))) for path in self.paths)

    @property
    def name(self) -> tuple[str, ...]:
        """The parts of a unique name for the entry, made of letters, digits, hyphens and
        underscores: `("Qwen", "Qwen-Image", "transformer")`. It depends on the entry's text only.

        Files with a usual name (`_USUAL`) are named by their folder, others by their own name too:
        `("black-forest-labs", "FLUX_1-dev", "ae")`. Only the last parts of an absolute path are
        used. If these parts do not identify the entry, a digest of the text is added.
        """
        text = self.pattern if self.repository else SHARD.sub("", self.paths[0])
        path = PurePosixPath(text.replace("\\", "/"))
        parts = [part for part in path.parts if part not in ("/", ".")]
        is_folder = text.endswith("/") or not parts or not (path.suffix or "*" in path.name)
        # "all" keeps the key of a whole folder apart from those of the files in it.
        if is_folder:
            parts += [] if self.parameter in MODEL_FOLDERS else ["all"]
        elif parts[-1] in _USUAL and len(parts) > 1:
            parts.pop()
        else:
            stem = parts[-1].removesuffix(".safetensors")
            parts[-1] = stem if stem.strip("*") else parts[-1]
        is_local = self.repository is None
        parts = [*(self.repository or "").split("/"), *parts] if not is_local else parts
        is_unique = all(_DISTINCT_PART.fullmatch(part) for part in parts) and len(self.paths) < 2
        names = [_as_name(part) for part in parts] or ["files"]
        if is_local and path.is_absolute():
            is_unique = False  # the beginning of the path is dropped below
            if names[-1] in ("diffusion_pytorch_model", "model") and len(names) > 1:
                names.pop()
            names = names[-2:]
        if is_unique:
            return tuple(names)
        return (*names[:-1], f"{names[-1]}_{mark_of_text(self.same)}")

    @property
    def folder_hint(self) -> str:
        """The name of the files' folder, if the text shows it: `transformer`, `vae`, …"""
        text = self.pattern if self.repository else self.paths[0]
        return PurePosixPath(text).name if text.endswith("/") else PurePosixPath(text).parent.name


def parse_hub_entry(text: str, parameter: str) -> ModelEntry:
    """An entry from `owner/name:pattern`, or `owner/name:` for the whole repository.

    Raises:
        ParameterError: there is no colon, or no valid repository; or the pattern leaves the
            repository, or is no possible file name.
    """
    repository, colon, pattern = text.partition(":")
    # "." and ".." match the pattern of a name, and would lead out of the folder of models.
    named = _REPOSITORY.fullmatch(repository) and {".", ".."}.isdisjoint(repository.split("/"))
    if not colon or not named:
        raise ParameterError(
            f"'{text}' is not repository:pattern",
            where=parameter,
            do="write it like Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors; a "
            "repository is owner/name in letters, digits, '.', '_' and '-'",
        )
    if pattern.startswith("/") or ".." in PurePosixPath(pattern).parts or "\\" in pattern:
        raise ParameterError(
            f"the pattern '{pattern}' leaves the repository", where=parameter, do="correct it"
        )
    if not is_text(pattern):
        raise ParameterError(
            f"no file can be called '{pattern}'", where=parameter, do="correct the pattern"
        )
    return ModelEntry(parameter, repository, pattern)


def model_entries(config: TrainingConfig) -> tuple[ModelEntry, ...]:
    """The entries of a config's model list, local ones first.

    Raises:
        ParameterError: an entry is malformed, or named twice.
    """
    local = [
        ModelEntry("model_paths", paths=(item,) if isinstance(item, str) else item)
        for item in config.model_paths
    ]
    name = "model_id_with_origin_paths"
    entries = [*local, *(parse_hub_entry(text, name) for text in config.model_id_with_origin_paths)]
    for index, entry in enumerate(entries):
        if not entry.repository and not entry.paths:
            raise ParameterError("an empty list of shards", where="model_paths", do="remove it")
        if entry in entries[:index]:
            raise ParameterError(
                f"'{entry.text}' is named twice", where=entry.parameter, do="name it once"
            )
    return tuple(entries)


def float8_entries(config: TrainingConfig) -> tuple[ModelEntry, ...]:
    """The entries of the model list that `fp8_models` names.

    Raises:
        ParameterError: `fp8_models` names something that is not in the model list.
    """
    entries = {entry.text: entry for entry in model_entries(config)}
    wanted = [item if isinstance(item, str) else ", ".join(item) for item in config.fp8_models]
    for text in wanted:
        if text not in entries:
            hint = nearest(text, entries)
            raise ParameterError(
                f"'{text}' is no entry of the model list" + (f"; {hint}" if hint else ""),
                where="fp8_models",
                do="write it as in model_paths or model_id_with_origin_paths",
            )
    return tuple(entries[text] for text in wanted)


MODEL_FOLDERS = tuple(
    name for name, field in TrainingConfig.model_fields.items() if names_model_folder(field)
)
"""Parameters outside the model list that name a folder, such as a tokenizer's."""


def folder_entries(config: TrainingConfig) -> tuple[ModelEntry, ...]:
    """The entries of a config's folders, such as a tokenizer, that are not in the model list."""
    given = ((name, getattr(config, name)) for name in MODEL_FOLDERS)
    return tuple(folder_entry(text, name) for name, text in given if text is not None)


def folder_entry(text: str, parameter: str) -> ModelEntry:
    """The entry for a folder such as a tokenizer's: a local path, or `repository:folder/`."""
    # A colon alone does not tell: a local path may have one ("C:/tokenizer").
    if Path(text).exists() or ":" not in text:
        return ModelEntry(parameter, paths=(text,))
    entry = parse_hub_entry(text, parameter)
    pattern = entry.pattern.rstrip("/")
    return ModelEntry(parameter, entry.repository, f"{pattern}/" if pattern else "")


def start_entries(config: TrainingConfig) -> list[ModelEntry]:
    """Entries for the weight files outside the model list that a training starts from."""
    names = ("lora_checkpoint", "preset_lora_path", "resume_from_checkpoint")
    given = {name: getattr(config, name) for name in names}
    return [ModelEntry(name, paths=(path,)) for name, path in given.items() if path is not None]


def named_entries(config: TrainingConfig) -> list[ModelEntry]:
    """All model entries of a config: those of its model list, and its folders.

    Raises:
        ParameterError: see `model_entries`.
    """
    return [*model_entries(config), *folder_entries(config)]
