"""Check that the files of a table exist, can be decoded, and are large and long enough.

Facts are kept per file, not per row: each file is decoded once, however many rows name it, and
again only after it has changed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import ClipRule, SizeRule, area_size, frame_indices
from diffsynth_dagster.data.media.audio import audio_facts
from diffsynth_dagster.data.media.budget import short_of_memory
from diffsynth_dagster.data.media.colour import reading
from diffsynth_dagster.data.media.decoder_pool import DecoderPool
from diffsynth_dagster.data.media.image import image_facts
from diffsynth_dagster.data.media.video import video_facts
from diffsynth_dagster.data.table.names import LookAlikes, outside
from diffsynth_dagster.data.table.read import require_folder
from diffsynth_dagster.data.table.values import REASONS, STATUS
from diffsynth_dagster.errors import MetadataError, is_text
from diffsynth_dagster.facts import FactCache, Facts, Progress

_CHECK = "4"
"""Version of the check. Raise it when the check finds other facts: cached facts become invalid."""
_PER_FILE: dict[str, Any] = {
    "path": pl.String,
    "digest": pl.String,
    "size": pl.Int64,
    "modified": pl.Int64,
    "width": pl.Int64,
    "height": pl.Int64,
    "target": pl.List(pl.Int64),
    "frames": pl.Int64,
    "stride": pl.Float64,
    "shown": pl.List(pl.UInt32),
    "rate": pl.Float64,
    "seconds": pl.Float64,
    "reading": pl.String,
    "transparent": pl.Boolean,
    "signature": pl.String,
}
"""Columns that `FileCheck.check` adds for each file, with their types."""
_AT_ONCE = 1 << 16
"""Files that are checked at once. Their facts are Python objects until they are in a frame."""
_ROW, _VALUE, _NOW, _WHY = "\x00row", "\x00value", "\x00now", "\x00why"


@dataclass(frozen=True)
class TrainedShape:
    """The size and length that files are trained at.

    Attributes:
        background: colour `#rrggbb` that fills transparent pixels; None keeps the colours stored in
            the file.
    """

    size: SizeRule
    clip: ClipRule | None
    background: str | None = None

    def of(self, facts: Facts, item: Input) -> Facts:
        """Add to the facts about a file how it is trained on.

        Returns:
            The facts with `target` [width, height], `frames`, `stride`, `shown` and `reading` (see
            `samples`), or `status` and `message` if the file is too small or too short.
        """
        if "status" in facts:
            return facts
        if item.kind == "audio":
            return _sound_of(facts, item)
        width, height = self.size.target(facts["width"], facts["height"])
        if item.area is not None:
            width, height = area_size(facts["width"], facts["height"], item.area)
        if not width or not height:
            why = f"{facts['width']}x{facts['height']} pixels are below the family's smallest size"
            return {"status": "too_small", "message": why}
        trained: Facts = {"target": [width, height], "frames": 1, "stride": 1.0}
        if item.kind == "video":
            assert self.clip is not None, "a family with videos has a frame rule"
            trained |= _clip_of(facts, self.clip)
        if item.weighs:  # a mask has no colours, so no warning about transparent pixels
            facts = {**facts, "transparent": None}
        words = reading(facts, self.background, is_data=item.weighs)
        return {**facts, **trained, "reading": words}


def _clip_of(facts: Facts, rule: ClipRule) -> Facts:
    """How a clip is read: `frames`, `stride` and `shown`; or `status` and `message` if it is too
    short."""
    times = facts["times"] and [time / 1e6 for time in facts["times"]]  # microseconds to seconds
    stride = rule.stride(facts["rate"])
    taken = rule.taken(facts["frames"], facts["rate"], times)
    if not taken:
        return {"status": "too_short", "message": _why_too_short(facts, rule)}
    shown = [facts.get("first", 0) + index for index in taken]
    # Leave `shown` out if the stride determines the frames: such samples keep their keys in
    # existing stores. decord must read the first n frames without a gap.
    every = shown == list(range(len(taken)))
    by_stride = facts["decoder"] == "pillow" or (facts["decoder"] == "decord" and every)
    if by_stride and shown == frame_indices(len(taken), stride):
        return {"frames": len(taken), "stride": stride}
    return {"frames": len(taken), "stride": stride, "shown": shown}


def _why_too_short(facts: Facts, rule: ClipRule) -> str:
    """The message about a clip that is shorter than the family takes."""
    least = rule.rule.smallest
    if facts["rate"] is None:
        why = f"a still image is one frame, and the shortest clip has {least}"
    else:
        why = f"{facts['frames']} frames give less than the {least} of the shortest clip"
    if rule.rule.least > 1:
        why += ": the first frame is given, and with no other there is nothing to predict"
    return why


def _sound_of(facts: Facts, item: Input) -> Facts:
    """Add to the facts about sound how it is read.

    Returns:
        The facts with `target` [samples per second, channels], or `status` and `message` if the
        number of channels is wrong. `table.shapes.with_length_of` adds the length later, since it
        is that of the sample's clip.
    """
    have, wanted = facts["channels"], item.channels
    if have != wanted:
        do = "make both channels of the one" if have < wanted else "mix it down"
        why = f"the sound has {have} channels, and the model takes {wanted}: {do}"
        return {"status": "wrong_channels", "message": why}
    return {**facts, "target": [item.rate, wanted], "stride": 1.0}


class FileCheck:
    """Checks file columns. Use it as a context manager, which ends the decoding processes."""

    def __init__(
        self,
        config: TrainingConfig,
        shape: TrainedShape,
        fact_cache: FactCache,
        progress: Progress,
        signed: bool = False,
    ) -> None:
        """Prepare to check files.

        Args:
            signed: whether every picture and clip needs a `signature`: those whose cached facts are
                from before there were signatures are decoded again.

        Raises:
            MetadataError: the data set's folder does not exist, or its name is not UTF-8.
        """
        base = require_folder(Path(config.dataset_base_path))
        self._root = base.resolve()
        if not is_text(str(self._root)):
            raise MetadataError(
                f"the data set's folder, {self._root}, has a name that is not UTF-8",
                where=f"dataset_base_path = {base}",
                do="rename the folder: tables hold text alone",
            )
        self._folders: dict[str, str] = {}
        self._alike = LookAlikes(str(self._root))
        self._anywhere = config.allow_outside_base_path
        self._again = config.verify_content
        self._shape = shape
        self._signed = signed
        self._fact_cache = fact_cache
        self._progress = progress
        self._decoders = DecoderPool()

    def __enter__(self) -> "FileCheck":
        self._decoders.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._decoders.__exit__(*error)

    def check(self, frame: pl.DataFrame, item: Input) -> pl.DataFrame:
        """Check the files of a column, in the rows that are ok so far.

        Returns:
            The frame with `status` and `message` set in rows whose files fail, and these columns,
            each with a list if the input takes many files, and null if an optional column names no
            file:

            - `<column>:path` (resolved), `:digest`, `:size` and `:modified` (see `FileState`);
            - `:width` and `:height` (pixels, upright), `:rate` (frames or samples per second),
              `:seconds` of sound, `:transparent`, whether a picture has pixels that are not opaque,
              and `:signature` (see `media.signature`; null if it was not asked for and is unknown);
            - `:target` ([width, height] that it is trained at), `:frames` (trained; 1 for an
              image), `:stride`, `:shown` and `:reading` (see `samples`).
        """
        # One line for each file of each row, joined with the facts of the distinct files, then
        # grouped by row again. No Python code runs for each row.
        wanted = frame.with_row_index(_ROW).filter(pl.col("status") == "ok")
        value = pl.col(item.column)
        named = wanted.select(_ROW, (value if item.many else pl.concat_list(value)).alias(_VALUE))
        named = named.explode(_VALUE).drop_nulls()
        values = named[_VALUE].unique(maintain_order=True)
        parts = range(0, max(1, len(values)), _AT_ONCE)
        files = pl.concat([self._files(values.slice(at, _AT_ONCE).to_list(), item) for at in parts])
        found = named.join(files, on=_VALUE, how="left", maintain_order="left")
        rows = found.group_by(_ROW, maintain_order=True).agg(
            *(pl.col(name).alias(f"{item.column}:{name}") for name in _PER_FILE),
            # The first file that fails decides about the row.
            pl.col(_NOW, _WHY).filter(pl.col(_NOW) != "ok").first(),
        )
        if not item.many:
            rows = rows.with_columns(
                pl.col(f"{item.column}:{name}").list.first() for name in _PER_FILE
            )
        joined = frame.with_row_index(_ROW).join(rows, on=_ROW, how="left", maintain_order="left")
        return joined.with_columns(
            pl.coalesce(_NOW, "status").alias("status"),
            pl.coalesce(_WHY, "message").alias("message"),
        ).drop(_ROW, _NOW, _WHY)

    def _files(self, values: Sequence[str], item: Input) -> pl.DataFrame:
        """A frame with one row for each value: its file, facts and status."""
        places = {value: self._resolve(value) for value in values}
        paths = [path for path, _ in places.values() if path is not None]
        # Pictures and images have the same facts.
        kind = f"{item.kind if item.kind in ('video', 'audio') else 'image'}:{_CHECK}"
        find_out = _naming_the_file(self._find_out(item), item.kind)
        facts = self._fact_cache.look_up(kind, paths, find_out, self._again, self._progress)
        if self._signed and item.kind != "audio":
            old = [p for p, found in facts.items() if not found.keys() & {"status", "signature"}]
            facts |= self._fact_cache.look_up(kind, old, find_out, again=True)
        shaped = {path: self._shape.of(found, item) for path, found in facts.items()}
        rows = [
            _file_row(
                value, path, shaped[path] if path is not None else self._no_file(value, why), item
            )
            for value, (path, why) in places.items()
        ]
        schema = {_VALUE: pl.String, _NOW: STATUS, _WHY: pl.String, **_PER_FILE}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def _find_out(self, item: Input) -> Callable[[Path], Facts]:
        """The function that checks the files of a column."""
        if item.kind == "audio":
            return lambda path: audio_facts(path, self._decoders)
        if item.kind != "video":
            return image_facts
        return lambda path: video_facts(path, self._decoders)

    def _resolve(self, value: str) -> tuple[Path | None, str]:
        """A value of a file column → (its file, "ok"), or (None, the status of the row)."""
        try:
            path = self._real_path(value)
            if not is_text(str(path)):  # the target of a link may have any name
                return None, "bad_path"
            if not self._anywhere and not path.is_relative_to(self._root):
                return None, "outside_base_path"
            if path.is_file():
                return path, "ok"
            return None, "not_a_file" if path.exists() else "file_missing"
        except (OSError, ValueError, RuntimeError):
            return None, "bad_path"

    def _no_file(self, value: str, status: str) -> Facts:
        """`status` and `message` for a value that names no file."""
        if status not in ("file_missing", "not_a_file", "outside_base_path"):
            return {"status": status}
        path = os.path.join(self._root, value)
        if status == "outside_base_path":
            more = outside(Path(path), self._real_path(value))
            return {"status": status, "message": f"{REASONS[status]}: {more}"}
        alike = self._alike.of(value) if status == "file_missing" else None
        message = f"{REASONS[status]}: {path[:300]}" + (f"; {alike}" if alike else "")
        return {"status": status, "message": message}

    def _real_path(self, value: str) -> Path:
        """The file that a value names, after links are followed."""
        named = os.path.join(self._root, value)
        folder, name = os.path.split(named)
        if name in ("", ".", "..") or os.path.islink(named):
            return Path(named).resolve()
        # Resolving takes a system call for each part of a path: do it once for each folder.
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return Path(self._folders[folder], name)


def _naming_the_file(find_out: Callable[[Path], Facts], kind: str) -> Callable[[Path], Facts]:
    """Wrap the check of a file so that a lack of memory is reported with the file
    (`OutOfMemory`)."""

    def named(path: Path) -> Facts:
        try:
            return find_out(path)
        except MemoryError as error:
            raise short_of_memory(kind, str(path)) from error

    return named


def _file_row(value: str, path: Path | None, facts: Mapping[str, Any], item: Input) -> list[Any]:
    """A row of the frame of `FileCheck._files`."""
    status = facts.get("status", "ok")
    why = ""
    if status != "ok":
        why = f"{item.column} '{value[:100]}': {facts.get('message') or REASONS[status]}"
    known = {**facts, "path": None if path is None else str(path)}
    return [value, status, why, *(known.get(name) for name in _PER_FILE)]
