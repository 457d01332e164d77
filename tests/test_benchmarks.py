"""The benchmark of a training step runs where there is no GPU: the one that a laptop cannot try."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "step.py"


@pytest.mark.parametrize(
    "name",
    [
        "Wan2.1-T2V-1.3B",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("Qwen-Image", "FLUX.1-dev")),
    ],
)
def test_a_step_is_measured(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "tiny", name], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"].startswith(name)
    assert found["TFLOP per step"] > 0
    # More than a matrix product alone reaches would mean that work is counted twice.
    assert 0 < found["utilisation"] < 1
