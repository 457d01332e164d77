"""A disk that fills up: one message, nothing half written, and the run goes on when there is space."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Values, train_to_end
from disk_support import needs_a_disk, on_a_small_disk
from safetensors import SafetensorError
from soak_support import result

from diffsynth_dagster.disk import disk_error
from diffsynth_dagster.errors import MetadataError

FULL = """
import contextlib, io, json, os, sys
from pathlib import Path

recipe, disk, frees = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
from diffsynth_dagster.train import main

def fill(free):
    ballast = disk / "ballast"
    space = os.statvfs(disk)
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, space.f_bavail * space.f_frsize - free)))

said = []
for free in [*frees, None]:
    (disk / "ballast").unlink(missing_ok=True)
    if free is not None:
        fill(free)
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(["--recipe", recipe])
    hidden = [str(p) for p in disk.rglob(".*.*-*")]
    said.append({"free": free, "code": code, "error": error.getvalue(), "hidden": hidden})
print(json.dumps(said))
import shutil
shutil.copy(disk / "run" / "epoch-0.safetensors", sys.argv[4])
"""


STATES = """
import contextlib, io, json, shutil, sys
from pathlib import Path

recipe, disk, frees = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.errors import Stopped, UserError
from diffsynth_dagster.train import run
from diffsynth_dagster.run.resume_point import state_folders
from diffsynth_dagster.training.state import read_state

def go(stop):
    config = read_recipe(recipe).config
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            run(config, stop)
        except (Stopped, UserError) as raised:
            error.write(f"{type(raised).__name__}")
    return error.getvalue()

run_folder, said = disk / "run", []
go(lambda: bool(state_folders(run_folder)))
size = sum(p.stat().st_size for p in state_folders(run_folder)[0][1].iterdir())
for free in frees:
    before = state_folders(run_folder)[0][0]
    with (disk / "ballast").open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, shutil.disk_usage(disk).free - int(free * size))))
    left = iter(range(2))
    text = go(lambda: next(left, None) is None)  # in the third step
    whole = [read_state(folder).step for _, folder in state_folders(run_folder)]
    hidden = [p.name for p in (run_folder / "state").iterdir() if p.name.startswith(".")]
    said.append({"before": before, "said": text, "whole": whole, "hidden": hidden})
    (disk / "ballast").unlink()
said.append(go(lambda: False))
shutil.copytree(run_folder, sys.argv[4])
print(json.dumps(said))
"""


@needs_a_disk
@pytest.mark.soak
def test_a_full_disk_leaves_the_states_that_are_there(values: Values, tmp_path: Path) -> None:
    """The disk is filled up but for a part of a state, or a little more than one."""
    disk, frees = tmp_path / "disk", [0.0, 0.2, 0.9, 1.1, 2.2]
    lasting = {"num_epochs": 12, "save_steps": 100, "state_steps": 1}
    places = {"cache_path": str(disk / "store"), "output_path": str(disk / "run")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values(**lasting) | places))
    script = ["-c", STATES, str(recipe), str(disk), json.dumps(frees), str(tmp_path / "run")]
    done = on_a_small_disk(40 << 20, disk, *script)
    assert done.returncode == 0, done.stderr
    *full, last = json.loads(done.stdout.splitlines()[-1])
    for each in full:
        assert each["whole"][0] >= each["before"], each
        assert each["hidden"] == []
        assert "Traceback" not in each["said"]
    assert sum("the state after step" in each["said"] for each in full) >= 2
    assert full[-1]["whole"][0] > full[-1]["before"]
    assert "error" not in last
    undisturbed = train_to_end(values(**lasting), tmp_path / "undisturbed")
    assert result(tmp_path / "run") == result(undisturbed)


@needs_a_disk
def test_a_full_disk_is_one_message_and_loses_nothing(values: Values, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    config: dict[str, Any] = values(
        cache_path=str(disk / "store"), output_path=str(disk / "run"), num_epochs=1
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(config))
    frees = [0, 4096, 20_000, 60_000, 100_000, 150_000, 200_000, 300_000]
    script = ["-c", FULL, str(recipe), str(disk), json.dumps(frees)]
    done = on_a_small_disk(40 << 20, disk, *script, str(tmp_path / "lora.safetensors"))
    assert done.returncode == 0, done.stderr
    *full, last = json.loads(done.stdout.splitlines()[-1])
    failed = [each for each in full if each["code"] != 0]
    assert len(failed) >= 3
    for each in failed:
        assert each["code"] == 2, each
        assert "no space left" in each["error"] or "on a disk with space left" in each["error"], (
            each
        )
        assert each["error"].count("error: ") == 1
        assert "Traceback" not in each["error"]
        assert each["hidden"] == []
    assert last["code"] == 0, last
    undisturbed = train_to_end(
        values(cache_path=str(tmp_path / "store"), num_epochs=1), tmp_path / "undisturbed"
    )
    wanted = (undisturbed / "epoch-0.safetensors").read_bytes()
    assert (tmp_path / "lora.safetensors").read_bytes() == wanted


def test_the_name_of_a_file_is_no_disk_error() -> None:
    named = MetadataError("no space left on the bus.png is damaged", where="row 1", do="remove it")
    assert disk_error(named) is None
    assert disk_error(RuntimeError("no space left on the bus.png")) is None
    assert disk_error(OSError(errno.ENOSPC, "no space left on device")) is not None
    assert (
        disk_error(SafetensorError("I/O error: No space left on device (os error 28)")) is not None
    )
