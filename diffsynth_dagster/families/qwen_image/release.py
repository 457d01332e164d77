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
_ENCODER = re.compile(
    r"(.*[-_])?(text_encoders?|vae|tokenizer|processor)(\.\w+)?|qwen[-_.\d]*vl.*", re.I
)
"""The name of a folder or file that holds what is the same in every release."""


def decide(config: TrainingConfig, first: str, later: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a single edit image is shown in the way of the later releases.

    Args:
        first, later: the stage of each way, by which an encoded data set tells its own.

    Returns:
        The answer, and warnings.

    Raises:
        ParameterError: neither a parameter, nor the names in the model list, nor the files, nor the
            encoded data set says it; or the data set was encoded in the other way.
    """
    told = True if config.zero_cond_t else _told_by_models(config)
    # Neither is there where no data set was looked at, or where the step encodes the prompt.
    encoded = later in config.encoded_stages if config.encoded_stages & {first, later} else None
    said = [config.edit_plus or told, config.edit_plus, encoded]
    answer = next((each for each in said if each is not None), None)
    if answer is None and config.reads_encoded and not config.encoded_stages:
        answer = False  # only its models are looked at, and no stage is run
    if answer is None:
        raise ParameterError(
            "it is not clear which release of Qwen-Image-Edit is trained: the first is shown an edit "
            "image in another way than the later ones, and no name in the model list says which it is",
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
            do="encode the data set again for this release, or correct edit_plus and the model list",
        )
    # No error: before edit_plus could be left out, it was false by default and names came first.
    # Every config.yaml of then says so, and is given again as a recipe, or by `inspect --rebuild`.
    if answer and config.edit_plus is False:
        return True, (_OVERRULED,)
    return answer, ()


_OVERRULED = (
    "edit_plus: false has no effect: zero_cond_t, or the names in the model list or files beside the "
    "model, say that it is a later release than the first Qwen-Image-Edit, and edit images are shown "
    "as to that one; leave edit_plus out, or, if it is the first release, rename its folder or file"
)


def _told_by_models(config: TrainingConfig) -> bool | None:
    """What the models say: the transformer where one is listed, else the models that encode, of which
    people take the first release's for any other."""
    entries = model_entries(config)
    transformers = [entry for entry in entries if not _is_encoder(entry)]
    told = {_told(entry) for entry in transformers or entries}
    if True in told:
        return True
    return False if transformers and False in told else None


def _is_encoder(entry: ModelEntry) -> bool:
    """Whether an entry is a model that encodes, by the name of its folder or its own."""
    text = entry.pattern if entry.repository else entry.paths[0]
    names = (entry.folder_hint, PurePosixPath(text.replace("\\", "/")).name)
    return any(_ENCODER.fullmatch(name) for name in names)


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
