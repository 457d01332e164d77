"""Sampling with the pipelines of diffusers, and loading LoRAs as they do."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from diffsynth_dagster.families.contract import Clip, Loaded, SampleRequest, Tensors

_DENOISERS = {"dit": "transformer", "unet": "unet"}
"""Component → what pipelines call it."""


def make_pipeline(
    kind: Any, schedule: Mapping[str, object] | SchedulerMixin, loaded: Loaded, **more: object
) -> Any:
    """A pipeline of diffusers for prompts that are already encoded, with no progress bar.

    Args:
        kind: the class of the pipeline.
        schedule: a scheduler, or settings of diffusers' flow-matching Euler scheduler.
        loaded: `dit` or `unet`, and `vae`; the pipeline gets None for its encoders and tokenizers.
        more: further arguments of its constructor.
    """
    scheduler: Any = schedule
    if not isinstance(schedule, SchedulerMixin):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(schedule))
    parameters = inspect.signature(kind.__init__).parameters.values()
    absent = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
    given = {
        "scheduler": scheduler,
        "vae": loaded["vae"],
        **{theirs: loaded[name] for name, theirs in _DENOISERS.items() if name in loaded},
        **more,
    }
    pipeline = kind(**absent | given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(
    pipeline: Any, request: SampleRequest, guidance: str = "true_cfg_scale", **more: object
) -> list[Clip]:
    """Images by a pipeline whose arguments are called as the conditions are.

    Args:
        guidance: its argument for the scale of classifier-free guidance.
        more: further arguments of the call.

    Returns:
        For each prompt a clip of one frame.
    """
    negative = {f"negative_{name}": t for name, t in (request.negative or {}).items()}
    images = pipeline(
        **request.conditions,
        **negative,
        **{guidance: request.cfg_scale},
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        generator=request.generators,
        **more,
    ).images
    return [Clip([image]) for image in images]


def load_into_transformer(
    pipeline: Any,
    component: str,
    module: nn.Module,
    tensors: Tensors,
    metadata: Mapping[str, object],
) -> None:
    """Load an exported LoRA the way a pipeline of diffusers with one transformer does.

    Raises:
        ValueError: the pipeline loads no LoRA into this component.
    """
    if component != "dit":
        raise ValueError(f"{pipeline.__name__} loads no LoRA into its {component}")
    pipeline.load_lora_into_transformer(
        pipeline.lora_state_dict(dict(tensors)),
        module,
        metadata=dict(metadata),
        low_cpu_mem_usage=True,
    )
