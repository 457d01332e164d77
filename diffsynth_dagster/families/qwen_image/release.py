"""Which release of Qwen-Image-Edit a transformer is: their tensors have the same names and shapes,
so that names and what is published beside them must tell.

The releases show a single edit image to the text encoder in two ways (see `edit.py`): the first
(Qwen-Image-Edit) and the later ones, which diffusers' `QwenImageEditPlusPipeline` runs
(-2509, -2511, FireRed-Image-Edit).
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
"""The whole name of a repository, folder or file: fine-tuned ones with more in theirs may be of
any release."""
_PIPELINES = {"QwenImageEditPlusPipeline": True, "QwenImageEditPipeline": False}
_ENCODERS = ("text_encoder", "vae", "tokenizer", "processor")
"""Folders of what is the same in every release."""


def is_later(config: TrainingConfig) -> bool:
    """Whether a single edit image is shown in the way of the later releases.

    Raises:
        ParameterError: neither a parameter, nor the names in the model list, nor the files say it.
    """
    entries = model_entries(config)
    told = [_told(entry) for entry in entries]
    if config.edit_plus or config.zero_cond_t or True in told:
        return True
    transformers = [t for t, e in zip(told, entries, strict=True) if e.folder_hint not in _ENCODERS]
    # The second half of split training takes what the first has made of the edit images.
    if config.edit_plus is False or config.reads_encoded or False in transformers:
        return False
    raise ParameterError(
        "it is not clear which release of Qwen-Image-Edit is trained: the first is shown an edit "
        "image in another way than the later ones, and no name in the model list says which it is",
        where=MODEL_LIST,
        do="give edit_plus: true (--edit_plus) for Qwen-Image-Edit-2509 and later and "
        "FireRed-Image-Edit, or what was made from them; false (--no-edit_plus) for the first release",
    )


def _told(entry: ModelEntry) -> bool | None:
    """Whether an entry is of a later release, by its names or what lies beside it; None where they do
    not say."""
    names = _names(entry)
    if any(_LATER.search(name) for name in names):
        return True
    if any(_FIRST.fullmatch(name) for name in names):
        return False
    return _published(entry.paths)


def _names(entry: ModelEntry) -> list[str]:
    """The names of the repository, the folder of the model and the file."""
    if entry.repository is not None:
        return [entry.repository.split("/")[1], PurePosixPath(entry.pattern).name]
    names: list[str] = []
    for text in entry.paths:
        parts = PurePosixPath(text.replace("\\", "/")).parts
        # In diffusers' layout the folder of the transformer lies in that of the model.
        names += parts[-3:] if "transformer" in parts[-2:] else parts[-2:]
    return names


def _published(paths: Sequence[str]) -> bool | None:
    """What the files of diffusers beside local weights say: the pipeline of the model, or the
    architecture that only later releases have."""
    for text in paths:
        path = Path(text)
        folder = path if path.is_dir() else path.parent
        if _settings(folder / "config.json").get("zero_cond_t") is True:
            return True
        for place in (folder.parent, folder):
            pipeline = _settings(place / "model_index.json").get("_class_name")
            if isinstance(pipeline, str) and pipeline in _PIPELINES:
                return _PIPELINES[pipeline]
    return None


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file; none where there is no such file. What is damaged is refused where
    it is read for good."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], read) if isinstance(read, dict) else {}
