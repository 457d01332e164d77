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

    Each file of a row is read at a size of its own. The first file column of a family decides the
    size of the sample.

    Attributes:
        kind: what a stage is given:
            "text": str;
            "number": int or float;
            "image": float32 (3, H, W) in [-1, 1];
            "video": float32 (3, F, H, W) in [-1, 1];
            "picture": an RGB Pillow image in its original size, for stages that resize it as a
            published pipeline does;
            "audio": float32 (channels, samples) in [-1, 1], as long as the sample's clip;
            "sizes": not a column of the data set, but six integers computed from the first image of
            the sample, in pixels: its height and width, the top and left edge of the crop after
            resizing, and the trained height and width.
        many: a row may name several values. Files are passed as a list, of length one if the row
            names one file. For captions, each visit of a sample is passed one of them.
        same_size: the file is read at the size and length of the sample.
        pattern: text and numbers only: a regular expression that the written value must match;
            `wants` describes it in words.
        area: pictures only: their trained size has this area in pixels and keeps the aspect ratio;
            see `data.geometry.area_size`.
        caption: text only: the column describes the sample, so a visit may be passed another
            caption or none. A family has at most one such column.
        weighs: the column says how much (parts of) the sample count in the loss, not what the
            sample is. Noise and timesteps do not depend on it.
        optional: a row may leave the column empty; a stage is then given None.
        divided_by: with `same_size`: the number column whose value both sides are divided by.
        rate, channels: audio only: samples per second of each channel and number of channels that
            sound is read with.
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
    """The columns that a model family reads from a data set.

    Attributes:
        reader: name of the model family, for messages.
        inputs: every column that is read, once.
        optional: further columns that may be named in `extra_inputs`.
        geometry: the sizes and lengths that the family takes.
    """

    reader: str
    inputs: tuple[Input, ...]
    optional: tuple[str, ...]
    geometry: Geometry

    @property
    def described(self) -> list[Any]:
        """The facts that a checked table depends on, as a JSON value for `described_inputs`."""
        inputs = [
            # The newer attributes are appended only if set: tables that were checked before these
            # attributes existed stay valid.
            [i.column, i.kind, i.many, i.same_size, i.area]
            + [extra for extra in (i.optional, i.divided_by, i.rate, i.channels) if extra]
            for i in self.inputs
        ]
        geometry = asdict(self.geometry)
        del geometry["published_frame_rate"]  # used for warnings only
        # Through JSON, so that tuples become lists as they are in a table read from disk.
        return json.loads(json.dumps([self.reader, inputs, geometry]))

    @property
    def named(self) -> tuple[Input, ...]:
        """The columns that the metadata table must have: all but "sizes", which are computed."""
        return tuple(i for i in self.inputs if i.kind != "sizes")

    @property
    def files(self) -> tuple[Input, ...]:
        """The columns that name files; the first decides the size of a sample."""
        return tuple(i for i in self.inputs if i.is_file)


def described_inputs(described: Sequence[Any]) -> list[Input]:
    """The columns of a checked table, recovered from `Columns.described`. Attributes that nobody
    asks for after the check, such as patterns and rates, are missing."""
    return [
        Input(
            column,
            kind,
            many,
            same,
            area=area,
            optional=any(value is True for value in extra),  # the only boolean among the extras
            caption=column == CAPTION,
        )
        for column, kind, many, same, area, *extra in (described[1] if described else [])
        if kind != "sizes"
    ]
