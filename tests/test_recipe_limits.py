"""Recipes that are small to write and endless to read are refused in moments."""

import re
import time
from pathlib import Path

import pytest
from dagster_support import write_recipe

from diffsynth_dagster.config import read_recipe
from diffsynth_dagster.config.flags import read_arguments
from diffsynth_dagster.config.recipe import read_values
from diffsynth_dagster.errors import ParameterError
from resources import load_recipes

DOUBLED = [f"  - &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
"""Lines of which each stands for twice as much as the one before."""
HOSTILE = {
    "a key that is an alias": (
        "\n".join(["extra_inputs:", "  - &a0 [x, x]", *DOUBLED, "? *a39", ": 1"]),
        r"a key must be plain text .*line 42, column 3",
    ),
    "a key inside a value": (
        "learning_rates:\n  ? [a]\n  : 1",
        r"a key must be plain text .*line 2, column 5",
    ),
    "aliases of aliases": (
        "\n".join(["extra_inputs:", "  - &a0 [x, x]", *DOUBLED]),
        r"aliases stand for more than 1 MiB .*line 20",
    ),
    "a long text many times": (
        f"extra_inputs: [&a {'x' * 1000}{', *a' * 2000}]",
        "aliases stand for more than 1 MiB",
    ),
    "mappings merged with mappings": (
        "\n".join(
            [
                "learning_rates:",
                "  a0: &a0 {x: 1, y: 2}",
                *(f"  a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)),
            ]
        ),
        "aliases stand for more than 1 MiB",
    ),
    "brackets by aliases": (
        "extra_inputs: [&a0 [x]" + "".join(f", &a{n} [*a{n - 1}]" for n in range(1, 1000)) + "]",
        "more than 50 brackets inside each other",
    ),
    "itself": ("extra_inputs: &a [*a]", "an alias stands for a value that it is a part of"),
    "very many values": (
        f"extra_inputs: [{'x,' * 12_000}]",
        r"more than 10,000 values .*line 1, column 20010",
    ),
    "a number in base 60": (
        f"seed: {':'.join(['1'] * 100_000)}",
        "seed'? = '1:1:1.* valid integer",
    ),
    "a number in base 60, by its tag": (
        f"seed: !!int {':'.join(['1'] * 100_000)}",
        "seed'? = '1:1:1",
    ),
    "more than 1 MiB": ("x" * (1 << 20) + "x", "larger than 1 MiB, which is the limit"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_recipe_of_which_reading_has_no_end_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    write_recipe(tmp_path, "sound", {"task": "sft", "output_path": "sound"})
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    start = time.process_time()
    sound, broken = load_recipes(tmp_path)
    with pytest.raises(ParameterError, match=message) as error:
        read_arguments(["--recipe", str(recipe)])
    assert time.process_time() - start < 6
    reasons = {one.name: str(one.error) for one in broken}
    assert {*reasons, *(one.name for one in sound)} == {"sound", "bad"}
    assert str(recipe) in str(error.value)
    assert len(str(error.value)) < 2000
    assert re.search(message, reasons["bad"])


def test_no_more_than_the_limit_is_read_of_any_file(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    with recipe.open("wb") as file:
        file.truncate(1 << 40)
    for path, words in ((recipe, "larger than 1 MiB"), (Path("/dev/zero"), "not a regular file")):
        with pytest.raises(ParameterError, match=words):
            read_recipe(path)


def test_anchors_and_merges_of_usual_size_are_read(tmp_path: Path) -> None:
    recipe = tmp_path / "usual.yaml"
    recipe.write_text(
        "learning_rates:\n"
        "  dit: &slow {lora_A: 1.0e-5, lora_B: 2.0e-5}\n"
        "sample_prompts: [&one a dog, *one]\n"
        "learning_rate: &rate 1.0e-4\n"
        "description: 16:9\n"
    )
    values, options = read_values(recipe)
    assert values["sample_prompts"] == ["a dog", "a dog"]
    assert options.description == "16:9"
    recipe.write_text(
        "optimizer_arguments: {<<: &both {betas: [0.9, 0.99]}, eps: 1.0e-6}\n"
        "model_paths: [&m a.safetensors, [*m, *m]]\n"
    )
    values, _ = read_values(recipe)
    assert values["optimizer_arguments"] == {"betas": [0.9, 0.99], "eps": 1e-6}
    assert values["model_paths"] == ["a.safetensors", ["a.safetensors", "a.safetensors"]]
