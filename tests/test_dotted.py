"""Functions and classes that a recipe names: looked up when it is read, never of Python itself."""

import os
import subprocess
import sys
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from dagster_support import write_recipe

from diffsynth_dagster.dotted import import_function
from diffsynth_dagster.errors import ParameterError
from resources import load_recipes

NOT_A_FUNCTION = 5
RECIPE: dict[str, Any] = {
    "dataset_base_path": "data",
    "dataset_metadata_path": "data/metadata.csv",
    "model_id_with_origin_paths": ["Qwen/Qwen-Image:transformer/*.safetensors"],
    "lora_base_model": "dit",
    "output_path": "models/a",
}


always_here = partial(Path.joinpath, Path("here"))


@wraps(os.listdir)
def wrapped(folder: Path) -> Path:
    return folder


def takes_nothing() -> None:
    """For a function that is called with something."""


def takes_one(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("name", ["customized_dataset", "customized_optimizer"])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("subprocess.run", "'subprocess.run' is of Python's standard library"),
        ("builtins.exec", "is of Python's standard library"),
        ("no_such_package_here.make", "there is no 'no_such_package_here'"),
        ("make", "is no dotted path"),
        ("a..b", "is no dotted path"),
        ("a.b c", "is no dotted path"),
    ],
)
def test_a_recipe_that_names_no_code_of_yours_is_refused_when_it_is_loaded(
    tmp_path: Path, name: str, path: str, words: str
) -> None:
    write_recipe(tmp_path, "bad", {**RECIPE, name: path})
    sound, (broken,) = load_recipes(tmp_path)
    assert not sound
    assert words in str(broken.error)
    assert str(tmp_path / "bad.yaml") in str(broken.error)
    assert name in str(broken.error)


def test_nothing_is_imported_when_a_recipe_is_loaded(tmp_path: Path) -> None:
    write_recipe(tmp_path, "good", {**RECIPE, "customized_optimizer": "torch.optim.SGD"})
    code = "import sys; from pathlib import Path; from resources import load_recipes\n"
    code += "sound, broken = load_recipes(Path(sys.argv[1])); assert sound, broken\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        # What another package has imported itself is Python's too.
        ("diffsynth_dagster.dotted.find_spec", "is of Python's standard library"),
        ("test_dotted.wraps", "is of Python's standard library"),
        ("diffsynth_dagster.dotted.no_such_name", "cannot be imported"),
        ("test_dotted.NOT_A_FUNCTION", "is no function"),
        ("test_dotted.takes_nothing", r"cannot be called with \(folder\)"),
    ],
)
def test_what_cannot_be_called_so_is_refused(path: str, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        import_function(path, "customized_dataset", "folder")


def test_a_function_of_yours_is_found() -> None:
    assert import_function("test_dotted.takes_one", "a", "folder")(Path("x")) == Path("x")


def test_a_function_of_yours_may_wrap_one_of_pythons() -> None:
    assert import_function("test_dotted.always_here", "a", "folder")(Path("x")) == Path("here/x")
    assert import_function("test_dotted.wrapped", "a", "folder")(Path("x")) == Path("x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def make(:", r"SyntaxError: invalid syntax \(broken_module.py, line 1\)"),
        (
            "x = 1\nraise RuntimeError('no luck')",
            r"RuntimeError: no luck \(.*broken_module.py, line 2\)",
        ),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(.*broken_module.py, line 2\)"),
        ("import no_such_package_here", "ModuleNotFoundError: No module named"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str
) -> None:
    (tmp_path / "broken_module.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ParameterError, match=words):
        import_function("broken_module.make", "customized_dataset", "folder")
