"""Shows rows of a checked table in the UI: their texts as markdown, and which files to picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from assets.pictures import Shown

if TYPE_CHECKING:
    from polars import DataFrame

    from diffsynth_dagster.cache.long_captions import LongCaptions

_STRIP = 4
"""Frames of a clip on the contact sheet."""
_SHOWN_CHARACTERS = 80


def files_of_rows(rows: "DataFrame", accepted: bool) -> list[Shown]:
    """The files of rows: images, and a strip of frames of each clip.

    Args:
        accepted: whether the rows are accepted. Clips of rejected rows are left out, since they may
            not be safe to decode.
    """
    files: list[Shown] = []
    columns = [c.removesuffix(":path") for c in rows.columns if c.endswith(":path")]
    for row in rows.iter_rows(named=True):
        for column in columns:
            if isinstance(row.get(f"{column}:seconds"), float):
                continue  # sound has no picture
            # A column may hold a list of files in each row, such as several edit images.
            many = isinstance(row[f"{column}:path"], list)
            parts = [row[f"{column}:{part}"] for part in ("path", "frames", "stride", "shown")]
            for path, frames, stride, indices in zip(*parts, strict=True) if many else [parts]:
                is_clip = (frames or 1) > 1
                if path is not None and (accepted or not is_clip):
                    shown = _frames(frames, stride, indices) if is_clip else None
                    files.append(Shown(Path(path), accepted, shown))
    return files


def _frames(count: int, stride: float, indices: list[int] | None) -> tuple[int, ...]:
    """The frames of a strip: the first, the last, and evenly spaced ones between them.

    Args:
        count: frames of the sample, at least 2.
        stride: frames of the file for each frame of the sample.
        indices: the file's frame for each frame of the sample; None if the stride alone decides.
    """
    from diffsynth_dagster.data.geometry import frame_indices

    indices, shown = indices or frame_indices(count, stride), min(count, _STRIP)
    # A slowed-down clip shows the same frame of the file several times: once is enough here.
    return tuple(dict.fromkeys(indices[round(i * (count - 1) / (shown - 1))] for i in range(shown)))


def long_captions_facts(found: "LongCaptions | None") -> dict[str, dg.MetadataValue | int]:
    """Metadata on captions that are longer than the text encoder reads: their number, and the first
    rows. Empty if they were not counted."""
    if found is None:
        return {}
    facts: dict[str, dg.MetadataValue | int] = {"long_captions": found.count}
    if found.count:
        more = found.count - len(found.rows)
        text = markdown(["row", f"tokens, of which {found.most} are read"], found.rows)
        facts["long_captions/rows"] = dg.MetadataValue.md(
            text + (f"\n\nand {more} more" if more > 0 else "")
        )
    return facts


def markdown(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table.

    Args:
        names: the titles of the columns.
        rows: rows, each with a value for each column; a `MarkdownMetadataValue` is put in as it is,
            such as a picture.
    """
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A value as the text of a table cell: on one line, shortened, without column separators."""
    if isinstance(value, dg.MarkdownMetadataValue):
        return value.value or ""
    text = " ".join(str("" if value is None else value).split()).replace("|", "\\|")
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
