"""Finds out which release of Qwen-Image-Edit is trained.

All releases have the same tensor names and shapes, so the release must follow from file names or
from the config files beside the weights. It matters for a single edit image: the first release
(Qwen-Image-Edit) and the later ones (-2509, -2511, FireRed-Image-Edit; diffusers'
`QwenImageEditPlusPipeline`) show it to the text encoder differently. See `edit.py`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

from diffsynth_dagster.config.entries import ModelEntry, model_entries
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families.requirements import MODEL_LIST

_LATER = re.compile(r"qwen[-_]image[-_]edit[-_](plus|\d{4})|firered[-_]image[-_]edit", re.I)
_FIRST = re.compile(r"qwen[-_]image[-_]edit([-_](bf16|fp16|fp8\w*))?(\.\w+)?", re.I)
"""Must match the whole name of a repository, folder or file. A longer name may be a fine-tune of
any release."""
_PIPELINES = {"QwenImageEditPlusPipeline": True, "QwenImageEditPipeline": False}
_ENCODER = re.compile(
    r"(.*[-_])?(text_encoders?|vae|tokenizer|processor)(\.\w+)?|qwen[-_.\d]*vl.*", re.I
)
"""The name of a folder or file with a component that is the same in every release."""


def decide(config: TrainingConfig, first: str, later: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a later release is trained.

    Args:
        first, later: the names of the prompt stages, which an encoded data set contains one of.

    Returns:
        The answer, and warnings.

    Raises:
        ParameterError: the release does not follow from a parameter, the names in the model list,
            the model's files or the encoded data set; or the data set was encoded the other way.
    """
    # Only later releases have `zero_cond_t`.
    from_models = True if config.zero_cond_t else _release_of_models(config)
    # Neither stage is listed if there is no encoded data set, or if the step encodes the prompt.
    encoded = later in config.encoded_stages if config.encoded_stages & {first, later} else None
    # In order of precedence. False in `edit_plus` comes after the models: see below.
    sources = [config.edit_plus or from_models, config.edit_plus, encoded]
    answer = next((source for source in sources if source is not None), None)
    if answer is None and config.reads_encoded and not config.encoded_stages:
        answer = False  # only the models are looked at, and no stage runs: any answer will do
    if answer is None:
        raise ParameterError(
            "it is not clear which release of Qwen-Image-Edit is trained: the first and the later "
            "releases show an edit image to the text encoder differently, and no name in the model "
            "list tells which one it is",
            where=MODEL_LIST,
            do="give edit_plus: true (--edit_plus) for Qwen-Image-Edit-2509 and later and "
            "FireRed-Image-Edit, or what was made from them; false (--no-edit_plus) for the first "
            "release",
        )
    if encoded is not None and encoded != answer:
        ways = ("the first release shows them", "the later releases show them")
        raise ParameterError(
            f"the edit images were encoded as {ways[encoded]}, and this training is of "
            f"{'a later' if answer else 'the first'} one",
            where=f"dataset_base_path = {config.dataset_base_path}",
            do="encode the data set again for this release, or correct edit_plus and the model "
            "list",
        )
    # A warning, not an error: `edit_plus` used to be false by default, and names took precedence.
    # Older config.yaml files contain that false and are still used, as recipes and by
    # `inspect --rebuild`.
    if answer and config.edit_plus is False:
        return True, (_OVERRULED,)
    return answer, ()


_OVERRULED = (
    "edit_plus: false has no effect, because zero_cond_t, the names in the model list or the files "
    "beside the model show that this is a later release of Qwen-Image-Edit; leave edit_plus out, "
    "or, if it is the first release, rename its folder or file"
)


def _release_of_models(config: TrainingConfig) -> bool | None:
    """Whether the model list is of a later release; None if it is not clear.

    The transformer decides if it is listed. Otherwise encoders are a hint, but only of a later
    release: people use the first release's encoders with any transformer.
    """
    entries = model_entries(config)
    transformers = [entry for entry in entries if not _is_encoder(entry)]
    releases = {_release_of(entry) for entry in transformers or entries}
    if True in releases:
        return True
    return False if transformers and False in releases else None


def _is_encoder(entry: ModelEntry) -> bool:
    """Whether the name of an entry's folder or file is that of a VAE, text encoder or tokenizer."""
    text = entry.pattern if entry.repository else entry.paths[0]
    names = (entry.folder_hint, PurePosixPath(text.replace("\\", "/")).name)
    return any(_ENCODER.fullmatch(name) for name in names)


def _release_of(entry: ModelEntry) -> bool | None:
    """Whether an entry is of a later release, by its names or the config files beside it; None if
    it is not clear."""
    names = _names(entry)
    if any(_LATER.search(name) for name in names):
        return True
    if any(_FIRST.fullmatch(name) for name in names):
        return False
    return _published(entry.paths)


def _names(entry: ModelEntry) -> list[str]:
    """The names that may tell the release: the repository's, the model folder's and the file's."""
    if entry.repository is not None:
        return [entry.repository.split("/")[1], PurePosixPath(entry.pattern).name]
    names: list[str] = []
    for text in entry.paths:
        parts = PurePosixPath(text.replace("\\", "/")).parts
        # In diffusers' layout the model's folder is the parent of the folder `transformer`.
        names += parts[-3:] if "transformer" in parts[-2:] else parts[-2:]
    return names


def _published(paths: Sequence[str]) -> bool | None:
    """Whether diffusers' config files beside local weights are of a later release; None if there
    are none.

    `zero_cond_t` in config.json exists only in later releases, and model_index.json names the
    pipeline.
    """
    for text in paths:
        path = Path(text)
        folder = path if path.is_dir() else path.parent
        if _settings(folder / "config.json").get("zero_cond_t") is True:
            return True
        for model_folder in (folder.parent, folder):
            pipeline = _settings(model_folder / "model_index.json").get("_class_name")
            if isinstance(pipeline, str) and pipeline in _PIPELINES:
                return _PIPELINES[pipeline]
    return None


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file; empty if it does not exist or is damaged.

    Loading the model reports a damaged file.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], read) if isinstance(read, dict) else {}
