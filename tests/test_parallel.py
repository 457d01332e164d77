"""Several processes and several nodes, and who may know about them."""

import ast
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from process_support import Done, python
from torch import nn

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.training.join import start_parallel

ENGINE = ROOT / "diffsynth_dagster"
TRAINING = [
    *sorted((ENGINE / "training").glob("*.py")),
    *sorted((ENGINE / "run").glob("*.py")),
    ENGINE / "train.py",
]
KNOW_ACCELERATE = {"join.py", "parallel.py", "trackers.py"}

TAKE_TURNS = """
import sys, time
from pathlib import Path
from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.training.join import start_parallel

parallel = start_parallel(TrainingConfig())
assert (parallel.num_processes, parallel.device.type) == (4, "cpu")
def note(word):
    with Path(sys.argv[1]).open("a") as file:
        file.write(f"{word} {parallel.process_index} {parallel.is_node_main}\\n")
with parallel.node_main_first():
    note("enters")
    time.sleep(0.2)
    note("leaves")
"""


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_who_imports_accelerate(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    known = {"accelerate", "deepspeed"} & imported
    assert not known or path.name in KNOW_ACCELERATE


def test_whole_weights_are_copies_that_a_step_does_not_change(tmp_path: Path) -> None:
    config = TrainingConfig(output_path=str(tmp_path), mixed_precision="no")
    parallel, module = start_parallel(config), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    model, prepared = parallel.prepare(config, module, optimizer)
    before = module.weight.detach().clone()
    names = ["weight"]
    (name, weight), *others = parallel.whole_weights(model, names)
    assert (name, others, weight.device.type) == ("weight", [], "cpu")
    model(torch.ones(1, 3, device=parallel.device)).sum().backward()
    prepared.step()
    assert torch.equal(weight, before)
    assert not torch.equal(parallel.trained(model, names)["weight"].detach().cpu(), before)
    parallel.let_go()


def test_the_first_process_of_each_node_goes_first(tmp_path: Path) -> None:
    """Two nodes of two processes, on this machine, without a GPU, which accelerate is not told of."""
    log = tmp_path / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}

    def run(rank: int) -> Done:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        code = f"import os; os.environ.update({shared | own})\n{TAKE_TURNS}"
        return python("-c", code, str(log))

    with ThreadPoolExecutor(4) as pool:
        ended = [*pool.map(run, range(4))]
    assert [done.returncode for done in ended] == [0] * 4, ended
    notes = log.read_text(encoding="utf-8").splitlines()
    assert notes[:4] == ["enters 0 True", "leaves 0 True", "enters 2 True", "leaves 2 True"]
    assert sorted(notes[4:]) == [
        "enters 1 False",
        "enters 3 False",
        "leaves 1 False",
        "leaves 3 False",
    ]
