"""Rows of a checked table as they are shown: their texts, and pictures of their files."""

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
        accepted: whether the rows are. A clip of another row may not be safe to decode and is left out.
    """
    files: list[Shown] = []
    columns = [c.removesuffix(":path") for c in rows.columns if c.endswith(":path")]
    for row in rows.iter_rows(named=True):
        for column in columns:
            if isinstance(row.get(f"{column}:seconds"), float):
                continue  # sound
            many = isinstance(row[f"{column}:path"], list)
            parts = [row[f"{column}:{part}"] for part in ("path", "frames", "stride", "shown")]
            for path, frames, stride, taken in zip(*parts, strict=True) if many else [parts]:
                is_clip = (frames or 1) > 1
                if path is not None and (accepted or not is_clip):
                    shown = _frames(frames, stride, taken) if is_clip else None
                    files.append(Shown(Path(path), accepted, shown))
    return files


def _frames(count: int, stride: float, taken: list[int] | None) -> tuple[int, ...]:
    """The frames of a strip: the first, the last, and evenly between."""
    from diffsynth_dagster.data.geometry import frame_indices

    taken, shown = taken or frame_indices(count, stride), min(count, _STRIP)
    return tuple(dict.fromkeys(taken[round(i * (count - 1) / (shown - 1))] for i in range(shown)))


def long_captions_facts(found: "LongCaptions | None") -> dict[str, dg.MetadataValue | int]:
    """How many rows have captions that are longer than the text encoder reads, and the first of them.
    Nothing where they were not counted."""
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
    """A table in markdown.

    Args:
        names: of the columns.
        rows: a value for each column.
    """
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A value as it stands in a table of markdown."""
    text = " ".join(str("" if value is None else value).split()).replace("|", "\\|")
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
