"""Direct distillation: the stage that draws the noise from which the teacher made each row.

The rows are samples of the teacher. Each names the seed, the device of the random generator and the
number of steps in which the student is to make the same sample from the same noise.
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
_ALWAYS = ("seed", "num_inference_steps")
_START = "{}_start"
STEPS = "teacher_steps"


def with_teacher(family: Family, config: TrainingConfig) -> Family:
    """The family with a stage that draws the teacher's noise.

    `seed` and `num_inference_steps` are read from every row; `rand_device` (else the CPU) and
    `cfg_scale` (which must be 1) where `extra_inputs` names them.

    Raises:
        ParameterError: the family cannot be distilled.
    """
    if family.inference_sigmas is None:
        raise ParameterError(
            f"{family.name} cannot be distilled",
            where=f"task = {config.task}",
            do="train it with the task sft",
        )
    makers = [s for s in family.stages if any(o.role == "target" for o in s.yields)]
    targets = [o.name for s in makers for o in s.yields if o.role == "target"]

    def run(loaded: Loaded, samples: Sequence[Sample]) -> list[Tensors]:
        return [_begin(sample, targets) for sample in samples]

    stage = Stage(
        "teacher",
        tuple(c for c in COLUMNS if c.column in (*_ALWAYS, *config.extra_inputs)),
        (),
        (*(Output(_START.format(t), "start", of=t) for t in targets), Output(STEPS, "steps")),
        run,
        needs=tuple(maker.name for maker in makers),
    )
    return replace(family, stages=(*family.stages, stage))


def _begin(sample: Sample, targets: Sequence[str]) -> Tensors:
    """Noise for each target in the shape of its latents, and the number of steps."""
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
        source.manual_seed(sample["seed"])
        shape = (1, *sample[target].shape)
        drawn[_START.format(target)] = torch.randn(shape, generator=source, device=device)[0]
    return drawn
