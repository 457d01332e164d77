"""The wheel, installed in an environment of its own: from a folder of pictures to a LoRA in an empty project."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from browser import free_port, listens, stop
from conftest import ROOT, model_files
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient, ReloadRepositoryLocationStatus
from dagster_support import wait_for
from server_support import Server
from test_new import captioned, left

BUILT_FROM = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "workspace.yaml"),
    *("diffsynth_dagster", "assets", "jobs", "resources"),
    *("recipes/examples", "recipes/accelerate", "dagster_home/dagster.yaml"),
)
QUIET = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
SHORT = {
    "max_train_steps": 4,
    "save_steps": 4,
    "sample_num_inference_steps": 2,
    # Samples of the pictures' size: those of the model's own take a minute on a CPU.
    "height": 32,
    "width": 32,
    "max_pixels": 1024**2,
}
BY_HAND = f"""
import sys
import diffsynth_dagster
from diffsynth_dagster.new.__main__ import main as new
from diffsynth_dagster.train import main as train

assert diffsynth_dagster.__file__.startswith(sys.prefix), diffsynth_dagster.__file__
assert new(["cats", "--family", "qwen_image", "--data", "data/cats", "--models", *sys.argv[1:]]) == 0
recipe = ["--recipe", "recipes/cats.yaml"]
assert train([*recipe, "--dry_run"]) == 0
assert train([*recipe, *{[f"--{name}={value}" for name, value in SHORT.items()]!r}]) == 0

from diffsynth_dagster.definitions import definitions

assert definitions.resolve_job_def("train_cats") is not None
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout: building leaves files beside what it is built from."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        (folder / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "from" / name, ignore=leave)
        else:
            shutil.copy(ROOT / name, folder / "from" / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "from"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, and what it needs from that of the tests (but no
    package that is installed there as editable: such a path is not followed)."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    executable = folder / "bin" / "python"
    pip("--python", str(executable), "install", "--no-compile", str(wheel))
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty folder, but for twelve pictures with captions."""
    captioned(tmp_path / "project" / "data" / "cats", 12)
    return tmp_path / "project"


def pip(command: str, *arguments: str) -> None:
    """Run pip, without the network."""
    parts = [command, *arguments, *QUIET]
    subprocess.run([sys.executable, "-m", "pip", *parts], check=True, timeout=120)


def given_by_hand(folder: Path) -> dict[str, str]:
    """The environment of a person in a folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DAGSTER"))}
    kept.pop("DIFFSYNTH_DAGSTER_RECIPES", None)
    return {**kept, "DAGSTER_HOME": str(folder / "dagster_home"), "CUDA_VISIBLE_DEVICES": ""}


def test_a_wheel_holds_what_a_project_begins_with(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (home,) = (n for n in names if n.endswith("dagster_home/dagster.yaml"))
        assert file.read(home) == (ROOT / "dagster_home" / "dagster.yaml").read_bytes()
    assert "diffsynth_dagster/report/templates/report.css" in names
    inside = {n.removeprefix("diffsynth_dagster/project_files/") for n in names}
    examples = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("recipes/examples/*/*.yaml")}
    assert len(examples) > 60
    assert {*examples, "recipes/accelerate/zero2_offload.yaml", "workspace.yaml"} <= inside
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        *("diffsynth_dagster", "assets", "jobs", "resources")
    }


def test_from_pictures_to_a_lora_in_an_empty_folder(
    python: Path, project: Path, tiny_qwen: Path
) -> None:
    command = [str(python), "-c", BY_HAND, *model_files(tiny_qwen)]
    done = subprocess.run(
        command,
        cwd=project,
        env=given_by_hand(project),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for name in ("workspace.yaml", "dagster_home/dagster.yaml"):
        assert (project / name).read_bytes() == (ROOT / name).read_bytes()
    run = project / "models" / "train" / "cats"
    assert (run / "samples" / "step-4.png").is_file()
    (exported,) = run.glob("exports/diffusers/*.safetensors")
    assert f"exported {exported}" in done.stdout
    assert "load_lora_weights" in done.stdout
    beside = {name.split("/")[0] for name in left(project)}
    assert beside == {"cache", "dagster_home", "models", "recipes", "workspace.yaml"}


@contextmanager
def dagster_dev(python: Path, project: Path) -> Generator[Server]:
    """The UI of a project."""
    port, environment = free_port(), given_by_hand(project)
    command = [str(python), "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port)]
    with (project / "log").open("wb") as log:
        ui = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: listens(port), 90, "dagster dev listens")
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        yield Server(project, environment, ui, client, port)
    finally:
        stop(ui.pid)


@pytest.mark.soak
def test_the_five_minutes_in_an_empty_folder(
    python: Path, project: Path, tiny_qwen: Path, show: Callable[[str], None]
) -> None:
    """The commands of the README and of docs/first_training.md, each in a process of its own; the model is
    tiny and on the disk, and the trainings are short."""
    environment = given_by_hand(project)
    models = ["--models", *model_files(tiny_qwen)]

    def run(*words: str) -> str:
        command = [str(python), "-m", *words]
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    began = time.monotonic()
    run("diffsynth_dagster.new", "cats", "--family", "qwen_image", "--data", "data/cats", *models)
    run("diffsynth_dagster.train", "--recipe", "recipes/cats.yaml", "--dry_run")
    (project / "run_config.yaml").write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    job = ["-m", "diffsynth_dagster.definitions", "-c", "run_config.yaml", "-j", "train_cats"]
    run("dagster", "job", "execute", *job)
    trained = project / "models" / "train" / "cats"
    assert (trained / "samples" / "step-4.png").is_file()
    assert list((trained / "exports" / "current").rglob("*.safetensors"))
    show(f"from pictures to a LoRA by dagster job execute: {time.monotonic() - began:.0f} s")

    # A second recipe, in the UI that runs already.
    captioned(project / "data" / "dogs", 6)
    with dagster_dev(python, project) as server:
        new = ["diffsynth_dagster.new", "dogs", "--family", "qwen_image", "--data", "data/dogs"]
        run(*new, *models)
        reloaded = server.client.reload_repository_location("diffsynth_dagster")
        assert reloaded.status == ReloadRepositoryLocationStatus.SUCCESS, reloaded.message
        launched = server.launch("dogs", SHORT)
        assert server.wait(launched, 300) == DagsterRunStatus.SUCCESS
    assert (project / "models" / "train" / "dogs" / "samples" / "step-4.png").is_file()

    longer = [f"--{name}={value}" for name, value in {**SHORT, "max_train_steps": 8}.items()]
    recipe = ["--recipe", "recipes/cats.yaml", *longer]
    said = run(*["accelerate.commands.launch", "--quiet", "-m", "diffsynth_dagster.train"], *recipe)
    assert "load_lora_weights" in said
