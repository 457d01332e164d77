"""What a sample's file column stands for: files, and the sizes and frames they are read at.

A reference is a JSON value, so that a manifest can hold it:

    {"paths": […], "targets": [[width, height], …], "frames": […], "strides": […]}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.media.image import load_sample_image, read_image
from diffsynth_dagster.data.media.video import load_sample_video
from diffsynth_dagster.facts import digest_text

Reference = dict[str, list[Any]]
_PARTS = {"paths": "path", "targets": "target", "frames": "frames", "strides": "stride"}


def _listed(row: Mapping[str, Any], item: Input, name: str) -> list[Any]:
    value = row[f"{item.column}:{name}"]
    return list(value) if item.many else [value]


def reference(row: Mapping[str, Any], item: Input) -> Reference:
    """The files of a checked row's column."""
    return {part: _listed(row, item, name) for part, name in _PARTS.items()}


def content(row: Mapping[str, Any], item: Input) -> str:
    """What a column's content depends on, whatever size it is read at."""
    if not item.is_file:
        return digest_text(row[item.column])
    return ",".join(_listed(row, item, "digest"))


def reading(row: Mapping[str, Any], item: Input) -> list[Any]:
    """How the files of a column are read: sizes, and for videos the frames that are taken."""
    targets = [list(target) for target in _listed(row, item, "target")]
    if item.kind != "video":
        return targets
    return [targets, _listed(row, item, "frames"), _listed(row, item, "stride")]


def plain(text: str, item: Input) -> str | int | float:
    """The value of a column that names no file."""
    if item.kind == "text":
        return text
    try:
        return int(text)  # exactly: a seed may have more digits than a float
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() else number


def load(files: Reference, item: Input) -> Any:
    """Read the files of a column.

    Returns:
        float32 in [-1, 1]: (3, H, W) for an image and (3, F, H, W) for a video; an RGB Pillow
        image for a picture; a list of these where the input takes many.

    Raises:
        OSError, …: see `data.media.IMAGE_ERRORS`; a file is not as it was when it was checked.
    """
    tensors: list[Any] = []
    for path, target, frames, stride in zip(*(files[part] for part in _PARTS), strict=True):
        size = (target[0], target[1])
        if item.kind == "image":
            tensors.append(load_sample_image(Path(path), size))
        elif item.kind == "picture":
            tensors.append(read_image(Path(path)))
        else:
            tensors.append(load_sample_video(Path(path), size, frames, stride))
    return tensors if item.many else tensors[0]
