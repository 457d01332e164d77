"""The README is true: its commands run, and its tree is the tree."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from diffsynth_dagster.train import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every command of the README's bash blocks, as words."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def tree() -> list[tuple[Path, bool]]:
    """Paths of the README's tree, and whether each is a folder."""
    (block,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    folder, found = Path(), []
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            found.append((folder / name, name.endswith("/")))
        else:
            folder = Path(name)
            found.append((folder, name.endswith("/")))
    return found


def test_the_tree_is_true() -> None:
    listed = tree()
    for path, is_folder in listed:
        assert (ROOT / path).is_dir() == is_folder, path
        assert (ROOT / path).exists(), path
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {Path(name).parts[0] for name in tracked if "/" in name and name[0] != "."}
    assert {path.parts[0] for path, is_folder in listed if is_folder} >= folders
    engine = {Path(n).parts[1] for n in tracked if n.startswith("diffsynth_dagster/")}
    named = {path.name for path, _ in listed if path.parts[0] == "diffsynth_dagster"}
    assert engine - {"__init__.py", "files.py", "dotted.py"} <= named


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_readme_run(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Make targets exist; trainings print their plan; jobs are there to be executed."""
    monkeypatch.chdir(ROOT)
    if command[0] == "make":
        subprocess.run(["make", "-n", *command[1:]], check=True, capture_output=True)
    elif "diffsynth_dagster.train" in command:
        flags = command[command.index("diffsynth_dagster.train") + 1 :]
        assert main([*flags, "--dry_run"]) == 0
        assert '"family": "qwen_image"' in capsys.readouterr().out
    elif "diffsynth_dagster.cache" in command:
        from diffsynth_dagster.cache.__main__ import main as maintain

        # The store of a fresh checkout is empty: the command says so.
        empty = str(tmp_path / "none")
        assert (
            maintain(
                [*command[command.index("diffsynth_dagster.cache") + 1 :], "--cache_path", empty]
            )
            == 2
        )
        assert "there is no store" in capsys.readouterr().err
    else:
        assert command[1:3] == ["job", "execute"]
        from diffsynth_dagster.definitions import definitions

        assert definitions.resolve_job_def(command[-1]) is not None


def test_every_dependency_has_its_reason() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'^    "([a-z0-9-]+)', project, re.MULTILINE))
    reasons = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = set(re.findall(r"[a-z0-9-]+", " ".join(re.findall(r"^\| ([^|]*) \|", reasons, re.M))))
    assert named - {"diffsynth-dagster"} - {"diffsynth", "assets", "jobs", "resources"} <= table


def test_every_dependency_is_pinned() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name in re.findall(r'^    "([a-z0-9-]+)[";]', project, re.MULTILINE):
        assert name in pins or name == "diffsynth-dagster", name
    versions = {
        v for n, v in pins.items() if n in ("dagster", "dagster-webserver", "dagster-graphql")
    }
    assert len(versions) == 1
