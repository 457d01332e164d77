"""A disk that fills up: one message, nothing half written, and the run goes on when there is space."""

import errno
import json
from pathlib import Path
from typing import Any

from conftest import Values, train
from disk_support import needs_a_disk, on_a_small_disk
from safetensors import SafetensorError

from diffsynth_dagster.errors import MetadataError
from diffsynth_dagster.files import full_disk

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
    hidden = [str(p) for p in disk.rglob(".*.*-*") if p.is_file()]
    said.append({"free": free, "code": code, "error": error.getvalue(), "hidden": hidden})
print(json.dumps(said))
import shutil
shutil.copy(disk / "run" / "epoch-0.safetensors", sys.argv[4])
"""


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
    code, undisturbed = train(
        values(cache_path=str(tmp_path / "store"), num_epochs=1), tmp_path / "undisturbed"
    )
    assert code == 0
    wanted = (undisturbed / "epoch-0.safetensors").read_bytes()
    assert (tmp_path / "lora.safetensors").read_bytes() == wanted


def test_the_name_of_a_file_is_no_full_disk() -> None:
    named = MetadataError("no space left on the bus.png is damaged", where="row 1", do="remove it")
    assert full_disk(named) is None
    assert full_disk(RuntimeError("no space left on the bus.png")) is None
    assert full_disk(OSError(errno.ENOSPC, "no space left on device")) is not None
    assert (
        full_disk(SafetensorError("I/O error: No space left on device (os error 28)")) is not None
    )
