"""The checks before the first step: in one list, made in its order, by whoever needs them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Values, make_config, samples_of, train
from families.wanvideo.cases import CASES, rows, write
from test_families import HUB, Place

from diffsynth_dagster import preflight
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.preflight import CHECKS, Known, check_config, check_headers
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.weights.identify import find_model, guess_model
from diffsynth_dagster.weights.models import Models

BOTH = next(case for case in CASES if case.name == "wan22_t2v_both")
ORDER = ["config", "data", "headers", "disk", "encoded"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training of two experts."""
    folder = tmp_path_factory.mktemp("experts")
    write(folder / "model")
    place = Place(BOTH, folder / "model", rows(folder / "data"), folder)
    return place.values(num_epochs=1)


def test_checks_stand_in_the_order_in_which_they_can_be_made() -> None:
    places = [ORDER.index(check.needs) for check in CHECKS]
    assert places == sorted(places)
    again = [check for check in CHECKS if check.again is not None]
    assert all(
        ORDER.index(check.again) > ORDER.index(check.needs) for check in again if check.again
    )


def test_what_files_show_and_names_do_not_is_checked_again(
    experts: dict[str, Any], tmp_path: Path
) -> None:
    """By the names that ComfyUI gives the experts of Wan2.2 none of them is recognised."""
    named = dict(zip(experts["model_paths"], experts["model_paths"], strict=True))
    for folder, which in (("transformer", "high"), ("transformer_2", "low")):
        given = next(path for path in named if Path(path).parent.name == folder)
        (source,) = Path(given).parent.glob("*.safetensors")
        named[given] = str(tmp_path / f"wan2.2_t2v_{which}_noise_14B.safetensors")
        shutil.copy(source, named[given])
    paths = [*named.values()]
    config = make_config(
        {**experts, "model_paths": paths, "optimizer": "prodigy", "learning_rate": 1}
    )
    guessed, found = guess_model(config), find_model(config, HUB)
    assert (len(guessed.denoisers), len(found.denoisers)) == (1, 2)
    check_config(config, guessed)
    with pytest.raises(ParameterError, match="a step changes one expert"):
        check_headers(config, found, torch.float32)


def test_the_function_of_a_data_set_is_needed_where_it_is_called(
    values: Values, tmp_path: Path
) -> None:
    given = values(customized_dataset="nosuchmodule.make")
    config = make_config(given)
    with pytest.raises(ParameterError, match="cannot be imported"):
        check_config(config, guess_model(config))
    second = config.model_copy(update={"task": "sft:train"})
    check_config(second, guess_model(second))


def test_only_the_writer_of_checkpoints_needs_their_space(
    values: Values, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A dry run does not: it may be asked on another machine."""

    def full(folder: Path, size: int, parameter: str) -> None:
        raise AssertionError("asked for space")

    monkeypatch.setattr(preflight, "require_space", full)
    given = values()
    code, _ = train(given, tmp_path / "run", "--dry_run")
    assert code == 0
    config = make_config({**given, "output_path": str(tmp_path / "run")})
    size = check_headers(config, find_model(config, HUB), torch.float32)
    assert size > 0
    with pytest.raises(AssertionError, match="asked for space"):
        preflight.check_disk(config, guess_model(config), size)


def test_a_module_that_is_cast_later_is_given_what_it_computes_in(
    experts: dict[str, Any], tmp_path: Path
) -> None:
    """DeepSpeed casts whole modules, also the tables that Wan keeps in float32."""
    code, run = train(experts, tmp_path / "run")
    assert code == 0
    config = make_config({**experts, "output_path": str(run)})
    found = find_model(config, HUB)
    lora_first = frozenset({"dit", "dit2"})
    models = Models(found, torch.device("cpu"), torch.bfloat16, False, lora_first)
    step = build_step(config, models, torch.bfloat16)
    batch = StepDataset(config, found, samples_of(run), 0, 1)[0][0]
    step.bfloat16()
    step.find_compute_dtypes()
    assert step(batch).isfinite().all()


def test_each_check_is_made_when_what_it_needs_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    checks = [
        preflight.Check("config", lambda known: made.append("first"), again="headers"),
        preflight.Check("headers", lambda known: made.append("second")),
        preflight.Check("disk", lambda known: made.append(f"third {known.checkpoint_bytes}")),
    ]
    monkeypatch.setattr(preflight, "CHECKS", checks)
    config: Any = None
    model: Any = None
    check_config(config, model)
    assert made == ["first"]
    check_headers(config, model, torch.float32)
    preflight.check_disk(config, model, 7)
    assert made == ["first", "first", "second", "third 7"]
    assert Known(config, model).checkpoint_bytes == 0
