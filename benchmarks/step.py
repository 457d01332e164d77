"""One LoRA step of the published models at the guide's sizes: time, memory, FLOP utilisation.

    python benchmarks/step.py full      random bf16 weights, made on the GPU; writes the result
    python benchmarks/step.py tiny      the same with tiny models, on whatever there is
    python benchmarks/step.py tiny FLUX.1-dev            one of them; nothing is written

Each model runs in a process of its own, with its template of recipes/examples: LoRA layers,
gradient checkpointing and mixed precision are the recipe's, the module is told from tensor shapes,
and the step is the trainer's. Model FLOPs are those of one forward and one backward pass: what is
counted in a step, less the forward pass that checkpointing repeats. They are set against the rate
of a large matrix product on the same device.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import report
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffsynth_dagster.config import TrainingConfig, read_recipe
from diffsynth_dagster.config.entries import ModelEntry
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Tensors
from diffsynth_dagster.training.batches import Batch, collate
from diffsynth_dagster.training.build import build_step
from diffsynth_dagster.training.optimizer import make_optimizer
from diffsynth_dagster.weights.header import TensorInfo
from diffsynth_dagster.weights.load import build_empty
from diffsynth_dagster.weights.models import Models
from diffsynth_dagster.weights.resolved import ComponentFiles, ResolvedModel, as_used, resolve

EXAMPLES = Path(__file__).parents[1] / "recipes" / "examples"
STEPS = {"full": (2, 8), "tiny": (1, 3)}
"""How many steps are made before the measured ones, and how many are measured."""


@dataclass(frozen=True)
class Shape:
    """An architecture and the sample it is trained on.

    Attributes:
        options: of the architecture, as far as they differ from the library's defaults.
        latents: shape of the clean latents.
        text: shape of the encoded prompt: tokens, width.
        pooled: width of the pooled prompt, where there is one.
    """

    options: Mapping[str, Any]
    latents: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0


@dataclass(frozen=True)
class Subject:
    """A model that is measured: its template, its architecture, its shapes at each scale."""

    recipe: str
    make: Callable[..., nn.Module]
    target: str
    shapes: Mapping[str, Shape]


SUBJECTS = {
    "Qwen-Image, 1024 x 1024": Subject(
        "qwen_image_lora",
        QwenImageTransformer2DModel,
        "image",
        {
            "full": Shape({}, (16, 128, 128), (256, 3584)),
            "tiny": Shape(
                {
                    "num_layers": 2,
                    "attention_head_dim": 32,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 64,
                    "axes_dims_rope": (4, 14, 14),
                },
                (16, 16, 16),
                (16, 64),
            ),
        },
    ),
    "FLUX.1-dev, 1024 x 1024": Subject(
        "flux_dev_lora",
        FluxTransformer2DModel,
        "image",
        {
            "full": Shape({"guidance_embeds": True}, (16, 128, 128), (512, 4096), 768),
            "tiny": Shape(
                {
                    "guidance_embeds": True,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 64,
                    "pooled_projection_dim": 32,
                },
                (16, 16, 16),
                (16, 64),
                32,
            ),
        },
    ),
    "Wan2.1-T2V-1.3B, 81 x 480 x 832": Subject(
        "wan21_t2v_1.3b_lora",
        WanTransformer3DModel,
        "video",
        {
            "full": Shape(
                {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
                (16, 21, 60, 104),
                (512, 4096),
            ),
            "tiny": Shape(
                {"num_attention_heads": 1, "ffn_dim": 256, "num_layers": 2, "text_dim": 64},
                (16, 3, 16, 16),
                (16, 64),
            ),
        },
    ),
}


class RandomModels(Models):
    """Components of random weights, made where they are used."""

    def _load(self, name: str) -> nn.Module:
        module = build_empty(self.resolved.components[name])
        state = {
            tensor: torch.randn(meta.shape, device=self.device, dtype=self.dtype) * 0.02
            for tensor, meta in module.state_dict().items()
        }
        module.load_state_dict(state, strict=False, assign=True)
        return module.to(self.device).eval().requires_grad_(False)


def found_model(config: TrainingConfig, subject: Subject, shape: Shape) -> ResolvedModel:
    """The denoiser, as its published files would tell."""
    with torch.device("meta"):
        published = subject.make(**shape.options).state_dict()
    header = {name: TensorInfo("BF16", tuple(t.shape)) for name, t in published.items()}
    family = find_family(cast(str, config.family))
    shapes = {name: info.shape for name, info in header.items()}
    family = as_used(family, config, {family.denoiser: shapes})
    component = family.component(family.denoiser)
    entry = ModelEntry("model_paths", paths=(subject.recipe,))
    found = {component.name: ComponentFiles(component, entry, (), header, None)}
    return resolve(config, family, components=found)


def batch_of(model: ResolvedModel, subject: Subject, shape: Shape) -> Batch:
    """One sample, as the store would give it."""
    sample: Tensors = {
        subject.target: torch.randn(shape.latents),
        "prompt_embeds": torch.randn(shape.text),
    }
    if shape.pooled:
        sample["pooled_prompt_embeds"] = torch.randn(shape.pooled)
    cached = model.cached_stages
    outputs = [output for stage in cached for output in stage.yields]
    together, denoiser = collate(outputs, [sample]), model.family.denoiser
    return Batch(["sample"], [0], [0], [0], 0, together, [], denoiser, 1.0)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large square matrices: the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        finish(device)
        start = time.perf_counter()
        left @ right
        finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def counted(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and attentions of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(name: str, scale: str) -> dict[str, Any]:
    """Time, memory and utilisation of the step of the model of this name."""
    subject = SUBJECTS[name]
    shape = subject.shapes[scale]
    config = read_recipe(next(EXAMPLES.rglob(f"{subject.recipe}.yaml"))).config
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=config.mixed_precision if on_gpu else "no")
    device = accelerator.device
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    set_seed(config.seed)
    found = found_model(config, subject, shape)
    models = RandomModels(found, device, dtype, on_cpu_first=False)
    step = build_step(config, models, torch.float32)
    trained = [p for p in step.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(step, make_optimizer(config, trained))
    batch = batch_of(found, subject, shape).to(device)

    def train_once() -> None:
        loss = model(batch).sum() * batch.scale
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss), "the loss is not finite"

    warm_up, measured = STEPS[scale]
    for _ in range(warm_up):
        train_once()
    seconds: list[float] = []
    for _ in range(measured):
        finish(device)
        seconds.append(report.timed(lambda: (train_once(), finish(device)))[0])
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else report.peak_memory()
    with torch.no_grad():
        forward = counted(lambda: model(batch))
    flops = counted(train_once) - forward
    peak = matrix_peak(device, dtype)
    typical = statistics.median(seconds)
    return {
        "model": name,
        "parameters (10^9)": round(sum(p.numel() for p in step.parameters()) / 1e9, 3),
        "LoRA rank": config.lora_rank,
        "seconds per step": round(typical, 4),
        "TFLOP per step": round(flops / 1e12, 6),
        "GiB at most": round(memory / 2**30, 2),
        "matrix peak (TFLOP/s)": round(peak / 1e12, 2),
        "utilisation": round(flops / typical / peak, 4),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "type": str(dtype).removeprefix("torch."),
    }


def main(tiny: bool, only: str = "") -> dict[str, Any]:
    """Measure every model whose name starts with a text, and print the table."""
    names, scale = [name for name in SUBJECTS if name.startswith(only)], "tiny" if tiny else "full"
    rows = [report.alone(measure, name, scale, tiny=tiny) for name in names]
    print(report.table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    parser = report.parser(__doc__, "full" if torch.cuda.is_available() else "tiny")
    parser.add_argument("only", nargs="?", default="", help="how the names of models start")
    options = parser.parse_args()
    found = main(options.scale == "tiny", options.only)
    if options.scale == "full" and not options.only:
        report.write("step", found)
