"""The docs are true: their commands run, and what they name is there."""

import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_new import captioned

from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.config.affects import settled_by_encoding
from diffsynth_dagster.config.flags import parser
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.data.table.read import read_table
from diffsynth_dagster.data.table.validate import check_columns
from diffsynth_dagster.data.table.values import check_structure
from diffsynth_dagster.export.__main__ import main as convert
from diffsynth_dagster.export.__main__ import parser as convert_parser
from diffsynth_dagster.families import each_family, find_family
from diffsynth_dagster.new.__main__ import main as new
from diffsynth_dagster.train import main
from diffsynth_dagster.weights.identify import guess_model

PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
README, USAGE = PAGES["README.md"], PAGES["usage.md"]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command of the bash blocks of the README and the docs, once, as words."""
    found = "\n".join(block for page in PAGES.values() for block in blocks(page, "bash"))
    lines = found.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in dict.fromkeys(map(str.strip, lines)) if line]


def sections(page: str) -> dict[str, str]:
    """Title → text of each section of a page."""
    parts = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


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


def test_the_page_of_families_is_what_they_declare() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_families.py"))
    written = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert made["page"]() == written, "run docs/make_families.py"


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
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def new_recipe(command: list[str], root: Path) -> None:
    """Give the command that writes a recipe, in a project with the pictures that it names.

    The working directory is the project's root, and the variable for its recipes is set.
    """
    words = command[command.index("diffsynth_dagster.new") + 1 :]
    captioned(root / words[words.index("--data") + 1], 3)
    assert new(words) == 0
    assert (root / "recipes" / f"{words[0]}.yaml").is_file()


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_docs_run(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Make targets exist; trainings print their plan; jobs are there to be executed."""
    monkeypatch.chdir(ROOT)
    if any("my_style" in word for word in command):  # one's own recipe
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DIFFSYNTH_DAGSTER_RECIPES", str(tmp_path / "recipes"))
        (first,) = (each for each in commands() if "diffsynth_dagster.new" in each)
        new_recipe(first, tmp_path)
        capsys.readouterr()
    if "diffsynth_dagster.new" in command:
        assert command[:3] == [".venv/bin/python", "-m", "diffsynth_dagster.new"]
    elif command[0] == "make":
        subprocess.run(["make", "-n", *command[1:]], check=True, capture_output=True)
    elif command[0] == "export":
        name, _, value = command[1].partition("=")
        assert name == "DAGSTER_HOME"
        assert Path(value.replace("$PWD", str(ROOT)), "dagster.yaml").is_file()
    elif "diffsynth_dagster.train" in command:
        flags = command[command.index("diffsynth_dagster.train") + 1 :]
        no_files = [] if Path.cwd() == tmp_path else ["--no_files"]  # the others name examples
        assert main([*flags, "--dry_run", *no_files]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["family"] in {family.name for family in each_family()}
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
    elif "diffsynth_dagster.check" in command:
        from diffsynth_dagster.check import main as check

        assert check(command[command.index("diffsynth_dagster.check") + 1 :]) == 0
    elif "diffsynth_dagster.export" in command:
        # A fresh checkout has no LoRA: the command says so.
        assert convert(command[command.index("diffsynth_dagster.export") + 1 :]) == 2
        assert "the LoRA file does not exist" in capsys.readouterr().err
    elif command[1:3] == ["asset", "materialize"]:
        require_assets(
            *(command[command.index(name) + 1] for name in ("--select", "--config-json"))
        )
    else:
        assert command[1:3] == ["job", "execute"]
        from diffsynth_dagster.component import make_definitions

        job = make_definitions().resolve_job_def(command[command.index("-j") + 1])
        assert job is not None


def require_assets(selected: str, run_config: str) -> None:
    """Fail unless there is such an asset, and its run takes this run config."""
    import dagster as dg

    from diffsynth_dagster.definitions import definitions

    key = dg.AssetKey(selected.split("/"))
    job = definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection={key})
    assert job.asset_layer.executable_asset_keys == {key}
    assert dg.validate_run_config(job, json.loads(run_config))


