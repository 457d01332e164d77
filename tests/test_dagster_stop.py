"""However a run ends, no process of its training is left: the real command line, the real trainer."""

from pathlib import Path

import dagster as dg
import pytest
from conftest import Values, train_to_end
from dagster_support import (
    endless,
    environment,
    home,
    job,
    require_gone,
    start,
    wait_until_training,
    write_recipe,
)

MULTIPROCESS = """
import dagster as dg
import diffsynth_dagster.definitions as location

definitions = dg.Definitions(
    assets=location.definitions.assets,
    jobs=location.definitions.jobs,
    resources=location.definitions.resources,
    loggers=location.definitions.loggers,
    executor=dg.multiprocess_executor,
)
"""


@pytest.mark.soak  # `test_dagster_resume.py` kills a job too
@pytest.mark.parametrize("executor", ["in_process", "multiprocess"])
def test_kill_of_job_execute_is_the_end_of_the_training(
    values: Values, tmp_path: Path, executor: str
) -> None:
    encoded = train_to_end(values(), tmp_path / "encoded", "--task", "sft:data_process")
    run = tmp_path / "run"
    write_recipe(tmp_path / "recipes", "endless", endless(values(), encoded, run))
    source: tuple[str, ...] = ()
    if executor == "multiprocess":
        file = tmp_path / "multiprocess.py"
        file.write_text(MULTIPROCESS, encoding="utf-8")
        source = ("-f", str(file))
    env = environment(home(tmp_path / "home"), tmp_path / "recipes")
    (tmp_path / "temp").mkdir()
    env["TMPDIR"] = str(tmp_path / "temp")
    log = tmp_path / "log"
    process = start(job("train_endless", *source), env, log)
    try:
        # The supervisor, accelerate, and the training process itself.
        assert len(wait_until_training(run, process, log)) >= 3, log.read_text()
        assert list((tmp_path / "temp").glob("diffsynth-launch-*"))
    finally:
        process.kill()
        process.wait()
        require_gone(run)
    assert not list((tmp_path / "temp").glob("diffsynth-launch-*"))
    if executor == "in_process":
        require_that_a_new_run_may_train(tmp_path, env)


def require_that_a_new_run_may_train(folder: Path, env: dict[str, str]) -> None:
    """The killed run gave no place in the pool back: that must not keep others waiting. (The new
    run fails as soon as it trains, which is enough to tell.)"""
    path = folder / "recipes" / "endless.yaml"
    path.write_text(path.read_text().replace("to_q", "to_qq"), encoding="utf-8")
    log = folder / "next.log"
    process = start(job("train_endless"), env, log)
    try:
        assert process.wait(90) == 1
    finally:
        process.kill()
    text = log.read_text()
    assert "the LoRA target 'to_qq' matches no layer" in text, text
    with dg.DagsterInstance.from_config(env["DAGSTER_HOME"]) as instance:
        runs = instance.get_runs()
    assert [run.status for run in runs] == [dg.DagsterRunStatus.FAILURE] * 2
