"""The caption that a visit of a sample is told: one of several, or the empty one."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import Values, make_config, samples_of, train_to_end, why_refused, write_images
from families.qwen_image.cases import CASES as QWEN
from hypothesis import given
from hypothesis import strategies as st
from process_support import two_processes
from safetensors.torch import load_file
from test_resume import never, stop_after

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.tag_orders import TagOrders
from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.samples import PARTS, load_files
from diffsynth_dagster.objective.captions import caption_index
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ResolvedModel

CAPTIONS = [["a cat, red"], ["a dog", "an animal that barks", "a"], ["a"], ["two", "twins"]]
FORMATS = ("csv", "json", "jsonl", "parquet")


def write_table(folder: Path, prompts: Sequence[Any], kind: str = "jsonl") -> Path:
    """A row for each value of the caption column; as json text in a csv."""
    rows = [{"image": f"{n}.png", "prompt": value} for n, value in enumerate(prompts)]
    path = folder / f"captions.{kind}"
    if kind == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif kind == "csv":
        texts = [v if isinstance(v, str) else json.dumps(v) for v in prompts]
        pl.DataFrame({"image": [r["image"] for r in rows], "prompt": texts}).write_csv(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def listed(values: Values, tmp_path: Path) -> dict[str, Any]:
    """A training on four pictures, some with several captions."""
    folder = write_images(tmp_path / "pictures", len(CAPTIONS))
    table = write_table(folder, CAPTIONS)
    return values(
        dataset_base_path=str(folder),
        dataset_metadata_path=str(table),
        cache_path=str(tmp_path / "cache"),  # others have pictures of equal content
        caption_lists=True,
        batch_size=2,
        num_epochs=4,
    )


@dataclass(frozen=True)
class Encoded:
    """A run folder whose samples are encoded."""

    config: TrainingConfig
    found: ResolvedModel
    run: Path

    def data(self, rank: int = 0, world: int = 1, **changed: Any) -> StepDataset:
        config = self.config.model_copy(update=changed)
        return StepDataset(config, self.found, samples_of(self.run), rank, world)

    def visits(self, data: StepDataset, epochs: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row, and what is handed of it, of every sample of some epochs."""
        for step in range(epochs * data.order.steps_per_epoch):
            for visit in (visit for micro in data.order.step(step) for visit in micro):
                batch = data._batch([visit], "dit", 1.0)
                row = data._samples.at(visit.bucket, visit.index).row
                handed = {name: tensor[0] for name, tensor in batch.outputs.items()}
                yield row, handed | batch.inputs[0]

    def made(self, stage: str, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What a stage makes of a sample, by the stage itself."""
        own = self.found.family.stage(stage)
        models = Models(self.found, torch.device("cpu"), torch.float32, False, frozenset())
        with torch.no_grad():
            return own.run(models.get(own.uses), [sample])[0]


def encoded(values: dict[str, Any], tmp_path: Path) -> Encoded:
    run = train_to_end(values, tmp_path / "encoded", "--task", "sft:data_process")
    config = make_config({**values, "output_path": str(run)})
    return Encoded(config, find_model(config, ModelHub(tmp_path, skip_download=True)), run)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_captions_are_drawn_evenly_and_dropped_at_the_rate(count: int, dropout: float) -> None:
    n = 4000
    drawn = [caption_index(1, "a", visit, count, dropout) for visit in range(n)]
    expected = [(1 - dropout) / count] * count + [dropout]
    for index, part in enumerate(expected):
        spread = 4 * (n * part * (1 - part)) ** 0.5
        assert abs(drawn.count(index) - n * part) <= spread


@given(st.integers(0, 2**40), st.text(), st.integers(0, 10**6), st.integers(1, 9), st.floats(0, 1))
def test_a_caption_depends_on_nothing_but_its_arguments(
    seed: int, sample: str, visit: int, count: int, dropout: float
) -> None:
    first = caption_index(seed, sample, visit, count, dropout)
    torch.manual_seed(visit)
    assert caption_index(seed, sample, visit, count, dropout) == first
    assert 0 <= first <= (count if dropout else count - 1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_visit_is_told_what_a_caption_is_encoded_to(
    listed: dict[str, Any], tmp_path: Path, dropout: float
) -> None:
    place = encoded({**listed, "caption_dropout_rate": dropout}, tmp_path)
    texts = {text for own in CAPTIONS for text in own} | {""}
    embeds = {text: place.made("prompt", {"prompt": text})["prompt_embeds"] for text in texts}
    told: dict[int, list[str]] = {}
    for row, handed in place.visits(place.data(), 40):
        own = handed["prompt_embeds"]
        (text,) = (t for t, e in embeds.items() if e.shape == own.shape and torch.allclose(e, own))
        told.setdefault(row, []).append(text)
    for row, captions in enumerate(CAPTIONS, 1):
        assert len(told[row]) == 40
        assert set(told[row]) <= {*captions, *([""] if dropout else [])}
    seen = {text for own in told.values() for text in own}
    assert seen == texts if dropout else seen == texts - {""}


def test_tags_are_told_in_several_orders(values: Values, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", 3)
    prompts = ["1girl, red, sky, sea", "one,two", "alone"]
    table = write_table(folder, prompts)
    given = values(
        dataset_base_path=str(folder),
        dataset_metadata_path=str(table),
        cache_path=str(tmp_path / "cache"),
        caption_prefix="ohwx",
        shuffle_tags=True,
        keep_tags=1,
        tag_orders=6,
    )
    place = encoded(given, tmp_path)
    lists = read_manifest(place.run).frame["key:prompt"].to_list()
    assert [len(keys) for keys in lists] == [6, 6, 6]
    assert [len(set(keys)) for keys in lists][1:] == [
        2,
        1,
    ]  # "one,two" and "one, two" are two texts
    rest = [", ".join(order) for order in permutations(["red", "sky", "sea"])]
    expected = [
        {f"ohwx 1girl, {order}" for order in rest},
        {"ohwx one,two", "ohwx one, two"},
        {"ohwx alone"},
    ]
    embeds = {
        text: place.made("prompt", {"prompt": text})["prompt_embeds"]
        for texts in expected
        for text in texts
    }
    told: dict[int, list[str]] = {}
    for row, handed in place.visits(place.data(), 40):
        own = handed["prompt_embeds"]
        (text,) = (t for t, e in embeds.items() if e.shape == own.shape and torch.equal(e, own))
        told.setdefault(row, []).append(text)
    assert all(set(told[row]) <= expected[row - 1] for row in told)
    assert len(set(told[1])) > 2
    assert len(set(told[2])) == 2


@given(st.text(), st.integers(2, 9), st.integers(0, 4))
def test_an_order_of_tags_holds_the_same_tags(caption: str, count: int, kept: int) -> None:
    def tags(text: str) -> list[str]:
        return [tag for tag in (part.strip() for part in text.split(",")) if tag]

    orders = TagOrders(count, kept).of(caption)
    assert orders[0] == caption
    assert len(orders) == count
    for order in orders:
        assert sorted(tags(order)) == sorted(tags(caption))
        assert tags(order)[:kept] == tags(caption)[:kept]
    assert TagOrders(count, kept).of(caption) == orders


@pytest.mark.parametrize("kind", FORMATS)
def test_lists_are_read_from_every_format(
    listed: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    folder = Path(listed["dataset_base_path"])
    table = write_table(folder, CAPTIONS, kind)
    place = encoded({**listed, "dataset_metadata_path": str(table)}, tmp_path)
    same = encoded(listed, tmp_path / "jsonl")
    assert read_manifest(place.run).digest == read_manifest(same.run).digest


def test_texts_and_lists_stand_together(listed: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(listed["dataset_base_path"])
    mixed = [own[0] if len(own) == 1 else own for own in CAPTIONS]
    for kind in ("csv", "json", "jsonl"):
        table = write_table(folder, mixed, kind)
        place = encoded({**listed, "dataset_metadata_path": str(table)}, tmp_path / kind)
        lists = read_manifest(place.run).frame["key:prompt"].list.len().to_list()
        assert lists == [len(own) for own in CAPTIONS]


def test_rows_without_a_caption_are_rejected(listed: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(listed["dataset_base_path"])
    for n in range(4, 9):
        (folder / f"{n}.png").write_bytes((folder / "0.png").read_bytes())
    prompts = [["a"], [], ["a", " "], None, ["a", None], {"a": 1}, ["a", "‍"], "text", True]
    table = write_table(folder, prompts)
    more = {"dataset_metadata_path": str(table), "max_rejected_fraction": 0.9}
    place = encoded({**listed, **more}, tmp_path)
    checked = pl.read_parquet(place.run / "metadata.parquet")
    assert checked["status"].to_list() == [
        "ok",
        *["empty_caption"] * 4,
        "wrong_type",
        "empty_caption",
        "ok",
        "wrong_type",
    ]
    assert (
        checked["message"][1] == "prompt: the caption is empty: it holds nothing that can be seen"
    )


def test_a_list_is_refused_where_it_is_not_asked_for(
    listed: dict[str, Any], tmp_path: Path
) -> None:
    assert "prompt: the value is of another type than the column's" in why_refused(
        {**listed, "caption_lists": False}, tmp_path / "run"
    )


def test_one_caption_is_trained_as_without_lists(values: Values, tmp_path: Path) -> None:
    """The same samples, noise and captions, though they lie in lists; a drop at every millionth visit
    changes nothing either."""
    ends: list[dict[str, torch.Tensor]] = []
    for number, more in enumerate(({}, {"caption_lists": True}, {"caption_dropout_rate": 1e-9})):
        run = train_to_end(values(**more), tmp_path / str(number))
        ends.append(load_file(run / "epoch-0.safetensors"))
    for other in ends[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in ends[0].items())


def test_captions_are_dropped_in_front_of_a_text_encoder_that_is_trained(
    listed: dict[str, Any], tmp_path: Path
) -> None:
    config = {k: v for k, v in listed.items() if not k.startswith("lora_")}
    given = {**config, "trainable_models": ["text_encoder"], "caption_dropout_rate": 0.4}
    place = encoded({**given, "learning_rate": 1e-5}, tmp_path)
    told: dict[int, set[str]] = {}
    for row, handed in place.visits(place.data(), 20):
        told.setdefault(row, set()).add(handed["prompt"])
    assert told == {row: {*own, ""} for row, own in enumerate(CAPTIONS, 1)}
    train_to_end({**given, "num_epochs": 1}, tmp_path / "run")


def test_an_edit_keeps_its_picture_where_the_text_is_dropped(tmp_path: Path) -> None:
    (case,) = (case for case in QWEN if case.name == "qwen_image_edit")
    case.write(tmp_path / "model")
    table = case.rows(tmp_path / "data")
    values = {
        "family": case.family,
        "dataset_base_path": str(table.parent),
        "dataset_metadata_path": str(table),
        "lora_base_model": "dit",
        "cache_path": str(tmp_path / "cache"),
        "caption_dropout_rate": 0.5,
        **case.models(tmp_path / "model", "diffusers"),
        **case.parameters,
    }
    place = encoded(values, tmp_path)
    checked = pl.read_parquet(place.run / "metadata.parquet")
    (pictures,) = (i for i in place.found.family.inputs if i.kind == "picture")
    keys = read_manifest(place.run).frame["key:edit_prompt"]
    assert len(set(keys.explode())) == 2 * checked.height
    dropped = 0
    for row, handed in place.visits(place.data(), 3):
        line = checked.row(row - 1, named=True)
        shown = load_files({p: line[f"edit_image:{p}"] for p in PARTS}, pictures, row)
        made = [
            place.made("edit_prompt", {"prompt": text, "edit_image": shown})["prompt_embeds"]
            for text in (line["prompt"], "")
        ]
        alike = [e.shape == handed["prompt_embeds"].shape for e in made]
        number = alike.index(True)
        torch.testing.assert_close(handed["prompt_embeds"], made[number])
        dropped += number
    assert 0 < dropped < 12


def test_captions_do_not_depend_on_processes_or_batches(
    listed: dict[str, Any], tmp_path: Path
) -> None:
    place = encoded({**listed, "caption_dropout_rate": 0.3, "shuffle_tags": True}, tmp_path)

    def told(*parts: StepDataset) -> dict[tuple[str, int], float]:
        """Sample and visit → the sum of what its caption is encoded to, in three epochs."""
        batches = [
            batch
            for part in parts
            for step in range(part.order.steps_per_epoch * 3)
            for batch in part[step]
            if batch.scale
        ]
        return {
            (sample, visit): embeds.sum().item()
            for batch in batches
            for sample, visit, embeds in zip(
                batch.samples, batch.visits, batch.outputs["prompt_embeds"], strict=True
            )
        }

    whole = told(place.data(batch_size=2))
    assert told(*(place.data(rank, 2, batch_size=1) for rank in range(2))) == pytest.approx(
        whole, rel=1e-5
    )


def test_a_stopped_training_goes_on_with_the_same_captions(
    listed: dict[str, Any], tmp_path: Path
) -> None:
    config = {**listed, "caption_dropout_rate": 0.3, "dataset_num_workers": 1}
    config |= {"shuffle_tags": True, "tag_orders": 2}
    whole = train_to_end(config, tmp_path / "whole")
    config["output_path"] = str(tmp_path / "run")
    stop_after(config, 1, 2)
    run_training(make_config(config), never)
    for epoch in range(4):
        name = f"epoch-{epoch}.safetensors"
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.soak
def test_two_processes_encode_and_train_on_them(listed: dict[str, Any], tmp_path: Path) -> None:
    config = {**listed, "caption_dropout_rate": 0.3, "cache_path": str(tmp_path / "cache")}
    config |= {"shuffle_tags": True, "tag_orders": 2}
    config |= {"batch_size": 1, "output_path": str(tmp_path / "run")}
    one = {**config, "gradient_accumulation_steps": 2, "cache_path": str(tmp_path / "own")}
    alone = train_to_end(one, tmp_path / "alone")
    done = two_processes(config, tmp_path / "recipe.json")
    assert done.returncode == 0, done.stderr
    losses = [pl.read_csv(run / "metrics.csv")["loss"] for run in (alone, tmp_path / "run")]
    assert losses[1].to_list() == pytest.approx(losses[0].to_list(), rel=1e-5)


def test_the_second_half_takes_the_captions_over(listed: dict[str, Any], tmp_path: Path) -> None:
    config = {**listed, "caption_dropout_rate": 0.3, "num_epochs": 2}
    whole = train_to_end(config, tmp_path / "whole")
    train_to_end(config, tmp_path / "encoded", "--task", "sft:data_process")
    second = {k: v for k, v in config.items() if not k.startswith(("caption_", "dataset_meta"))}
    second |= {"task": "sft:train", "dataset_base_path": str(tmp_path / "encoded")}
    second["model_paths"] = config["model_paths"][:1]
    train_to_end(second, tmp_path / "split")
    ends = [load_file(tmp_path / n / "epoch-1.safetensors") for n in ("whole", "split")]
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())
    assert "encoded with caption_dropout_rate = 0.3, and now it is 0.2" in why_refused(
        {**second, "caption_dropout_rate": 0.2}, tmp_path / "other"
    )
    assert whole.is_dir()


def test_what_was_encoded_without_is_refused(values: Values, tmp_path: Path) -> None:
    """Also by a program that does not know the parameter."""
    train_to_end(values(), tmp_path / "encoded", "--task", "sft:data_process")
    path = tmp_path / "encoded" / "samples.parquet"
    notes = json.loads(pl.read_parquet_metadata(path)["diffsynth_dagster"])
    for name in [n for n in notes["parameters"] if n.startswith("caption_")]:
        del notes["parameters"][name]
    pl.read_parquet(path).write_parquet(path, metadata={"diffsynth_dagster": json.dumps(notes)})
    second = values(
        task="sft:train", dataset_metadata_path=None, dataset_base_path=str(tmp_path / "encoded")
    )
    assert "encoded with caption_dropout_rate = 0.0, and now it is 0.2" in why_refused(
        {**second, "caption_dropout_rate": 0.2}, tmp_path / "run"
    )
    train_to_end(second, tmp_path / "run")
