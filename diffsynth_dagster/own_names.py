"""The names of the files that this project writes into a run folder and into a store.

No other file is ever replaced or removed there. Every new output must be added here:
`tests/test_paths.py` checks all files that a training leaves.
"""

import re

_CHECKPOINT = r"(?P<kind>epoch|step|best-step)-(?P<number>\d{1,18})(?:-[^/]+)?\.safetensors"
_SAMPLE = r"samples/(?:step-\d+(?:-\d+)?|(?:before|after)-[^/]+)\.(?:png|mp4)"
_OLDER = r"older/\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:-\d+)?"
LISTING = "exports/exported.json"
"""The list of exported files, written at the end of an export: see `export.listing`."""
_VERSION = r"[0-9a-f]{12}"
_PROMOTED = rf"exports/(?:current|promoted/{_VERSION})/.+|exports/promoted/\.lock"
_TABLE = r"metadata\.parquet|\.metadata\.encoded\.parquet|rejected\.csv|long_captions\.parquet"
_MANIFEST = r"samples\.parquet|\.samples\.planned\.parquet"
_OTHERS = "|".join(
    [
        r"config\.yaml|run\.json|metrics\.csv|loss\.csv|held_out\.csv|(?:rows|sample_losses)\.parquet",
        r"report\.html",
        rf"(?:\.tables/)?(?:held_out/)?(?:{_TABLE}|{_MANIFEST})",
        r"\.(?:trained|held_out|compared)\.parquet",
        r"\.(?:samples|held_out|compared|sampled|evaluated)\.(?:records|bin|captions|json)",
        r"\.lock|\.owner\.json",
        # Any file in these folders belongs to the project.
        r"(?:state/step-\d+|\.prompts|\.sampled|\.evaluated|exports/(?:diffusers|comfyui|guide|kohya|peft|authors))/.+",
        rf"exports/(?:README\.md|loss\.svg)|{re.escape(LISTING)}",
        _PROMOTED,
    ]
)
OWN = rf"(?s)^(?:(?:{_OLDER}|\.older)/)?(?:{_CHECKPOINT}|{_SAMPLE}|{_OTHERS})$"
"""Pattern of a file's path relative to the run folder. Polars uses it too, so it must be valid in
Rust's syntax of regular expressions (no look-around)."""
OLDER = re.compile(_OLDER)
"""Pattern of the folder of an older training, which is a run folder itself: see `older.py`."""
VERSION = re.compile(_VERSION)
"""Pattern of the folder of a promoted version: see `promoted.py`."""
CHECKPOINT = re.compile(_CHECKPOINT)
"""Pattern of a checkpoint, with the groups `kind` and `number` (of the epoch or step)."""
_TRAINED = re.compile(f"{_CHECKPOINT}|{_SAMPLE}")
_OWN = re.compile(OWN)
_IS_PROMOTED = re.compile(rf"(?s)(?:{_PROMOTED})")
_OF_A_STORE = re.compile(
    r"shards/[0-9a-f]{32}\.safetensors|index/[0-9a-f]{32}\.parquet|users/[0-9a-f]{32}\.json"
)


def is_own(name: str) -> bool:
    """Whether this project wrote a file, given by its path relative to the run folder."""
    return _OWN.fullmatch(name) is not None


def is_trained(name: str) -> bool:
    """Whether a file, given by its path relative to the run folder, is a checkpoint or a sample."""
    return _TRAINED.fullmatch(name) is not None


def is_older(name: str) -> bool:
    """Whether a file, given by its path relative to the run folder, is of an older training."""
    return is_own(name) and OLDER.match(name) is not None


def is_promoted(name: str) -> bool:
    """Whether a file, given by its path relative to the run folder, belongs to a promoted version.

    No training replaces such a file.
    """
    return _IS_PROMOTED.fullmatch(name) is not None


def is_of_store(name: str) -> bool:
    """Whether a file, given by its path relative to a store, is a shard, its index, or the note of
    a run folder that uses the store."""
    return _OF_A_STORE.fullmatch(name) is not None
