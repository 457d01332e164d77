"""A run folder has one owner: among command lines, and between them and Dagster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Values, train
from dagster_support import definitions_of, endless, start, wait_until_training, write_recipe
from process_support import two_processes

from diffsynth_dagster.errors import OutputError
from diffsynth_dagster.files import hidden_beside
from diffsynth_dagster.run_folder import owned


def start_training(folder: Path, values: Values, encoded: Path) -> subprocess.Popen[bytes]:
    """A training that never ends, in the run folder `folder`, after its first step."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(endless(values(), encoded, folder)))
    arguments = ["-m", "diffsynth_dagster.train", "--recipe", str(recipe)]
    log = folder.with_suffix(".log")
    process = start(arguments, os.environ, log)
    wait_until_training(folder, process, log)
    return process


def end(process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.wait(60)


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
    code, encoded = train(values(), tmp_path / "encoded", "--task", "sft:data_process")
    assert code == 0
    run = tmp_path / "run"
    owner = start_training(run, values, encoded)
    try:
        before = {p: p.read_bytes() for p in run.glob("*.json")}
        capsys.readouterr()
        assert train(values(), run)[0] == 2
        error = capsys.readouterr().err
        assert f"the run folder is in use: sft:train by process {owner.pid} on " in error
        assert f"where: output_path = {run}" in error
        assert "Traceback" not in error
        assert {p: p.read_bytes() for p in run.glob("*.json")} == before
        assert owner.poll() is None
    finally:
        end(owner)
    half = of_a_dead_process(run / "epoch-0.safetensors")
    assert half.exists()
    assert train(values(), run)[0] == 0
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
    with owned(tmp_path / "run", "a training on the command line"):
        done = job.execute_in_process(raise_on_error=False)
    failure = done.failure_data_for_node("tiny__latents")
    assert failure is not None
    assert failure.user_failure_data is not None
    words = failure.user_failure_data.description or ""
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
