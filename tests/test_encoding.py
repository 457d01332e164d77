"""Encoding that was killed or stopped stores, when it goes on, what it would have stored undisturbed."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Values, make_config, write_images

from diffsynth_dagster.cache import shards
from diffsynth_dagster.cache.shards import ShardWriter
from diffsynth_dagster.cache.store import Store
from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.train import run


class Killed(Exception):
    """Takes the place of SIGKILL: what is on the disk stays, what is not is lost."""


def stored(store: Path) -> dict[tuple[str, str], str]:
    """(key, output) → digest of the bytes that are stored."""
    index = Store(store).index()
    found = {(key, out): d for key, out, d in index["key", "output", "digest"].iter_rows()}
    assert len(found) == index.height, "nothing is stored twice"
    return found


def encode(config: dict[str, Any], store: Path, batches: int | None = None) -> None:
    """Encode into a store, up to a signal after so many batches."""
    left = iter(range(batches - 1 if batches is not None else 10**9))
    run(make_config({**config, "cache_path": str(store)}), lambda: next(left, None) is None)  # pyright: ignore[reportArgumentType]


def test_killed_encoding_goes_on_to_the_same_bytes(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a shard, stopped by a signal after a batch, again and again.

    The pictures have two sizes, so that batches end before they are full, and shards are so small that
    one would end with each sample, or in the middle of the second batch.
    """
    data = write_images(tmp_path / "data", 14, [(32, 32), (48, 32)])
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        task="sft:data_process",
        batch_size=3,
        sample_prompts=["a picture"],
    )
    encode(config, tmp_path / "undisturbed")
    wanted = stored(tmp_path / "undisturbed")

    flush, store, ended = ShardWriter.flush, tmp_path / "store", 0

    def flush_and_die(writer: ShardWriter) -> None:
        flush(writer)
        raise Killed

    for attempt in range(40):
        dies = attempt % 3 != 2
        with monkeypatch.context() as patch:
            patch.setattr(shards, "SHARD_BYTES", 3000 if attempt % 3 else 1)
            if dies:
                patch.setattr(ShardWriter, "flush", flush_and_die)
            try:
                encode(config, store, None if dies else 1)
            except (Killed, Stopped):
                ended += 1
            else:
                break
    assert ended >= 6
    assert stored(store) == wanted
