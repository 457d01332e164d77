"""A family that reads a video, images of one and of many, and a caption; no model is behind it."""

from dataclasses import replace

import torch

from diffsynth_dagster.data.columns import Input
from diffsynth_dagster.data.geometry import FrameRule, Geometry
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Family, Output, Stage

VIDEO = Input("video", "video")
FIRST = Input("first", "image")
EDITS = Input("edits", "image", many=True)
CAPTION = Input("prompt", "text")


def _stage(name: str, *reads: Input) -> Stage:
    return Stage(
        name,
        reads,
        (),
        (Output(name, "target" if reads[0].kind == "video" else "condition"),),
        lambda loaded, samples: [{name: torch.zeros(1)} for _ in samples],
    )


WAN = FrameRule(4, 1)


def video_family(*inputs: Input, frames: FrameRule | None = WAN) -> Family:
    """Qwen-Image's declaration with other inputs."""
    return replace(
        find_family("qwen_image"),
        name="a_video_family",
        stages=(_stage("prompt", CAPTION), *(_stage(i.column, i) for i in inputs)),
        geometry=Geometry(16, frames),
    )
