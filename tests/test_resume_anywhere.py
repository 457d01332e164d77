"""A training may be stopped at any moment, and goes on to the same files."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from conftest import Values, make_config
from soak_support import result

from diffsynth_dagster.errors import Stopped
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.sampling import Evaluation, Generate


def look(generate: Generate) -> Evaluation:
    """For `customized_evaluation`."""
    (picture,) = generate(["an evaluation"], 3)
    return Evaluation({"brightness": float(np.asarray(picture).mean())}, {"look": picture})


@pytest.mark.parametrize("every", [17, pytest.param(2, marks=pytest.mark.soak)])
def test_a_training_may_be_stopped_whenever_it_asks(
    values: Values, tmp_path: Path, every: int
) -> None:
    """Also in a measurement, a sample or an evaluation: what is not whole is done again."""
    config = values(
        num_epochs=1,
        validation_split=3,
        validation_steps=1,
        keep_best=True,
        sample_prompts=["a picture", "another"],
        sample_num_inference_steps=2,
        height=32,
        width=32,
        customized_evaluation="test_resume_anywhere.look",
    )

    def run(folder: Path, stops_at: int | None) -> int:
        """How often it asked."""
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return stops_at is not None and asked >= stops_at

        with pytest.raises(Stopped) if stops_at is not None else contextlib.nullcontext():
            run_training(make_config({**config, "output_path": str(folder)}), stop)
        return asked

    run(tmp_path / "encoded", None)
    times = run(tmp_path / "undisturbed", None)
    assert times > 20
    for question in range(1, times + 1, every):
        folder = tmp_path / f"stopped-{question}"
        run(folder, question)
        run(folder, None)
        assert result(folder) == result(tmp_path / "undisturbed"), question
