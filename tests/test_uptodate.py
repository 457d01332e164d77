"""Why a training is started, in words: what is not as it was when the one in the run folder finished."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Values, make_config, train_to_end

from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.fingerprint import Fingerprint
from diffsynth_dagster.run.up_to_date import why_train
from diffsynth_dagster.train import run
from diffsynth_dagster.weights.hub import ModelHub


def why(config: dict[str, Any], processes: int | None = None, **changed: Any) -> str | None:
    """Why the second half of a training would be started, with some parameters changed."""
    from diffsynth_dagster.cache.split import second_half

    return why_train(
        second_half(make_config({**config, **changed})), ModelHub.from_environment(), processes
    )


def test_what_only_one_of_two_fingerprints_has_differs() -> None:
    before, now = Fingerprint({"a": 1, "the b": "x", "c": 2}), Fingerprint({"c": 2, "a": 3, "d": 4})
    assert before.differs(now) == ("a", "the b", "d")
    assert before.differs(now, ["c", "d"]) == ("d",)
    assert before.changes(now) == ["a (was 1)", "the b", "d (was None)"]


def test_what_has_changed_is_named(values: Values, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = values(output_path=str(folder))
    train_to_end(config, folder)
    assert why(config) is None
    assert why(config, 1, dataset_num_workers=2, resume="must") is None
    assert why(config, learning_rate=0.01, num_epochs=2) == (
        "changed since: learning_rate (was 0.001), num_epochs (was 1)"
    )
    assert why(config, 2) == "on 2 processes instead of 1"

    # A run that encodes less, or other weights, changes what the training reads.
    record = json.loads((folder / "run.json").read_text())
    other = {**record, "samples_digest": "0", "base": {**record["base"], "dit": "0"}}
    write(folder, {**other, "identity": "0"})
    assert why(config) == "changed since: the samples, the weights of dit"
    # By an older version, whose records do not name the parameters.
    del other["parameters"]
    write(folder, {**other, "identity": "0", "config_digest": "0", "training_version": 0})
    assert why(config) == (
        "changed since: the samples, the weights of dit, the version of training, its parameters"
    )
    write(folder, record)
    (folder / "epoch-0.safetensors").write_bytes(b"something else")
    assert why(config) == "checkpoint epoch-0.safetensors is missing or was changed"
    (folder / "run.json").unlink()
    assert why(config) == "there is no training in the run folder"


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write a record without its digest, as one of an older version is."""
    text = json.dumps({name: value for name, value in record.items() if name != "digest"})
    (folder / "run.json").write_text(text)


def test_an_unfinished_training_goes_on(values: Values, tmp_path: Path) -> None:
    config = values(output_path=str(tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.csv"
    with pytest.raises(Stopped):
        run(make_config(config), metrics.is_file)  # pyright: ignore[reportArgumentType]
    unfinished = "the training in the run folder is not finished; "
    assert why(config) == f"{unfinished}the training goes on after step 1"
    assert why(config, seed=1) == f"{unfinished}changed since: seed (was 0)"
