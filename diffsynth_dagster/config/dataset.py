"""The data set that is trained on, and the size at which its samples are read."""

from typing import Annotated, cast

from pydantic import BaseModel, BeforeValidator, Field

from diffsynth_dagster.config.declare import Colour, CommaList, parameter
from diffsynth_dagster.config.pairs import read_pairs

Repeats = Annotated[dict[str, Annotated[int, Field(ge=1, le=1000)]], BeforeValidator(read_pairs)]


class DatasetParameters(BaseModel):
    """The data set that is trained on."""

    dataset_base_path: str = parameter(
        "", "Root folder of the data set.", affects="rows", by_content=True
    )
    dataset_metadata_path: str | None = parameter(
        None,
        "Metadata table of the data set: csv, json, jsonl or parquet. The metadata.parquet of a "
        "run folder is used as it was checked there. Or a folder of pictures or clips, with their "
        "captions in text files beside them. Left out: dataset_base_path as such a folder.",
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
        "Extension of the caption files beside the samples, such as .txt, for a table without a caption "
        "column. Left out for a folder without a table: .txt.",
        affects="rows",
        off_by_default=True,
        pattern=r"^\.\w+$",
    )
    caption_prefix: str | None = parameter(
        None,
        "Text, such as a trigger word, that is put before every caption with a space between. For a "
        "sample without a caption it is the whole caption.",
        affects="rows",
        off_by_default=True,
    )
    folder_repeats: Repeats = parameter(
        cast(dict[str, int], {}),
        "How often the samples of a folder are used in each pass over the data set. Folders are named by "
        "their path from dataset_base_path, as JSON or as name=value separated by blanks, such as "
        "portraits=10 style=2; others are used once. Left out for a folder without a table: the numbers "
        "at the beginning of its folders' names, such as 10_portraits.",
        affects="rows",
        off_by_default=True,
    )
    # Affects training, not rows: the table is the same, it is only used more often.
    dataset_repeat: int = parameter(
        1, "How many times an epoch goes through the data set.", affects="training", ge=1
    )
    # Affects nothing: order and noise of the samples do not depend on who reads them.
    dataset_num_workers: int = parameter(
        0,
        "Worker processes that read samples, for each training process.",
        affects="nothing",
        ge=0,
    )
    # The default is two of the largest pictures that are accepted.
    decode_megapixels: int = parameter(
        200,
        "Millions of pixels of pictures and clips that a process decodes at the same time; a larger "
        "file is decoded alone. A million pixels take up to 12 MB of memory.",
        affects="nothing",
        ge=1,
    )
    background: Colour | None = parameter(
        None,
        "Background colour for transparent pixels of pictures and animations, such as white or "
        "#ffffff. Left out: transparency is ignored, and the pixels have their stored colour, which is "
        "often black.",
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
    # Affects nothing: it only decides how changes of files are found.
    verify_content: bool = parameter(
        False,
        "Read and check every file of the data and of the models again, even those that look "
        "unchanged.",
        affects="nothing",
    )
    # Affects rows, since it decides whether a table is accepted.
    max_rejected_fraction: float = parameter(
        0.0,
        "Largest fraction of rows that may be left out because they are unusable.",
        affects="rows",
        ge=0.0,
        le=1.0,
    )
    # Affects nothing: samples are found by their content, in whichever store they are.
    cache_path: str = parameter(
        "./cache",
        "Folder of the store of encoded samples, shared by all trainings.",
        affects="nothing",
        min_length=1,
    )
    # Each half has its own: the second half of split training reads no table that it could make.
    customized_dataset: str | None = parameter(
        None,
        "Dotted path of a function that makes or refreshes the data set. It is called with "
        "dataset_base_path before the metadata is read.",
        affects="rows",
        each_half=True,
    )


class SizeParameters(BaseModel):
    """The size of the samples."""

    height: int | None = parameter(
        None,
        "Height in pixels; with both sides left out, each image has its own size.",
        affects="rows",
        ge=1,
    )
    width: int | None = parameter(
        None,
        "Width in pixels; with both sides left out, each image has its own size.",
        affects="rows",
        ge=1,
    )
    max_pixels: int = parameter(
        1048576,
        "Largest area in pixels when height and width are left out: larger images are "
        "scaled down to it, smaller ones keep their size. Edit images have an area of their own.",
        affects="rows",
        ge=1,
    )
    bucket_step: int | None = parameter(
        None,
        "Round sides down to multiples of this many pixels, so that more images have the "
        "same size and can form batches. Only with height and width left out.",
        affects="rows",
        ge=1,
    )
    num_frames: int | None = parameter(
        None,
        "Frames of a video sample, taken from its beginning. A shorter clip is cut to the "
        "longest length that the family accepts. Left out: the family's usual number.",
        affects="rows",
        ge=1,
    )
    frame_rate: float | None = parameter(
        None,
        "Frames per second that videos are resampled to. Left out: the family's usual rate, or "
        "if it has none, each video's own.",
        affects="rows",
        gt=0.0,
    )