def test_run_config_and_recipe_keys_of_the_docs_are_taken() -> None:
    import dagster as dg

    from diffsynth_dagster.definitions import definitions

    shown = [yaml.safe_load(b) for page in PAGES.values() for b in blocks(page, "yaml")]
    (run_config,) = (values for values in shown if "num_epochs" in values)
    for values in shown:
        if values is not run_config:
            options = {name: v for name, v in values.items() if name in RecipeOptions.model_fields}
            others = {n: v for n, v in values.items() if n not in options}
            RecipeOptions.model_validate(options)
            TrainingConfig.model_validate(others)
    assert dg.validate_run_config(definitions.resolve_job_def("train_demo"), run_config)


def test_names_of_the_docs_are_those_of_the_code() -> None:
    """Environment variables, flags and lists of parameters."""
    folders = ("diffsynth_dagster", "assets", "jobs", "resources")
    code = "\n".join(
        p.read_text(encoding="utf-8") for f in folders for p in (ROOT / f).rglob("*.py")
    )
    pages = "\n".join(PAGES.values())
    for name in set(re.findall(r"DIFFSYNTH_[A-Z_]+", pages)):
        assert re.search(rf"\b{name}\b", code), name
    parsers = (parser(), convert_parser())
    flags = {o for each in parsers for action in each._actions for o in action.option_strings}
    flags |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', code))  # of `cache` and `inspect`
    named = set(re.findall(r"`(--[\w-]+)[^`]*`", pages))
    assert named
    assert named <= flags, named - flags
    (refused,) = re.findall(r"Refused by name: (.*?)\.\n", USAGE, re.DOTALL)
    planned = {
        name
        for name, field in TrainingConfig.model_fields.items()
        if (field.json_schema_extra or {}).get("planned")  # pyright: ignore
    }
    assert set(re.findall(r"`(\w+)`", refused)) == planned
    (taken_over,) = re.findall(r"Taken over .*?: (.*?)\.\sThe", USAGE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", taken_over)) == set(settled_by_encoding(TrainingConfig()))


@pytest.mark.parametrize(
    ("kind", "text"),
    [(kind, text) for kind in ("csv", "json") for text in blocks(USAGE, kind)],
    ids=lambda text: text.splitlines()[0],
)
def test_tables_of_the_usage_page_are_taken(kind: str, text: str, tmp_path: Path) -> None:
    """Every row passes the checks of the family that reads its columns."""
    path = tmp_path / f"metadata.{kind}"
    path.write_text(text, encoding="utf-8")
    columns = set(read_table(path, "utf-8", []).columns)
    name = "wanvideo" if "video" in columns else "qwen_image"
    if columns & {"kontext_images", "controlnet_image"}:
        name = "flux"
    if "input_audio" in columns:
        name = "ltx2"
    extra = columns & {*find_family(name).extra_inputs, "rand_device", "cfg_scale"}
    files = columns - {"prompt", "seed", "num_inference_steps", "controlnet_processor_id"}
    files -= {"in_context_downsample_factor", "frame_rate", "weight", "mask"}
    named = {"sample_weight_column": "weight", "loss_mask_column": "mask"}
    values = {
        "family": name,
        "task": "direct_distill" if "seed" in columns else "sft",
        "dataset_base_path": str(tmp_path),
        "dataset_metadata_path": str(path),
        "data_file_keys": sorted(files - {"rand_device", "cfg_scale"}),
        "extra_inputs": sorted(extra),
        "model_id_with_origin_paths": "a/b:c",
        "lora_base_model": "dit",
        "caption_lists": '"[""' in text,
        "edit_plus": "edit_image" in columns,
        **{name: column for name, column in named.items() if column in columns},
    }
    config = read_config(values, "the test")
    inputs = check_columns(config, guess_model(config).family.columns)
    assert columns == {item.column for item in inputs}
    frame = check_structure(read_table(path, "utf-8", inputs), inputs, str(path))
    assert set(frame["status"]) == {"ok"}, frame["message"]


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
