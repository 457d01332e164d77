"""Samples that are held out: which they are, their loss, and what it decides."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import Values, make_config, train_to_end, write_images
from process_support import two_processes
from safetensors.torch import load_file
from soak_support import result
from test_exports import provenance
from test_resume import never, refusal, stop_after
from test_resume_kills import demo

from diffsynth_dagster.cache.held_out import parts_of
from diffsynth_dagster.cache.manifest import CONTENT_NUMBER, read_manifest
from diffsynth_dagster.demo.digits import write_new_digits
from diffsynth_dagster.facts import digest_file
from diffsynth_dagster.run.events import HeldOutMetrics
from diffsynth_dagster.train import main
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.held_out import memorises


def held_out(run: Path) -> list[dict[str, float]]:
    with (run / "held_out.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def rows_of(run: Path, config: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Identities of the samples that are held out, and of the others."""
    parts = parts_of(make_config({**config, "output_path": str(run)}), read_manifest(run), run)
    assert parts.held_out is not None
    found = [set(part.frame["sample"]) for part in (parts.held_out, parts.trained)]
    return found[0], found[1]


@pytest.mark.parametrize(("split", "count"), [(2, 2), (0.5, None)])
def test_samples_that_are_held_out_are_not_trained_on(
    values: Values, tmp_path: Path, split: float, count: int | None
) -> None:
    config = values(validation_split=split, num_epochs=2)
    run = train_to_end(config, tmp_path / "run")
    out, others = rows_of(run, config)
    assert out.isdisjoint(others)
    assert len(out | others) == 8
    assert count is None or len(out) == count
    record = json.loads((run / "run.json").read_text())
    assert record["steps"] == 2 * -(-len(others) // 4)
    assert [row["step"] for row in held_out(run)] == [0.0, record["steps"] / 2, record["steps"]]


def test_which_samples_are_held_out_stays_when_others_are_added(
    values: Values, tmp_path: Path
) -> None:
    def choose(name: str, count: int) -> set[str]:
        data = write_images(tmp_path / name, count)
        config = values(
            dataset_base_path=str(data),
            dataset_metadata_path=str(data / "metadata.csv"),
            validation_split=0.3,
            cache_path=str(tmp_path / "store"),
        )
        run = train_to_end(config, tmp_path / f"run-{name}")
        return rows_of(run, config)[0]

    few, more = choose("few", 8), choose("more", 14)
    assert few
    assert few < more


def test_copies_of_a_picture_are_held_out_together(values: Values, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 6)
    table = pl.read_csv(data / "metadata.csv")
    again = table.with_columns(prompt=pl.lit("the same picture, said otherwise"))
    pl.concat([table, again]).write_csv(data / "metadata.csv")
    config = values(
        dataset_base_path=str(data),
        dataset_metadata_path=str(data / "metadata.csv"),
        validation_split=2,
        cache_path=str(tmp_path / "store"),
    )
    run = train_to_end(config, tmp_path / "run")
    out, _ = rows_of(run, config)
    assert len(out) == 2
    chosen = read_manifest(run).frame.filter(pl.col("sample").is_in(out))
    assert chosen[CONTENT_NUMBER].n_unique() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation_split": 8}, "of 8 samples none is left to train on"),
        ({"validation_split": 1e-9}, "of 8 samples none is held out"),
        ({"validation_split": 1.5}, "neither a fraction nor a number of samples"),
        ({"keep_best": True}, "keep_best is given, and no samples are held out"),
        (
            {"validation_split": 1, "validation_metadata_path": "x.csv"},
            "both hold out samples",
        ),
        ({"validation_metadata_path": "nowhere.csv"}, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused(
    values: Values, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    assert words in refusal(values(**change, output_path=str(tmp_path / "run")))


def test_a_picture_in_both_tables_is_refused(values: Values, tmp_path: Path) -> None:
    config = values(output_path=str(tmp_path / "run"))
    config["validation_metadata_path"] = config["dataset_metadata_path"]
    said = refusal(config)
    assert "hold out is trained on as well" in said
    assert "rows 1, 2, 3, 4, 5 and 3 more" in said


@pytest.fixture
def with_table(values: Values, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The parameters of a training with six held-out pictures in a table of their own."""

    def make(**more: Any) -> dict[str, Any]:
        config = values(**more)
        data = tmp_path / "both"
        if not data.exists():
            shutil.copytree(config["dataset_base_path"], data)
            others = write_images(tmp_path / "others", 14)
            rows = pl.read_csv(others / "metadata.csv")[8:]
            for name in rows["image"]:
                shutil.copy(others / name, data / f"held-{name}")
            rows = rows.with_columns(pl.format("held-{}", "image").alias("image"))
            rows.write_csv(data / "held.csv")
        config["dataset_base_path"] = str(data)
        config["dataset_metadata_path"] = str(data / "metadata.csv")
        config["validation_metadata_path"] = str(data / "held.csv")
        return config

    return make


def test_a_table_of_its_own_changes_nothing_of_the_training(
    values: Values, with_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    long = {"num_epochs": 4, "lora_dropout": 0.3}
    train_to_end(values(**long), tmp_path / "without")
    run = train_to_end(with_table(**long), tmp_path / "with")
    assert len(held_out(run)) == 5
    for n in range(4):
        one, other = (
            load_file(tmp_path / name / f"epoch-{n}.safetensors") for name in ("without", "with")
        )
        assert all(bool((one[name] == other[name]).all()) for name in one)


def test_the_loss_is_the_same_however_it_is_measured(
    with_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Of the same weights, a trained LoRA: not the seed, nor the size of the batch."""
    first = train_to_end(with_table(learning_rate=1e-2), tmp_path / "first")
    lora = {"lora_checkpoint": str(first / "epoch-0.safetensors")}
    last = held_out(first)[-1]["loss"]
    assert abs(last - held_out(first)[0]["loss"]) > 1e-4
    for name, change in (("seed", {"seed": 3, "num_epochs": 2}), ("batch", {"batch_size": 1})):
        run = train_to_end(with_table(**lora, **change), tmp_path / name)
        found = held_out(run)[0]["loss"]
        assert found == (last if name == "seed" else pytest.approx(last, abs=1e-6))


def test_the_losses_of_ranges_add_up(
    with_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run = train_to_end(with_table(validation_timesteps=5), tmp_path / "run")
    for row in held_out(run):
        ranges = [value for name, value in row.items() if name.startswith("loss_")]
        assert len(ranges) == 5
        assert sum(ranges) / 5 == pytest.approx(row["loss"])
        assert row["gap"] == row["loss"] - row["trained_loss"]


LONG = {
    "num_epochs": 12,
    "learning_rate": 0.3,
    "validation_split": 3,
    "validation_steps": 1,
    "save_steps": 5,
    "keep_best": True,
}


@pytest.fixture(scope="module")
def whole(shared_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a long training that was not stopped."""
    run = train_to_end({**shared_values, **LONG}, tmp_path_factory.mktemp("whole") / "run")
    return run


def test_the_best_weights_are_kept(values: Values, tmp_path: Path, whole: Path) -> None:
    run, measured = whole, held_out(whole)
    best = int(min(measured[1:], key=lambda row: row["loss"])["step"])
    record = json.loads((run / "run.json").read_text())
    assert record["best"] == [f"best-step-{best}.safetensors"]
    assert [p.name for p in run.glob("best-*")] == record["best"]
    assert measured[-1]["best_step"] == best
    every = {"save_steps": 1, "keep_best": None, "validation_steps": 24}
    until = train_to_end(values(**{**LONG, **every}), tmp_path / "until")
    kept, same = load_file(run / record["best"][0]), load_file(until / f"step-{best}.safetensors")
    assert all(bool((kept[name] == same[name]).all()) for name in same)


def test_a_training_without_progress_ends_early(values: Values, tmp_path: Path) -> None:
    config = values(**LONG, early_stopping_patience=2, seed=2, output_path=str(tmp_path / "run"))
    run = train_to_end(config, tmp_path / "run")
    measured = held_out(run)
    last = int(measured[-1]["step"])
    assert last < 24
    assert last - measured[-1]["best_step"] == 2
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]
    assert record["steps"] == last
    assert record["newest"] == [f"step-{last}.safetensors"]
    again = run_training(make_config(config), never)
    assert again is not None
    assert again.steps == last


@pytest.mark.parametrize(
    ("rows", "visits", "every"), [(6, 36, 6), pytest.param(12, 500, 25, marks=pytest.mark.soak)]
)
def test_a_training_that_memorises_keeps_an_earlier_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, visits: int, every: int
) -> None:
    """Few rows of the demo, all of them in each step."""
    data = tmp_path / "digits_new"
    write_new_digits(data)
    new = pl.col("prompt").str.contains("eight|nine")
    for table in (data / "metadata.csv", data / "held_out.csv"):
        pl.read_csv(table).filter(new).head(rows).write_csv(table)
    recipe = demo(
        tmp_path,
        customized_dataset=None,
        customized_evaluation=None,
        sample_prompts=[],
        dataset_repeat=1,
        num_epochs=visits,
        batch_size=rows,
        lr_scheduler="constant",
        validation_steps=every,
        validation_timesteps=2,
        save_steps=visits,
        keep_best=True,
    )
    assert main(["--recipe", str(recipe)]) == 0
    measured = held_out(tmp_path / "run")
    best, last = int(measured[-1]["best_step"]), measured[-1]
    assert last["step"] == visits > best
    then = next(row for row in measured if row["step"] == best)
    assert last["loss"] > then["loss"]
    assert last["trained_loss"] < then["trained_loss"]
    assert last["gap"] > then["gap"] > measured[0]["gap"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (kept,) = record["best"]
    assert kept == f"best-step-{best}.safetensors"
    (exported,) = (tmp_path / "run" / "exports" / "diffusers").glob("*.safetensors")
    assert provenance(exported)["checkpoint"] == record["checkpoints"][kept]
    if visits == 500:
        assert capsys.readouterr().err.count("warning: the model memorises: since step") == 1


def history(*losses: tuple[float, float]) -> list[HeldOutMetrics]:
    """Measurements of (held-out loss, loss of trained samples), one a step from step 0 on."""
    found: list[HeldOutMetrics] = []
    for step, (loss, trained) in enumerate(losses):
        smallest = min(range(1, step + 1), key=lambda n: losses[n][0], default=0)
        found.append(HeldOutMetrics(step, loss, trained, [loss], smallest))
    return found


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        # It memorises: the third measurement in a row that is worse by far says so.
        ([(1.0, 1.0), (0.8, 0.8), (0.85, 0.7), (0.9, 0.6), (0.95, 0.5), (1.0, 0.4)], 4),
        # It goes on learning, with ups and downs.
        (
            [(1.0, 1.0), (0.8, 0.8), (0.9, 0.7), (0.9, 0.7), (0.7, 0.6), (0.8, 0.5), (0.8, 0.4)],
            None,
        ),
        # The loss stays where it is.
        ([(1.0, 1.0), (0.8, 0.8), (0.81, 0.7), (0.82, 0.6), (0.83, 0.5), (0.83, 0.4)], None),
        # It diverges: that of the trained samples rises, too.
        ([(1.0, 1.0), (0.8, 0.8), (0.9, 0.9), (1.0, 1.0), (2.0, 2.0)], None),
        # Before the training it was the smallest: it has learned nothing yet.
        ([(0.5, 1.0), (0.8, 0.8), (0.7, 0.7), (0.65, 0.6), (0.6, 0.5)], None),
    ],
)
def test_memorising_is_said_when_it_is_clear(
    losses: list[tuple[float, float]], first: int | None
) -> None:
    ends = [n for n in range(len(losses)) if memorises(history(*losses)[: n + 1])]
    assert (ends[0] if ends else None) == first


@pytest.mark.parametrize(
    "stops", [[3, 2, 5], *(pytest.param([1] * n, marks=pytest.mark.soak) for n in (1, 6))]
)
def test_a_stopped_training_measures_the_same(
    values: Values, tmp_path: Path, whole: Path, stops: list[int]
) -> None:
    config = values(**LONG, output_path=str(tmp_path / "run"))
    stop_after(config, *stops)
    run_training(make_config(config), never)
    assert result(tmp_path / "run") == result(whole)
    assert held_out(tmp_path / "run") == held_out(whole)


def test_the_losses_of_samples_are_those_of_their_visits(values: Values, tmp_path: Path) -> None:
    run = train_to_end(values(num_epochs=6, dataset_repeat=2), tmp_path / "run")
    found = pl.read_parquet(run / "rows.parquet")
    assert sorted(found["row"]) == list(range(1, 9))
    assert found["visits"].to_list() == [12] * 8
    assert found["difficulty"].is_sorted(descending=True)
    assert found["difficulty"].median() == pytest.approx(1.0, abs=1e-6)
    assert not found["stands_out"].any()


def test_the_second_half_takes_no_other_held_out_table(
    with_table: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first = with_table()
    run, trained = tmp_path / "run", tmp_path / "trained"
    split = {k: v for k, v in first.items() if k != "dataset_metadata_path"}
    second = {**split, "dataset_base_path": str(run), "task": "sft:train"}
    train_to_end({**first, "task": "sft:data_process"}, run)
    other = Path(first["validation_metadata_path"]).with_name("other.csv")
    said = refusal({**second, "validation_metadata_path": str(other), "output_path": str(trained)})
    assert "the data set was encoded with validation_metadata_path = " in said
    assert "held.csv, and now it is " in said
    train_to_end(second, trained)
    assert held_out(trained)
    # Encoded anew without it, the folder has none any more.
    without = {**first, "validation_metadata_path": None, "task": "sft:data_process"}
    train_to_end(without, run)
    said = refusal({**second, "output_path": str(trained)})
    assert "the data set was encoded without the samples that are held out" in said


@pytest.mark.soak
def test_two_processes_keep_the_same_best_weights(values: Values, tmp_path: Path) -> None:
    alone = {**LONG, "num_epochs": 4, "learning_rate": 1e-2, "batch_size": 2}
    train_to_end(values(**alone, gradient_accumulation_steps=2), tmp_path / "alone")
    run = tmp_path / "run"
    config = values(**alone, output_path=str(run))
    done = two_processes(config, tmp_path / "recipe.json")
    assert done.returncode == 0, done.stderr
    one, other = held_out(tmp_path / "alone"), held_out(run)
    assert [row["step"] for row in other] == [row["step"] for row in one]
    for name in ("loss", "trained_loss"):
        assert [r[name] for r in other] == pytest.approx([r[name] for r in one], abs=1e-6)
    record = json.loads((run / "run.json").read_text())
    (best,) = run.glob("best-*")
    assert record["best"] == [best.name]
    assert record["checkpoints"][best.name] == digest_file(best)
