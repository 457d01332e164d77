"""The page on architecture is true: its files, rooms, layers and names are those of the code."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "diffsynth_dagster"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
_OUTSIDE = (
    *("assets", "jobs", "resources", "tests", "docs", "recipes"),
    *("diffsynth_dagster", "pyproject.toml"),
)
_PATH = r"(?:[\w<>.-]+/)+|(?:[\w-]+/)*[\w-]+\.(?:py|md|toml)"


def find(path: str) -> Path:
    """The file or folder that the page calls so."""
    return (ROOT if path.split("/")[0] in _OUTSIDE else ENGINE) / path


def references(text: str) -> dict[str, set[str]]:
    """Path that a text names → the names in it that it names: `path`, or `path: name, name`."""
    found: dict[str, set[str]] = {}
    for path, names in re.findall(rf"`({_PATH})(?:: ([^`]+))?`", text):
        found.setdefault(path, set()).update(re.findall(r"[\w.]+", names))
    return found


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return text


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definition(path: str, name: str) -> ast.AST | None:
    """The class, function, or assignment of this name (`function`, `Class.method`) in a file."""
    found: ast.AST | None = tree(find(path))
    for part in name.split("."):
        inside = getattr(found, "body", [])
        found = next((node for node in inside if part in names_of(node)), None)
    return found


def names_of(node: ast.AST) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def used_in(node: ast.AST | None) -> set[str]:
    """The names, attributes and texts in a piece of code."""
    assert node is not None
    inside = list(ast.walk(node))
    names = {n.id for n in inside if isinstance(n, ast.Name)}
    names |= {n.attr for n in inside if isinstance(n, ast.Attribute)}
    names |= {k.arg for n in inside if isinstance(n, ast.Call) for k in n.keywords if k.arg}
    return names | {str(n.value) for n in inside if isinstance(n, ast.Constant)}


def test_what_the_page_names_is_there() -> None:
    named = references(PAGE)
    assert len(named) > 100
    assert [path for path in named if not find(path).exists()] == []
    quoted = set(re.findall(r"`([^`\n]+\.py[^`]*)`", PAGE))
    assert {text for text in quoted if not references(f"`{text}`")} == set()
    missing = [
        f"{path}: {name}"
        for path, names in named.items()
        for name in names
        if definition(path, name) is None
    ]
    assert missing == []


def rooms() -> list[tuple[int, str]]:
    """Number and path of each room of the table."""
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \|", PAGE, re.MULTILINE)
    return [(int(number), path) for number, path in rows]


def test_every_room_is_named() -> None:
    folders = {f"{path.parent.name}/" for path in ENGINE.glob("*/__init__.py")}
    modules = {path.name for path in ENGINE.glob("*.py")} - {"__init__.py"}
    listed = [path for _, path in rooms()]
    assert len(listed) == len(set(listed))
    assert set(listed) == folders | modules | {"assets/", "jobs/", "resources/"}
    inside = {path.parent.relative_to(ENGINE).as_posix() for path in ENGINE.glob("*/*/__init__.py")}
    families = {f"families/{name}" for name in registered()}
    assert families < inside
    assert {f"{path}/" for path in inside - families} <= references(PAGE).keys()


def registered() -> set[str]:
    """The registered families, without importing any."""
    text = (ENGINE / "families" / "__init__.py").read_text(encoding="utf-8")
    return set(re.findall(r'^register\(\s*"(\w+)"', text, re.MULTILINE))


def test_the_layers_are_those_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {each["name"]: each for each in project["tool"]["importlinter"]["contracts"]}
    outer = contracts["Imports point one way"]["layers"]
    inner = contracts["Imports inside the engine point one way"]["layers"]
    layers = [
        {name.strip().removeprefix("diffsynth_dagster.") for name in layer.split(":")}
        for layer in (*outer, *inner)
    ]
    numbers = [number for number, _ in rooms()]
    assert numbers == sorted(numbers)
    told = [
        {re.sub(r"/$|\.py$", "", path) for number, path in rooms() if number == layer}
        for layer in range(1, numbers[-1] + 1)
    ]
    assert told == layers
    first = re.search(r"The engine, from (\d+) on", PAGE)
    assert first is not None
    assert int(first[1]) == len(outer) + 1


ANSWERS = {
    "Where a row's picture gets its size": {
        ("data/table/files.py", "TrainedShape.of"): {"size", "target"},
        ("data/geometry.py", "SizeRule.target"): {"max_pixels", "_floored", "height", "width"},
        ("data/geometry.py", "size_rule"): {"SizeRule", "side_factor"},
        ("data/table/shapes.py", "with_shape"): {"width", "height", "frames", "shape"},
        ("data/samples.py", "load_files"): {"_load_one"},
        ("data/media/image.py", "fit"): {"resize", "crop"},
    },
    "What makes a checkpoint stale": {
        ("assets/common.py", "code_version"): {"VERSIONS", "values_that_affect"},
        ("assets/unchanged.py", "Look.unchanged"): {"SEEN"},
        ("run/up_to_date.py", "why_train"): {"read_record", "finished", "checkpoints", "processes"},
        ("run/start.py", "start_record"): {"identity", "TRAINING", "component_digest", "manifest"},
        ("versions.py", "VERSIONS"): {"checkpoints"},
    },
    "A family, such as Z-Image": {
        ("families/__init__.py", "register"): {"_MODULES"},
        ("families/contract.py", "Family"): {"denoise", "stages", "components"},
        ("families/shared/image_vae.py", "image_vae"): {"Component"},
        ("config/unsupported.py", "FAMILIES"): set(),
        ("tests/test_families.py", "TABLE"): {"QWEN"},
    },
}
"""Section that answers a question → function of the page → what it uses to do it."""


@pytest.mark.parametrize("title", ANSWERS)
def test_a_question_is_answered_by_the_functions_that_do_it(title: str) -> None:
    named = references(section(title))
    for (path, name), does in ANSWERS[title].items():
        assert name in named[path], f"{path}: {name}"
        assert does <= used_in(definition(path, name)), f"{path}: {name}"


def test_the_family_to_copy_is_one() -> None:
    """The page and the contract name the same one, and Z-Image is not there yet, or is registered."""
    text = section("A family, such as Z-Image")
    copied = [find(path) for path in re.findall(r"`([^`]+\.py)`", text.split("; for Z-Image")[0])]
    assert {path.name for path in copied} == {"family.py", "components.py", "stages.py"}
    (folder,) = {path.parent for path in copied}
    assert folder.name in registered()
    assert definition(f"families/{folder.name}/family.py", "FAMILY") is not None
    contract = ast.get_docstring(definition("families/contract.py", "Family"))  # pyright: ignore
    assert f"families/{folder.name}/" in (contract or "")
    unsupported = used_in(definition("config/unsupported.py", "FAMILIES"))
    assert ("z_image" in unsupported) != ("z_image" in registered())


def test_decisions_name_where_they_stand() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section("Decisions that stand"), re.M
    )
    assert len(rows) > 15
    assert [what for what, where, _ in rows[1:] if not references(where)] == []
