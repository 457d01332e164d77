"""The columns of a metadata table that a model reads."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffsynth_dagster.data.geometry import Geometry

CAPTION = "prompt"
"""The column of captions of every family."""


@dataclass(frozen=True)
class Input:
    """A column of the metadata that a stage reads.

    Attributes:
        kind: "text" is passed on as str; "number" as int or float; "image" as float32 (3, H, W)
            in [-1, 1]; "video" as float32 (3, F, H, W) in [-1, 1]; "picture" as an RGB Pillow
            image in its own size, for stages that resize it as a published pipeline does. "audio"
            as float32 (channels, samples) in [-1, 1], as long as the sample's clip. "sizes" is no
            column of the data set but made of the first image of the sample: a tuple of six
            integers, its height and width, the top and left edge of what is cropped from it after
            it was resized, and the trained height and width, all in pixels. Every file has the
            trained size of its own; the first file column of a family decides the size of the
            sample.
        many: a row may name several. Files are passed on as a list, and a row that names one gives
            a list of one. Of captions, each visit of a sample is passed one.
        same_size: the file is read at the size and length of the sample.
        pattern: text and numbers only: a regular expression that a value must match, as it is
            written; `wants` says it in words.
        area: pictures only: their trained size has this area in pixels and keeps the picture's
            aspect; see `data.geometry.area_size`.
        caption: text only: it says what the sample shows, so that a visit may be passed another such
            text or none; one column of a family at most.
        weighs: it says how much the sample counts in the loss, not what the sample is: its noise
            and timesteps do not depend on it.
        optional: a row may leave the column empty: then the sample has None.
        divided_by: with `same_size`: the number column whose value both sides are divided by.
        rate, channels: audio only: samples of a channel per second, and channels, that it is read
            with.
    """

    column: str
    kind: Literal["text", "number", "image", "video", "picture", "audio", "sizes"]
    many: bool = False
    same_size: bool = False
    area: int | None = None
    pattern: str = ""
    wants: str = ""
    optional: bool = False
    divided_by: str | None = None
    rate: int = 0
    channels: int = 0
    caption: bool = False
    weighs: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the column names files."""
        return self.kind not in ("text", "number", "sizes")


@dataclass(frozen=True)
class Columns:
    """What is read of every row of a data set.

    Attributes:
        reader: name of the model family that reads it, for messages.
        inputs: every column that is read, once.
        optional: what may be named in `extra_inputs` beside these.
        geometry: the sizes and lengths that the reader takes.
    """

    reader: str
    inputs: tuple[Input, ...]
    optional: tuple[str, ...]
    geometry: Geometry

    @property
    def described(self) -> list[Any]:
        """What of it a checked table depends on, as a JSON value."""
        inputs = [
            [i.column, i.kind, i.many, i.same_size, i.area]
            + [more for more in (i.optional, i.divided_by, i.rate, i.channels) if more]
            for i in self.inputs
        ]
        geometry = asdict(self.geometry)
        del geometry["published_frame_rate"]  # rows are the same whatever it is
        return json.loads(json.dumps([self.reader, inputs, geometry]))

    @property
    def named(self) -> tuple[Input, ...]:
        """The columns that the table has: all but those that are made of a file's sizes."""
        return tuple(i for i in self.inputs if i.kind != "sizes")

    @property
    def files(self) -> tuple[Input, ...]:
        """The columns that name files; the first decides the size of a sample."""
        return tuple(i for i in self.inputs if i.is_file)


def described_inputs(described: Sequence[Any]) -> list[Input]:
    """The columns that a table has, of what `Columns.described` wrote down; without patterns, rates and
    whatever else is not asked for later."""
    return [
        Input(
            column,
            kind,
            many,
            same,
            area=area,
            optional=any(m is True for m in more),
            caption=column == CAPTION,
        )
        for column, kind, many, same, area, *more in (described[1] if described else [])
        if kind != "sizes"
    ]
