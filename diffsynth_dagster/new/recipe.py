"""Choose the values of a new recipe: those of a template, adapted to the data set."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.config.entries import SHARD
from diffsynth_dagster.config.recipe import RecipeOptions
from diffsynth_dagster.new.data import Data, Found
from diffsynth_dagster.new.template import Change

VISITS, LEAST_STEPS = 100, 500
"""Visits of each sample, and the least number of steps: see docs/choosing.md, "How many steps"."""
_HELD_OUT_FROM, _HELD_OUT_MOST = 30, 20
"""The least number of samples from which some are held out, since a small data set needs all of
them; and the most that are held out, which is enough for a held-out loss."""


@dataclass(frozen=True)
class Asked:
    """What the user asks for.

    Attributes:
        name: name of the recipe.
        root: the folder that paths in the recipe are relative to.
        models: files or folders that replace the model list of the template, if any.
        trigger: text before every caption.
    """

    name: str
    root: Path
    data: Data
    models: tuple[str, ...] = ()
    trigger: str | None = None

    def written(self, path: Path | str) -> str:
        """A path as the recipe has it: relative to the root if it is inside, else absolute."""
        whole = os.path.abspath(path)
        inside = Path(whole).is_relative_to(self.root)
        return os.path.relpath(whole, self.root) if inside else whole


@dataclass(frozen=True)
class Course:
    """The length of a training.

    Attributes:
        steps: optimizer steps.
        held_out: number of samples that are held out, approximately.
        visits: how often each of the other samples is seen, approximately, as text: "100" or
            "10 to 100".
    """

    steps: int
    held_out: int
    visits: str

    @property
    def save_steps(self) -> int:
        """Steps from one checkpoint to the next."""
        return self.steps // 4


def course_of(repeats: Mapping[int, int], at_once: int, most: int) -> Course:
    """Choose the length of a training, so that the samples taken most often get `VISITS` visits.

    Args:
        repeats: how often a pass over the data set takes a sample → number of such samples.
        at_once: samples of an optimizer step.
        most: steps of the template, which are not exceeded.
    """
    samples = sum(repeats.values())
    held_out = min(samples // 10, _HELD_OUT_MOST) if samples >= _HELD_OUT_FROM else 0
    # Visits of a pass over the data set. One pass sees a sample at most max(repeats) times.
    a_pass = sum(often * count for often, count in repeats.items()) * (samples - held_out) / samples
    wanted = math.ceil(VISITS * a_pass / (max(repeats) * at_once))
    steps = min(max(-(-wanted // 100) * 100, LEAST_STEPS), most)  # rounded up to hundreds
    visits = [steps * at_once * often / a_pass for often in (min(repeats), max(repeats))]
    texts = dict.fromkeys(f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in visits)
    return Course(steps, held_out, " to ".join(texts))


def settings_of(asked: Asked) -> list[Change]:
    """The changes that are known before the data set is checked: paths, trigger and models."""
    data = asked.data
    table = None if data.table is None else asked.written(data.table)
    changes = [
        Change("dataset_base_path", asked.written(data.base)),
        Change("dataset_metadata_path", table),
        Change("output_path", f"models/train/{asked.name}"),
    ]
    if asked.trigger is not None:
        comment = "Stands before every caption: write it into prompts, too."
        changes.append(Change("caption_prefix", asked.trigger, comment, "dataset_base_path"))
    if asked.models:
        changes.append(Change("model_paths", _models(asked), None, "model_id_with_origin_paths"))
        changes.append(Change("model_id_with_origin_paths", None))
    return changes


def _models(asked: Asked) -> list[str | list[str]]:
    """The value of `model_paths`. The shards of one model are one entry, as a list."""
    # A shell expands `*` to one argument for each shard.
    together: dict[str, list[str]] = {}
    for path in asked.models:
        together.setdefault(SHARD.sub("", path), []).append(asked.written(path))
    return [paths[0] if len(paths) == 1 else paths for paths in together.values()]


def changed(values: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """The values of a recipe with some of them replaced; None removes a value."""
    others = {change.key: change.value for change in changes}
    together = {**values, **others}
    return {name: value for name, value in together.items() if value is not None}


def config_of(values: Mapping[str, Any], root: Path) -> TrainingConfig:
    """The config of a recipe's values, with absolute paths.

    Raises:
        ParameterError: a value is invalid.
    """
    # `cache_path` has a relative default, so it must be in the dict to become absolute.
    default = TrainingConfig.model_fields["cache_path"].default
    whole = {"cache_path": default, **values}
    for name in ("dataset_base_path", "dataset_metadata_path", "output_path", "cache_path"):
        if name in whole:
            whole[name] = os.path.normpath(root / whole[name])
    if "model_paths" in whole:
        whole["model_paths"] = [
            str(root / path) if isinstance(path, str) else [str(root / shard) for shard in path]
            for path in whole["model_paths"]
        ]
    return read_config(whole, "the new recipe")


def choices_of(
    found: Found, asked: Asked, config: TrainingConfig, options: RecipeOptions
) -> tuple[list[Change], Course]:
    """The changes that follow from the data set, and the length of the training.

    Args:
        config, options: those of the template with `settings_of` applied.
    """
    at_once = config.batch_size * config.gradient_accumulation_steps * (options.num_processes or 1)
    assert config.max_train_steps is not None, "templates say how long they train"
    course = course_of(found.repeats, at_once, config.max_train_steps)
    captions = "; captions lie in text files beside them" if asked.data.table is None else ""
    size = f"{found.described}{captions}."
    steps = (
        f"How long it trains, in steps of the optimizer: about {course.visits} visits of each sample. {VISITS} "
        f"visits are a place to begin, in {LEAST_STEPS} steps or more and {config.max_train_steps} at most."
    )
    changes = [
        Change("dataset_base_path", asked.written(asked.data.base), size),
        Change("max_train_steps", course.steps, steps),
        Change("save_steps", course.save_steps, _SAVED),
    ]
    width, height = found.largest
    # Without larger pictures the template's `max_pixels` is never reached: show the real bound.
    if config.height is None and width * height < config.max_pixels:
        comment = (
            f"The area in pixels of the largest picture, {width}x{height}: it bounds none of them."
        )
        if config.bucket_step is not None:
            comment += f" Sides are rounded down to {config.bucket_step} pixels."
        changes.append(Change("max_pixels", width * height, comment))
    if course.held_out:
        changes.append(Change("validation_split", course.held_out, _HELD_OUT, "save_steps"))
    if config.sample_prompts and found.prompts:
        changes.append(Change("sample_prompts", found.prompts, _PROMPTS))
    return changes, course


_SAVED = (
    "Steps from one checkpoint to the next: a quarter, so that there are four to choose from. "
    "Samples are made with each, where there are prompts."
)
_HELD_OUT = (
    "So many samples are not trained on: their loss shows when the "
    "training begins to memorise the others."
)
_PROMPTS = (
    "What is made with each checkpoint, to look at: captions of the data set. Put prompts of your own "
    "beside them, also of something else, to see what else has changed."
)
