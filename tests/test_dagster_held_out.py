"""Held-out samples in Dagster: their loss is on the page, and other rows are another training."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from conftest import Values, write_images
from dagster_support import definitions_of, write_recipe
from process_support import forked_launches


@pytest.mark.soak
def test_other_held_out_rows_are_trained_with(values: Values, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 12)
    rows = pl.read_csv(data / "metadata.csv")
    rows[:8].write_csv(data / "metadata.csv")
    held_out = data / "held_out.csv"
    rows[8:].write_csv(held_out)
    recipe = {
        **values(num_epochs=2, keep_best=True),
        "dataset_base_path": str(data),
        "dataset_metadata_path": str(data / "metadata.csv"),
        "validation_metadata_path": str(held_out),
        "output_path": str(tmp_path / "run"),
    }
    write_recipe(tmp_path / "recipes", "tiny", recipe)
    job = definitions_of(tmp_path / "recipes").resolve_job_def("train_tiny")
    with forked_launches(), dg.instance_for_test(temp_dir=str(tmp_path)) as instance:

        def run() -> dict[str, dg.AssetMaterialization]:
            done = job.execute_in_process(instance=instance, raise_on_error=False)
            assert done.success
            made = (event.materialization for event in done.get_asset_materialization_events())
            return {each.asset_key.path[-1]: each for each in made}

        first, again = run(), run()
        facts: dict[str, Any] = dict(first["checkpoints"].metadata)
        assert facts["trained_samples"].value == "8"
        assert facts["held_out_loss"].value > 0
        steps = [row.data["step"] for row in facts["held_out"].records]
        assert steps == [0, 2, 4]
        assert str(facts["held_out_curve"].value).startswith("![](data:image/")
        assert "difficulty" in str(facts["hardest_samples"].value)
        assert first["latents"].metadata["dagster/row_count"].value == 8
        assert not again["checkpoints"].metadata["trained_in_this_run"].value

        tables = ["metadata.parquet", "samples.parquet"]
        tables = [tmp_path / "run" / place / name for place in ("", "held_out") for name in tables]
        before = [path.read_bytes() for path in tables]
        assert "moved_to" not in {**facts, **again["checkpoints"].metadata}
        rows[8:11].write_csv(held_out)
        other = run()
    assert versions(again, "metadata", "latents") == versions(first, "metadata", "latents")
    for name in ("metadata", "latents"):
        assert versions(other, name) != versions(first, name)
    assert other["checkpoints"].metadata["trained_in_this_run"].value
    # The training before keeps its own tables, though the assets made others before it was moved.
    older = Path(str(other["checkpoints"].metadata["moved_to"].value))
    assert older.parent == tmp_path / "run" / "older"
    assert [(older / path.relative_to(tmp_path / "run")).read_bytes() for path in tables] == before
    assert [path.read_bytes() for path in tables] != before


def versions(made: dict[str, dg.AssetMaterialization], *names: str) -> list[str]:
    return [(made[name].tags or {})["dagster/data_version"] for name in names]
