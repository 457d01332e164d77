"""Warnings about rows that are accepted but trained on in a way that people may not expect."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from diffsynth_dagster.data.columns import Input

_ENLARGED = 1.05
"""Factor by which a side must grow before a file counts as enlarged. Less is due to rounding."""
_CROPPED = 1 / 3
"""Part of a picture's area that may be cropped away without a warning."""
_RATE_OFF = 0.01
"""Relative difference up to which two frame rates count as equal: 23.976 counts as 24."""


@dataclass(frozen=True)
class _Kind:
    """A kind of warning.

    Attributes:
        found: boolean expression, true for rows that the warning is about; null means false.
        what: the end of a sentence "3 rows … have": what such rows have, and what to do about it.
    """

    found: pl.Expr
    what: str


def warnings_about(
    rows: pl.LazyFrame,
    inputs: Sequence[Input],
    parameters: Mapping[str, Any],
    published_frame_rate: float | None,
) -> list[str]:
    """Return a sentence for each kind of warning, with the number of rows and the first row.

    Args:
        rows: the accepted rows of a checked table.
        inputs: the columns that the table was checked for.
        parameters: the parameters that the table was checked with.
        published_frame_rate: see `Geometry`.
    """
    schema = rows.collect_schema()
    files = [i for i in inputs if i.is_file and f"{i.column}:target" in schema]
    kinds = [
        *_transparent(schema, parameters),
        *_without_caption(inputs, parameters),
        *_other_rate(files, parameters, published_frame_rate),
        *_enlarged(files),
        *_cropped(files, parameters),
    ]
    if not kinds:
        return []
    found = [kind.found.fill_null(False) for kind in kinds]
    # One row with all counts and all first rows, in one pass over the table.
    table = rows.select(
        *(test.sum().alias(f"count {n}") for n, test in enumerate(found)),
        *(pl.when(test).then("row").min().alias(f"first {n}") for n, test in enumerate(found)),
    )
    numbers = table.collect(engine="streaming").row(0)
    counted = zip(kinds, numbers[: len(kinds)], numbers[len(kinds) :], strict=True)
    return [f"{_which(count, first)} {kind.what}" for kind, count, first in counted if count]


def _which(count: int, first: int) -> str:
    return f"row {first} has" if count == 1 else f"{count} rows, the first is {first}, have"


def _transparent(schema: pl.Schema, parameters: Mapping[str, Any]) -> Iterator[_Kind]:
    """Pictures with transparent pixels, unless a `background` fills them."""
    flags = {c: kind for c, kind in schema.items() if c.endswith(":transparent")}
    if not flags or parameters.get("background") is not None:
        return
    tests = [pl.col(c).list.any() if kind == pl.List else pl.col(c) for c, kind in flags.items()]
    yield _Kind(
        pl.any_horizontal(tests),
        "pictures with transparent pixels: what is trained on is the colour beneath them, "
        "which is often black; background (such as white) fills it",
    )


def _without_caption(inputs: Sequence[Input], parameters: Mapping[str, Any]) -> Iterator[_Kind]:
    """Rows without a caption of their own: they are trained with `caption_prefix` alone."""
    prefix = parameters.get("caption_prefix")
    for item in inputs if prefix is not None else ():
        if item.caption:
            caption = pl.col(item.column)
            # The check has put the prefix in place of missing captions.
            alone = (caption.list.len() == 1) & (caption.list.first() == prefix)
            yield _Kind(
                alone if item.many else caption == prefix,
                "no caption: what is told is caption_prefix alone",
            )


def _other_rate(
    files: Sequence[Input], parameters: Mapping[str, Any], published: float | None
) -> Iterator[_Kind]:
    """Clips that keep a frame rate other than the one that the model was trained at."""
    clips = [item for item in files if item.kind == "video"]
    if not clips or published is None or parameters.get("frame_rate") is not None:
        return
    tests: list[pl.Expr] = []
    for item in clips:
        rate = pl.col(f"{item.column}:rate")
        low, high = published * (1 - _RATE_OFF), published * (1 + _RATE_OFF)
        slow, fast = (rate.list.min(), rate.list.max()) if item.many else (rate, rate)
        tests.append((slow < low) | (fast > high))
    yield _Kind(
        pl.any_horizontal(tests),
        f"clips of another frame rate than the {published:g} frames per second that the model was "
        "trained at: it learns motion that is too slow from faster ones, and too fast from slower "
        f"ones; frame_rate: {published:g} reads as many frames of each second of every clip",
    )


def _enlarged(files: Sequence[Input]) -> Iterator[_Kind]:
    """Files that are smaller than the size they are read at.

    Files that are read at the size of the sample (control pictures, masks) do not count: they are
    often made smaller on purpose.
    """
    sized = [item for item in files if item.kind != "audio" and not item.same_size]
    samples = [pl.any_horizontal(_is_enlarged(item)) for item in sized if item.area is None]
    if samples:
        yield _Kind(
            pl.any_horizontal(samples),
            "pictures or clips that are smaller than the size they are trained at, and are enlarged, "
            "which teaches blur; without height and width nothing is enlarged, and max_pixels bounds "
            "the size",
        )
    edits = [item for item in sized if item.area is not None]
    if edits:
        names = " and ".join(item.column for item in edits)
        area = "x".join([str(round(max(item.area or 0 for item in edits) ** 0.5))] * 2)
        yield _Kind(
            pl.any_horizontal(test for item in edits for test in _is_enlarged(item)),
            f"pictures in {names} that are enlarged to the area of {area} pixels that the model "
            "is given them at; larger files are sharper",
        )


def _is_enlarged(item: Input) -> Iterator[pl.Expr]:
    for ratio in _ratios(item):
        yield (ratio.list.max() if item.many else ratio) > _ENLARGED


def _cropped(files: Sequence[Input], parameters: Mapping[str, Any]) -> Iterator[_Kind]:
    """Files that are cropped a lot, because the fixed size has another aspect ratio."""
    pictures = [item for item in files if item.kind != "audio"]
    if not pictures or parameters.get("height") is None:
        return
    tests: list[pl.Expr] = []
    for item in pictures:
        # The picture is scaled by the larger ratio. Smaller / larger is the part of the other side,
        # and so of the area, that is left after cropping.
        wide, tall = _ratios(item)
        apart = wide / tall
        least, most = (apart.list.min(), apart.list.max()) if item.many else (apart, apart)
        tests.append((least < 1 - _CROPPED) | (most > 1 / (1 - _CROPPED)))
    yield _Kind(
        pl.any_horizontal(tests),
        "pictures or clips of which more than a third is cropped away, since height and width have "
        "other proportions; without them each keeps its own, and max_pixels bounds the size",
    )


def _ratios(item: Input) -> tuple[pl.Expr, pl.Expr]:
    """Trained width / width and trained height / height of a file; lists for several files."""
    target = pl.col(f"{item.column}:target")

    def ratio(side: str, at: int) -> pl.Expr:
        trained = target.list.eval(pl.element().list.get(at)) if item.many else target.list.get(at)
        return trained / pl.col(f"{item.column}:{side}")

    return ratio("width", 0), ratio("height", 1)
