"""What a run folder keeps between its steps: damage to any byte of it is found."""

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Values, record_of, train_to_end, why_refused
from damage_support import DAMAGE
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth_dagster.data.table.checked_table import find_checked, write_checked
from diffsynth_dagster.data.table.validate import CheckedTable
from diffsynth_dagster.errors import MetadataError, OutputError
from diffsynth_dagster.run.record import RunRecord, read_record
from diffsynth_dagster.seal import seal_is_broken, write_sealed

FRAME = pl.DataFrame({"row": range(200), "prompt": [f"picture number {n}" for n in range(200)]})
NOTES = {"diffsynth_dagster": json.dumps({"digest": "0123", "samples": 200})}


def sealed(path: Path) -> Path:
    return write_sealed(path, lambda file, notes: FRAME.write_parquet(file, metadata=notes), NOTES)


def content(path: Path) -> Any:
    return pl.read_parquet(path).to_dict(), pl.read_parquet_metadata(path)["diffsynth_dagster"]


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damage_to_a_sealed_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Or it cannot be read at all, or only the seal is gone and the content is what was written."""
    source = random.Random(seed)
    path = sealed(tmp_path_factory.mktemp("sealed") / "file.parquet")
    before = path.read_bytes()
    assert not seal_is_broken(path)
    after = source.choice(DAMAGE)(before, source)
    path.write_bytes(after)
    if after == before or seal_is_broken(path):
        return
    try:
        read = content(path)
    except (pl.exceptions.PolarsError, KeyError, OSError):
        return
    assert {name: list(column) for name, column in read[0].items()} == {
        name: list(column) for name, column in FRAME.to_dict().items()
    }
    assert read[1] == NOTES["diffsynth_dagster"]


def test_equal_content_is_sealed_alike(tmp_path: Path) -> None:
    assert sealed(tmp_path / "a").read_bytes() == sealed(tmp_path / "b").read_bytes()


def test_files_without_a_seal_are_taken_as_they_are(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(b"this is no table" * 9)
    assert not any(seal_is_broken(path) for path in tmp_path.iterdir())


def change(path: Path, old: bytes, new: bytes) -> None:
    before = path.read_bytes()
    assert len(old) == len(new)
    assert before.count(old) > 0
    path.write_bytes(before.replace(old, new, 1))


def test_a_checked_table_that_was_damaged_is_not_encoded(tmp_path: Path) -> None:
    rows = FRAME.lazy().with_columns(status=pl.lit("ok"), message=pl.lit(""))
    write_checked(CheckedTable(rows, source="s", parameters={}, data={}, read_as=""), tmp_path)
    path = tmp_path / "metadata.parquet"
    assert find_checked(path) is not None
    change(path, b'"source": "s"', b'"source": "t"')
    with pytest.raises(MetadataError, match="the checked table is damaged") as caught:
        find_checked(path)
    assert caught.value.where == str(path)


def test_samples_that_were_damaged_are_not_trained_on(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_to_end(values(), run, "--task", "sft:data_process")
    change(run / "samples.parquet", b'"samples": 8', b'"samples": 9')
    second = values(dataset_metadata_path=None, dataset_base_path=str(run))
    capsys.readouterr()
    error = why_refused(second, tmp_path / "second", "--task", "sft:train")
    assert "the list of encoded samples is damaged" in error
    assert f"where: {run / 'samples.parquet'}" in error
    train_to_end(values(), run, "--task", "sft:data_process")
    train_to_end(second, tmp_path / "second", "--task", "sft:train")


def test_a_record_that_was_damaged_is_not_believed(values: Values, tmp_path: Path) -> None:
    """What it says becomes part of the exports."""
    run = tmp_path / "run"
    train_to_end(values(), run)
    record = record_of(run)
    assert record.lora == {"rank": 4, "alpha": 4}
    change(run / "run.json", b'"alpha": 4', b'"alpha": 6')
    with pytest.raises(OutputError, match="its content has changed") as caught:
        read_record(run)
    assert caught.value.where == str(run / "run.json")
    assert "remove it" in (caught.value.do or "")


def test_records_of_older_versions_are_read(tmp_path: Path) -> None:
    said = {"identity": "i", "family": "f", "trained": [], "base": {}, "samples": 1}
    said |= {"samples_digest": "d", "config_digest": "c", "lora": None}
    (tmp_path / "run.json").write_text(json.dumps(said))
    assert read_record(tmp_path) == RunRecord(**said, training_version=0)
