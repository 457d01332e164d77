"""The five minutes of the README, done literally: each command that it shows, in a checkout."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, model_files
from PIL import Image
from test_new import captioned

WAITS = "make ui"
"""What runs until it is stopped: `test_wheel.py` starts the UI, and launches a training there."""


def commands() -> list[str]:
    """The commands of the section, in order."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.partition("## Train your own in five minutes")[2].partition("The flags of")[0]
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_five_minutes_of_the_readme(
    tmp_path: Path, tiny_qwen: Path, show: Callable[[str], None]
) -> None:
    """With twelve pictures and their captions, and a tiny model in the place of those that are downloaded."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    (checkout / ".venv").symlink_to(sys.prefix)
    captioned(checkout / "data" / "my_style", 12)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DAGSTER", "DIFFSYNTH"))}
    environment = {**kept, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    given = commands()
    assert WAITS in given
    assert len(given) >= 6
    models = " ".join(model_files(tiny_qwen))
    script = ["set -e", *(line for line in given if line != WAITS)]
    script = [f"{n} --models {models}" if "diffsynth_dagster.new" in n else n for n in script]
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = checkout / "models" / "train" / "my_style"
    pictures = sorted((run / "samples").glob("*.png"))
    assert len(pictures) >= 5  # before, and with each of four checkpoints
    with Image.open(pictures[-1]) as picture:
        assert min(picture.size) > 32
    (exported,) = run.glob("exports/diffusers/*.safetensors")
    assert str(exported) in done.stdout
    assert (run / "exports" / "README.md").is_file()
    show(f"{len(given)} commands in {time.monotonic() - began:.0f} s, {len(pictures)} pictures")
