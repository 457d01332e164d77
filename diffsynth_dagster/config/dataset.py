"""What is trained on: the data set, and the size at which its samples are read."""

from typing import Annotated, cast

from pydantic import BaseModel, BeforeValidator, Field

from diffsynth_dagster.config.kinds import Colour, CommaList, parameter
from diffsynth_dagster.config.pairs import read_pairs

Repeats = Annotated[dict[str, Annotated[int, Field(ge=1, le=1000)]], BeforeValidator(read_pairs)]


class DatasetParameters(BaseModel):
    """What is trained on."""

    dataset_base_path: str = parameter(
        "", "Root folder of the data set.", affects="rows", by_content=True
    )
    dataset_metadata_path: str | None = parameter(
        None,
        "Metadata table of the data set: csv, json, jsonl or parquet. The metadata.parquet of a "
        "run folder is taken as it was checked there. A folder, or left out for dataset_base_path: "
        "its pictures or clips, with their captions in text files beside them.",
        affects="rows",
        by_content=True,
    )
    metadata_encoding: str = parameter(
        "utf-8",
        "Encoding of a csv, json or jsonl table, and of caption files; a byte-order mark is skipped.",
        affects="rows",
    )
    caption_extension: str | None = parameter(
        None,
        "Extension of the text files beside the samples that hold their captions, such as .txt: for a "
        "table that has no column of captions. A folder without a table has .txt where this is left out.",
        affects="rows",
        off_by_default=True,
        pattern=r"^\.\w+$",
    )
    caption_prefix: str | None = parameter(
        None,
        "Text, such as a trigger word, that is put before every caption with a space between; a sample "
        "without a caption is told this alone.",
        affects="rows",
        off_by_default=True,
    )
    folder_repeats: Repeats = parameter(
        cast(dict[str, int], {}),
        "How often each pass over the data set takes the samples of a folder, by its path from "
        "dataset_base_path, as JSON or as name=value with blanks between, such as portraits=10 style=2; "
        "1 for the others. Left out for a folder without a table: as the names of the folders in it say, "
        "such as 10_portraits.",
        affects="rows",
        off_by_default=True,
    )
    dataset_repeat: int = parameter(
        1, "How many times an epoch goes through the data set.", affects="training", ge=1
    )
    dataset_num_workers: int = parameter(
        0,
        "Worker processes that read samples, for each training process.",
        affects="nothing",
        ge=0,
    )
    # Of the largest pictures that are read, two at a time.
    decode_megapixels: int = parameter(
        200,
        "Pixels of pictures and clips, in millions, that a process decodes at a time; a file of "
        "more is decoded alone. A million take up to 12 MB of memory.",
        affects="nothing",
        ge=1,
    )
    background: Colour | None = parameter(
        None,
        "Colour, such as white or #ffffff, that transparent pixels of pictures and animations are "
        "laid on; left out, the colour that lies beneath them is read, which is often black.",
        affects="rows",
        off_by_default=True,
    )
    data_file_keys: CommaList = parameter(
        ("image", "video"),
        "Columns of the metadata that name files, separated by commas.",
        affects="rows",
    )
    allow_outside_base_path: bool = parameter(
        False, "Accept files that lie outside dataset_base_path.", affects="rows"
    )
    # Nothing: it is how a change of the files is found, not a change.
    verify_content: bool = parameter(
        False,
        "Read and check every file of the data and of the models again, also those that look "
        "unchanged.",
        affects="nothing",
    )
    # Of the rows, since it decides whether a table is accepted.
    max_rejected_fraction: float = parameter(
        0.0,
        "Largest fraction of rows that may be left out because they are unusable.",
        affects="rows",
        ge=0.0,
        le=1.0,
    )
    cache_path: str = parameter(
        "./cache",
        "Folder of the store of encoded samples, shared by all trainings.",
        affects="nothing",
        min_length=1,
    )
    # The second half of split training has no table that this could make.
    customized_dataset: str | None = parameter(
        None,
        "Dotted path of a function that is called with dataset_base_path before the "
        "metadata is read, to make or refresh the data set.",
        affects="rows",
        each_half=True,
    )


class SizeParameters(BaseModel):
    """The size of what is trained on."""

    height: int | None = parameter(
        None,
        "Height in pixels; leave both sides out for the image's own size.",
        affects="rows",
        ge=1,
    )
    width: int | None = parameter(
        None,
        "Width in pixels; leave both sides out for the image's own size.",
        affects="rows",
        ge=1,
    )
    max_pixels: int = parameter(
        1048576,
        "Largest area in pixels when height and width are left out: larger images are "
        "scaled down to it, smaller ones stay as they are. Edit images have an area of their own.",
        affects="rows",
        ge=1,
    )
    bucket_step: int | None = parameter(
        None,
        "Round sides down to multiples of this many pixels, so that more images have "
        "the same size and form batches; for height and width left out.",
        affects="rows",
        ge=1,
    )
    num_frames: int | None = parameter(
        None,
        "Frames of a video sample: its first ones. A shorter clip is cut to the "
        "longest length that the family takes; the family's usual number when left out.",
        affects="rows",
        ge=1,
    )
    frame_rate: float | None = parameter(
        None,
        "Frames per second that videos are resampled to; the family's usual rate, or "
        "else each video's own, when left out.",
        affects="rows",
        gt=0.0,
    )
