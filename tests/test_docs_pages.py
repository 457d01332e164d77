"""The pages of the documentation: they build as a site, and what they quote is in the code."""

import ast
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from test_docs import PAGES, blocks

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.families import each_family

OTHERS = {
    *("pytorch_lora_weights", "peak_memory_bytes", "from_pretrained"),
    *("edit_image", "kontext_images", "input_audio"),  # columns
}
"""Words with underscores in the docs that are no names of parameters."""


def test_the_page_of_parameters_is_what_is_declared() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_parameters.py"))
    assert made["page"]() == PAGES["parameters.md"], "run docs/make_parameters.py"


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: the extra docs")
def test_the_site_builds_without_warnings_and_needs_nothing_of_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = list(tmp_path.rglob("*.html"))
    assert {path.stem for path in built} >= {name.removesuffix(".md") for name in PAGES} - {
        "README"
    }
    loaded = r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="(?:stylesheet|preconnect)"[^>]*//'
    for path in built:
        assert not re.search(loaded, path.read_text(encoding="utf-8")), path.name


def said_in(source: str) -> str:
    """The texts of a source, one in a line, with … for each value in them and what is in quotes."""
    lines: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            lines.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return unquoted("\n".join(lines))


def unquoted(text: str) -> str:
    """A text with … for each word in quotes."""
    return re.sub(r"'[\w….-]+'", "…", text)


def test_messages_of_the_page_of_troubles_are_those_of_the_code() -> None:
    folders = ("diffsynth_dagster", "assets", "resources")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    said = "\n".join(said_in(path.read_text(encoding="utf-8")) for path in sources)
    messages = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(messages) == len(set(messages)) >= 40
    assert [message for message in messages if unquoted(message) not in said] == []


@pytest.mark.parametrize(
    "page", ["choosing.md", "memory.md", "using_a_lora.md", "troubleshooting.md"]
)
def test_parameters_that_a_page_names_are_there(page: str) -> None:
    known = {*TrainingConfig.model_fields, *RecipeOptions.model_fields, *OTHERS}
    named = re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)(?:: [^`]*)?`", PAGES[page])
    code = {family.name for family in each_family()} | known
    code |= {part for family in each_family() for part in family.trainable}
    assert named
    assert {name for name in named if name not in code} == set()


def test_the_page_of_loras_says_which_formats_the_tools_read() -> None:
    rows: dict[tuple[str, str], list[list[str]]] = {}
    for line in re.findall(r"^\| `.* \|$", PAGES["using_a_lora.md"], re.MULTILINE):
        cells = [re.findall(r"`([\w]+)`", cell) for cell in line.strip("| ").split(" | ")]
        if len(cells) == 6:
            rows.update({(cells[0][0], module): cells[2:] for module in cells[1]})
    declared = {
        (family.name, name): [
            [rules.native],
            list(rules.exports),
            list(rules.read_by_comfyui),
            list(rules.read_by_guide),
        ]
        for family in each_family()
        for name in family.trainable
        if (rules := family.part(name).lora) is not None
    }
    assert rows == declared


def test_code_of_the_docs_is_python_and_names_what_diffusers_has() -> None:
    import diffusers

    for page in PAGES.values():
        for block in blocks(page, "python"):
            compile(block, "a block of the docs", "exec")
    pipelines = set(re.findall(r"`(\w+Pipeline)`", PAGES["using_a_lora.md"]))
    assert len(pipelines) > 10
    assert pipelines <= set(dir(diffusers))
