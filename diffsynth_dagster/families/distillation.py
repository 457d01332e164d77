"""Direct distillation: the stage that draws the noise from which the teacher made each row.

The rows are samples of the teacher. Each row gives the seed and the device of the teacher's random
generator, and the number of steps. The student learns to make the same sample from the same noise
in that number of steps.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffsynth_dagster.config.parameters import TrainingConfig
from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.errors import MetadataError, ParameterError
from diffsynth_dagster.families.contract import (
    Family,
    Loaded,
    Output,
    Sample,
    Stage,
    Tensors,
)

# Tables of floats write whole numbers as `7.0`, so the patterns accept that.
COLUMNS = (
    Input("seed", "number", pattern=r"^\s*\d{1,19}(?:\.0*)?\s*$", wants="a whole number"),
    Input("rand_device", "text"),
    Input(
        "num_inference_steps",
        "number",
        pattern=r"^\s*[1-9]\d*(?:\.0*)?\s*$",
        wants="a whole number of steps, 1 or more",
    ),
    Input(
        "cfg_scale",
        "number",
        pattern=r"^\s*1(?:\.0*)?\s*$",
        wants="1, since a student samples without guidance",
    ),
)
_REQUIRED = ("seed", "num_inference_steps")
_START = "{}_start"
STEPS = "teacher_steps"


def with_teacher(family: Family, config: TrainingConfig) -> Family:
    """The family with a stage that draws the teacher's noise.

    Every row must have `seed` and `num_inference_steps`. `rand_device` (the default is the CPU) and
    `cfg_scale` (which must be 1) are read if `extra_inputs` lists them.

    Raises:
        ParameterError: the family cannot be distilled.
    """
    if family.inference_sigmas is None:
        raise ParameterError(
            f"{family.name} cannot be distilled",
            where=f"task = {config.task}",
            do="train it with the task sft",
        )
    target_stages = [s for s in family.stages if any(o.role == "target" for o in s.yields)]
    targets = [o.name for s in target_stages for o in s.yields if o.role == "target"]

    def run(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
        return [_teacher_noise(sample, targets) for sample in samples]

    stage = Stage(
        "teacher",
        tuple(c for c in COLUMNS if c.column in (*_REQUIRED, *config.extra_inputs)),
        (),
        (*(Output(_START.format(t), "start", of=t) for t in targets), Output(STEPS, "steps")),
        run,
        # The latents of the targets give the noise its shape.
        needs=tuple(stage.name for stage in target_stages),
    )
    return replace(family, stages=(*family.stages, stage))


def _teacher_noise(sample: Sample, targets: Sequence[str]) -> Tensors:
    """The noise of each target, in the shape of its latents, and the number of steps."""
    device = sample.get("rand_device", "cpu").strip()
    try:
        source = torch.Generator(device)
    except RuntimeError as error:
        raise MetadataError(
            f"no random numbers can be drawn on '{device}' here",
            where="the column rand_device",
            do="encode where this device is, or make the data with the noise of cpu",
        ) from error
    drawn: Tensors = {STEPS: torch.tensor(sample["num_inference_steps"])}
    for target in targets:
        # Seeded again for each target, so the noise does not depend on the order of the targets.
        source.manual_seed(sample["seed"])
        shape = (1, *sample[target].shape)
        drawn[_START.format(target)] = torch.randn(shape, generator=source, device=device)[0]
    return drawn
