"""Sizes and lengths of a row's files that depend on another file of the row."""

from collections.abc import Sequence

import polars as pl

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import crop_place
from diffsynth_dagster.data.table.values import STATUS


def _rejected(
    frame: pl.DataFrame, bad: pl.Expr, status: str, message: pl.Expr, **columns: pl.Expr
) -> pl.DataFrame:
    """Reject the rows where `bad` is true, and set further columns."""
    # A row keeps the first reason that it was rejected for.
    rejected = (pl.col("status") == "ok") & bad.fill_null(False)
    return frame.with_columns(
        pl.when(rejected).then(pl.lit(status, STATUS)).otherwise("status").alias("status"),
        pl.when(rejected).then(message).otherwise("message").alias("message"),
        **columns,
    )


def with_same_size(frame: pl.DataFrame, main: Input, item: Input, side_factor: int) -> pl.DataFrame:
    """Train a column's files at the size and length of the main column's file, or at a part of the
    size: see `Input.divided_by`.

    A row is rejected if a clip is shorter than the main one, or if a side of the size becomes 0.

    Args:
        side_factor: width and height are multiples of it.
    """
    assert not main.many, "one file"
    size, length = pl.col(f"{main.column}:target"), pl.col(f"{main.column}:frames")
    frames = pl.col(f"{item.column}:frames")
    if item.divided_by is not None:
        # Divide and round down to the factor in one step.
        part = pl.col(item.divided_by).cast(pl.Float64, strict=False).cast(pl.Int64) * side_factor
        sides = [size.list.get(i) // part * side_factor for i in range(2)]
        why = pl.format("{}: nothing is left of the size", pl.lit(item.column))
        frame = _rejected(frame, sides[0].clip(upper_bound=sides[1]) <= 0, "too_small", why)
        size = pl.concat_list(sides)
    count = frames.list.len()
    if item.kind == "video":
        # Longer clips are cut to the length of the main one.
        shortest = frames.list.min() if item.many else frames
        why = pl.format(
            "{}: {} frames, but the sample is trained at {}", pl.lit(item.column), shortest, length
        )
        as_long = length.repeat_by(count) if item.many else length
        frame = _rejected(
            frame, shortest < length, "too_short", why, **{f"{item.column}:frames": as_long}
        )
    return frame.with_columns(
        (size.repeat_by(count) if item.many else size).alias(f"{item.column}:target")
    )


def with_same_aspect(frame: pl.DataFrame, main: Input, item: Input) -> pl.DataFrame:
    """Reject rows whose picture in a column has another aspect ratio than the main column's file:
    after resizing and cropping, the two would show different parts.

    A difference of one pixel on one side is allowed.
    """
    assert [main.many, item.many] == [False, False], "one file each"
    width, height = (pl.col(f"{main.column}:{side}") for side in ("width", "height"))
    wide, tall = (pl.col(f"{item.column}:{side}") for side in ("width", "height"))
    # Rejected only if neither side is within a pixel of what the other side requires.
    far = ((wide * height / width - tall).abs() > 1) & ((tall * width / height - wide).abs() > 1)
    why = pl.format(
        "{}: {}x{} pixels have other proportions than the {}x{} of {}",
        *(pl.lit(item.column), wide, tall, width, height, pl.lit(main.column)),
    )
    return _rejected(frame, far, "other_proportions", why)


def with_length_of(frame: pl.DataFrame, main: Input, item: Input) -> pl.DataFrame:
    """Make the sound of a column as long as the clip of the main column: `:frames` is the number of
    samples.

    A row is rejected if its sound is shorter than the clip by a frame or more, or if it has sound
    beside a still image.
    """
    assert [main.many, item.many] == [False, False], "one file each"
    # Frames per second as trained: a stride of 2 halves the rate of the file.
    rate = pl.col(f"{main.column}:rate") / pl.col(f"{main.column}:stride")
    seconds, sound_s = pl.col(f"{main.column}:frames") / rate, pl.col(f"{item.column}:seconds")
    still = pl.lit(f"{item.column}: {main.column} is a still image, and has no length for sound")
    frame = _rejected(frame, sound_s.is_not_null() & rate.is_null(), "sound_of_image", still)
    why = pl.format(
        "{}: {} seconds of sound, but the clip has {}",
        pl.lit(item.column),
        sound_s.round(3),
        seconds.round(3),
    )
    samples = (seconds * item.rate).round().cast(pl.Int64)
    given = pl.when(sound_s.is_not_null()).then(samples)
    return _rejected(
        frame,
        sound_s + 1 / rate < seconds,
        "audio_too_short",
        why,
        **{f"{item.column}:frames": given},
    )


def with_size_facts(frame: pl.DataFrame, main: Input, item: Input) -> pl.DataFrame:
    """Add the sizes of the main column's file as text, "height,width,top,left,height,width" in
    pixels: its original size, the corner of the crop after resizing, and its trained size."""
    assert not main.many, "one file"
    parts = [f"{main.column}:{part}" for part in ("width", "height", "target")]
    # Compute them once for each distinct size: there are far fewer of these than rows.
    sizes = frame.select(parts).unique().drop_nulls()
    texts = [_size_facts(width, height, target) for width, height, target in sizes.iter_rows()]
    found = sizes.with_columns(pl.Series(item.column, texts, dtype=pl.String))
    return frame.join(found, on=parts, how="left", maintain_order="left")


def _size_facts(width: int, height: int, target: Sequence[int]) -> str:
    left, top = crop_place(width, height, (target[0], target[1]))
    return ",".join(str(number) for number in (height, width, top, left, target[1], target[0]))


def with_shape(frame: pl.DataFrame, files: Sequence[Input]) -> pl.DataFrame:
    """Add the columns `width`, `height`, `frames` and `shape`: see `CheckedTable`."""
    main = files[0]
    ok = pl.col("status") == "ok"

    def first(column: str) -> pl.Expr:
        value = pl.col(f"{main.column}:{column}")
        return value.list.first() if main.many else value

    target, frames = first("target"), first("frames")
    # Rows of equal shape form a bucket, so the text has the sizes of all files, not of the first.
    shapes = [_shape_of(item).fill_null("none") for item in files]
    return frame.with_columns(
        pl.when(ok).then(target.list.get(0)).otherwise(0).alias("width"),
        pl.when(ok).then(target.list.get(1)).otherwise(0).alias("height"),
        pl.when(ok).then(frames).otherwise(0).alias("frames"),
        pl.when(ok).then(pl.concat_str(shapes, separator=" ")).otherwise(pl.lit("")).alias("shape"),
    )


def _shape_of(item: Input) -> pl.Expr:
    """The trained sizes of a column's files as text: `<width>x<height>` of an image,
    `<width>x<height>x<frames>` of a video, `<rate>x<channels>x<samples>` of sound.

    Sizes of several files are separated by commas. Null if a row names no file.
    """
    target, frames = pl.col(f"{item.column}:target"), pl.col(f"{item.column}:frames")
    if item.many:
        sides = target.list.eval(pl.element().cast(pl.List(pl.String)).list.join("x")).list.join(
            ","
        )
        length = frames.cast(pl.List(pl.String)).list.join(",")
    else:
        sides = target.cast(pl.List(pl.String)).list.join("x")
        length = frames.cast(pl.String)
    timed = item.kind in ("video", "audio")
    return sides if not timed else pl.concat_str([sides, length], separator="x")
