"""A run folder has one owner: among command lines, and between them and Dagster."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from conftest import ROOT, Values, make_config, train_to_end, why_refused
from dagster_support import definitions_of, endless, failure_of, has_stepped, wait_for, write_recipe
from process_support import forked_launches, train_in_process, two_processes
from soak_support import start_server

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import hidden_beside, write_folder, write_text
from diffsynth_dagster.run.folder import owned
from diffsynth_dagster.run.signals import StopSignal
from diffsynth_dagster.train import run


def start_training(folder: Path, values: Values, encoded: Path) -> Any:
    """A training that never ends, in the run folder `folder`, after its first step: its process."""
    recipe, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    recipe.write_text(yaml.safe_dump(endless(values(), encoded, folder)))
    process = start_server().Process(target=train_in_process, args=(recipe, {}, log))
    process.start()

    def steps() -> bool:
        assert process.exitcode is None, log.read_text()
        return has_stepped(folder)

    wait_for(steps, 120, f"the first step in {folder}")
    return process


def of_a_dead_process(path: Path) -> Path:
    """A hidden file, or folder of a plan, that a process which is gone was writing."""
    write = "import sys; from pathlib import Path\n"
    write += "from diffsynth_dagster.files import hidden_beside\n"
    write += "path = hidden_beside(Path(sys.argv[1])); print(path)\n"
    write += "path.mkdir() if path.name.startswith('.plan') else path\n"
    write += "(path / 'draft' if path.is_dir() else path).write_text('half')"
    command = [sys.executable, "-c", write, str(path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def test_two_trainings_never_share_a_folder(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one is refused and changes nothing; a killed owner does not block the next one."""
    encoded = train_to_end(values(), tmp_path / "encoded", "--task", "sft:data_process")
    run = tmp_path / "run"
    owner = start_training(run, values, encoded)
    try:
        before = {p: p.read_bytes() for p in run.glob("*.json")}
        capsys.readouterr()
        error = why_refused(values(), run)
        assert f"the run folder is in use: sft:train by process {owner.pid} on " in error
        assert f"where: output_path = {run}" in error
        assert "Traceback" not in error
        assert {p: p.read_bytes() for p in run.glob("*.json")} == before
        assert owner.exitcode is None
    finally:
        owner.kill()
        owner.join(60)
    half = of_a_dead_process(run / "epoch-0.safetensors")
    assert half.exists()
    train_to_end(values(), run)
    assert not half.exists()
    assert [p.name for p in run.glob(".*") if "-" in p.name] == []


def test_all_processes_are_refused_by_one_message(values: Values, tmp_path: Path) -> None:
    with owned(tmp_path / "run", "a training"):
        done = two_processes(values(output_path=str(tmp_path / "run")), tmp_path / "recipe.json")
    assert done.returncode != 0
    assert done.stderr.count("error: the run folder is in use: a training by process") == 1
    assert "diffsynth_dagster/train.py" not in done.stderr, "no process crashed"


def test_dagster_is_refused_what_a_command_line_holds(values: Values, tmp_path: Path) -> None:
    """And the other way round: what its own trainings hold is held by the same lock."""
    write_recipe(tmp_path / "recipes", "tiny", {**values(), "output_path": str(tmp_path / "run")})
    job = definitions_of(tmp_path / "recipes").resolve_job_def("train_tiny")
    with forked_launches(), owned(tmp_path / "run", "a training on the command line"):
        done = job.execute_in_process(raise_on_error=False)
    words = failure_of(done, "tiny__latents")
    assert f"in use: a training on the command line by process {os.getpid()}" in words


def test_a_folder_is_held_until_its_owner_leaves(tmp_path: Path) -> None:
    with owned(tmp_path, "one"):
        with pytest.raises(OutputError, match="in use: one by process"), owned(tmp_path, "two"):
            pass
        with pytest.raises(OutputError, match="in use: one by"), owned(tmp_path, "three"):
            pass
    with pytest.raises(KeyError), owned(tmp_path, "four"):
        raise KeyError
    with owned(tmp_path, "five"):
        pass


ANEW = """
import sys
from pathlib import Path
from diffsynth_dagster.files import write_text
from diffsynth_dagster.run.folder import owned
with owned(Path(sys.argv[1]), "another training"):
    write_text(Path(sys.argv[1]) / "run.json", "of another training")
    print(Path(sys.argv[1], ".owner.json").read_text(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["removed", "renamed", "made anew"])
def test_an_owner_whose_folder_is_taken_away_writes_no_more(how: str, tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    other = None
    writers = (write_text, lambda path, text: write_folder(path, Path.mkdir, 0))
    with owned(run, "a test"):
        write_text(run / "run.json", "of this test")
        run.rename(aside) if how == "renamed" else shutil.rmtree(run)
        if how == "made anew":
            command = [sys.executable, "-c", ANEW, str(run)]
            other = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert other.stdout is not None
            assert b"another training" in other.stdout.readline()
        for write in writers:
            with pytest.raises(
                OutputError, match="removed or renamed while it was used for a test"
            ):
                write(run / "run.json", "of this test, again")
    if other is None:
        assert not run.exists()
    else:  # and its note of who holds the folder is there still
        assert (run / "run.json").read_text() == "of another training"
        assert "another training" in (run / ".owner.json").read_text()
        other.communicate()
    if how == "renamed":
        assert (aside / "run.json").read_text() == "of this test"


def test_a_training_whose_folder_is_taken_away_ends_with_a_message(
    values: Values, tmp_path: Path
) -> None:
    """With its next state, long before its next checkpoint."""
    run_folder = tmp_path / "run"
    asked = 0

    def take_after_a_step() -> bool:
        nonlocal asked
        if (run_folder / "metrics.csv").is_file() and (asked := asked + 1) == 2:
            run_folder.rename(tmp_path / "aside")
        return False

    config = make_config(values(num_epochs=4, save_steps=8, state_steps=1))
    with pytest.raises(OutputError, match="removed or renamed while it was used for sft"):
        run(config, cast(StopSignal, take_after_a_step))
    assert not run_folder.exists()


def test_only_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    kept = [hidden_beside(tmp_path / "mine"), tmp_path / ".samples.bin", tmp_path / ".profile"]
    for path in kept:
        path.write_text("kept")
    pictures = tmp_path / "samples"
    pictures.mkdir()
    dead = [of_a_dead_process(tmp_path / "a.json"), of_a_dead_process(pictures / "b.png")]
    dead.append(of_a_dead_process(tmp_path / "plan"))
    assert dead[-1].is_dir()
    # Of another machine, where a process cannot be asked for: kept for a day.
    elsewhere = tmp_path / f".c.json.00000000-{os.getpid()}-01234567"
    elsewhere.write_text("kept")
    with owned(tmp_path, "a test"):
        pass
    assert all(path.exists() for path in (*kept, elsewhere))
    assert not any(path.exists() for path in dead)
    os.utime(elsewhere, (time.time() - 90_000,) * 2)
    with owned(tmp_path, "a test"):
        pass
    assert not elsewhere.exists()


def test_a_lock_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(OutputError, match=r"cannot be locked: .*\.lock") as raised,
        owned(tmp_path, ""),
    ):
        pass
    assert "remove it" in str(raised.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), owned(tmp_path / "file", "a test"):
        pass
