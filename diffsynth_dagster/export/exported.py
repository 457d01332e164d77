"""`Exported`, an exported file, and what all modules that handle exports share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffsynth_dagster.errors import WeightsError
from diffsynth_dagster.facts import digest_file, digest_of
from diffsynth_dagster.families.lora import Lora, LoraFormat
from diffsynth_dagster.files import refusals, remove, require_held

ExportFormat = LoraFormat | Literal["authors"]


@dataclass(frozen=True)
class Exported:
    """An exported file that another tool loads, or a model in several shards.

    Attributes:
        path: the file; for shards, their index file.
        format: for a LoRA, see `formats`. For a module trained in full, "diffusers", or "authors"
            for the layout of the files that it was loaded from.
        components: the components in it: one, or several that have a LoRA.
        kind: "lora" or "full".
        digest: BLAKE3 of the file; for shards, the digest of the digests of all files.
        tensors, bytes: the count and size, summed over all files.
        trained: component → its trained LoRA, which the loaded file must reproduce.
    """

    path: Path
    format: ExportFormat
    components: tuple[str, ...]
    kind: str
    digest: str
    tensors: int
    bytes: int
    trained: Mapping[str, Lora] = field(default_factory=dict[str, Lora], compare=False, repr=False)


def digest_of_files(paths: Sequence[Path]) -> str:
    """The digest of one file, or of the names and contents of several."""
    if len(paths) == 1:
        return digest_file(paths[0])
    digests: Mapping[str, str] = {path.name: digest_file(path) for path in paths}
    return digest_of(digests)


def remove_older(path: Path) -> None:
    """Remove a file of an older export. Raises `OutputError` if it cannot be removed."""
    require_held(path)
    with refusals("what an older export left cannot be removed", path):
        remove(path)


def unloadable(exported: Exported, why: str) -> WeightsError:
    """The error for an exported file that its tool cannot load."""
    return WeightsError(
        f"the exported file does not load in {exported.format}: {why}",
        where=str(exported.path),
        do="report this with the recipe; the checkpoint beside it is unharmed",
    )
