"""Where memory is not enough, one message says what took it, and what to try."""

import json
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Values, make_config
from families.wanvideo.cases import CASES as WAN
from process_support import python
from safetensors import safe_open
from test_resume import never
from torch import nn

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.errors import OutOfMemory, ParameterError, WeightsError
from diffsynth_dagster.preflight import check_config
from diffsynth_dagster.run.failure import failure_of, read_failures
from diffsynth_dagster.run.guard import FailureGuard, WrittenFailures
from diffsynth_dagster.shortage import bytes_asked, out_of_memory, says_short, size
from diffsynth_dagster.train import run as run_training
from diffsynth_dagster.training.memory import Memory, tensor_bytes, tensors_in
from diffsynth_dagster.training.remedies import Moment, remedies
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.models import Models

CPU = torch.device("cpu")
TRAINING: Moment = "in the training"


class Hungry(torch.optim.AdamW):
    """Asks for too much in its second step, with the gradients and its state there."""

    taken = 0

    def step(self, closure: Any = None) -> None:  # pyright: ignore
        if any(self.state.values()):
            numbers = sum(p.numel() for group in self.param_groups for p in group["params"])
            count = sum(len(group["params"]) for group in self.param_groups)
            type(self).taken = numbers * 4, 2 * numbers * 4 + 4 * count
            torch.empty(2**46)
        super().step()


def bytes_of(path: Path) -> int:
    """Of the tensors of a file, in float32."""
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return 4 * sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("more", [{}, {"ema_sigma_rel": 0.1}], ids=["plain", "average"])
def test_a_training_says_what_took_its_memory(
    values: Values, tmp_path: Path, more: dict[str, Any]
) -> None:
    given = values(customized_optimizer="test_memory.Hungry", num_epochs=2, **more)
    config = make_config({**given, "output_path": str(tmp_path / "run")})
    with pytest.raises(OutOfMemory) as raised:
        run_training(config, never)
    trained, state = Hungry.taken
    weights = bytes_of(Path(given["model_paths"][0])) + trained
    average = f", their average {size(trained)}" if more else ""
    assert raised.value.where is not None
    assert raised.value.where.startswith(
        f"it was taken by: weights {size(weights)}, gradients {size(trained)}, "
        f"optimizer {size(state)}{average}, activations and all else at most "
    )
    assert raised.value.what.startswith(
        "the memory of the CPU is not enough in the training: 256.0 TiB more were asked for; it has"
    )
    assert raised.value.do is not None
    assert raised.value.do.startswith("try, in this order: ")
    assert raised.value.do.count("; ") == 2


def test_what_is_shared_counts_once() -> None:
    weight = torch.zeros(10, 10)
    tied = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Embedding(10, 10)])
    tied[1].weight = tied[0].weight
    assert tensor_bytes([weight, weight[:5], weight.T], CPU) == 400
    assert tensor_bytes([tied[0].weight, tied[1].weight], CPU) == 400
    assert tensor_bytes([weight.bfloat16(), torch.zeros(3, dtype=torch.uint8)], CPU) == 203
    assert tensor_bytes([torch.empty(10**9, device="meta")], CPU) == 0
    nested = {"a": [weight, {"b": (weight + 1, 3)}], "c": None}
    assert tensor_bytes(tensors_in(nested), CPU) == 800


def test_activations_are_what_was_taken_beside(values: Values) -> None:
    """256 MiB that were there for a while, and are known of nothing else."""
    config = make_config(values())
    memory = memory_of(config)
    before = memory.usage()
    held = torch.ones(64 * 2**20)
    del held
    after = memory.usage()
    assert after.weights == before.weights == 0
    assert after.others > 0.9 * 2**28


def memory_of(config: TrainingConfig) -> Memory:
    return Memory(config, models_of(config))


def models_of(config: TrainingConfig, dtype: torch.dtype = torch.float32) -> Models:
    found = find_model(config, ModelHub(Path(), skip_download=True))
    return Models(found, CPU, dtype, on_cpu_first=False)


def names_of(config: TrainingConfig, moment: Moment = TRAINING) -> list[str]:
    return [re.split(r"[: ]", r.said)[0] for r in remedies(config, models_of(config), moment)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {},
            "use_gradient_checkpointing batch_size max_pixels mixed_precision fp8_models optimizer "
            "lora_rank",
        ),
        (
            {"use_gradient_checkpointing": True, "batch_size": 1, "height": 32, "width": 32},
            "height mixed_precision fp8_models optimizer lora_rank",
        ),
        (
            {"optimizer": "adamw8bit", "lora_rank": 1, "height": 16, "width": 16},
            "use_gradient_checkpointing batch_size mixed_precision fp8_models",
        ),
        (
            {"trainable_models": ["dit"], "ema_sigma_rel": 0.1, "max_pixels": 256},
            "use_gradient_checkpointing batch_size mixed_precision fp8_models optimizer "
            "ema_sigma_rel lora_base_model",
        ),
        (
            {"customized_optimizer": "torch.optim.SGD"},
            "use_gradient_checkpointing batch_size max_pixels mixed_precision fp8_models lora_rank",
        ),
    ],
)
def test_what_is_not_done_yet_is_named_in_order(
    values: Values, given: dict[str, Any], names: str
) -> None:
    assert names_of(make_config(values(**given))) == names.split()


def test_each_moment_has_its_remedies(values: Values) -> None:
    config = make_config(values(sample_prompts=["a", "b"]))
    weights = ["mixed_precision", "fp8_models"]
    assert names_of(config, "while models were loaded") == weights
    assert names_of(config, "while samples were encoded") == ["batch_size", "max_pixels", *weights]
    assert names_of(config, "while samples were made") == ["sample_prompts", "max_pixels", *weights]


def test_videos_may_be_shorter(tmp_path: Path) -> None:
    """And they are told only what their family has: its gradients are checkpointed anyway."""
    case = next(c for c in WAN if c.name == "wan_t2v")
    case.write(tmp_path / "model")
    given = {
        "family": case.family,
        "dataset_base_path": str(tmp_path),
        "dataset_metadata_path": str(tmp_path / "metadata.csv"),
        "lora_base_model": case.base,
        **case.models(tmp_path / "model", "diffusers"),
        **case.parameters,
        "num_frames": 81,
    }
    config = make_config(given)
    said = [r.said for r in remedies(config, models_of(config), TRAINING)]
    assert said[0].startswith("num_frames: 37") or said[0].startswith("batch_size")
    assert "num_frames: 37" in said
    assert "use_gradient_checkpointing: true" not in said


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"trainable_models": ["dit"], "ema_sigma_rel": 0.1},
        {"lora_method": "dora"},
        {"lora_method": "oft", "lora_rank": None, "lora_alpha": None},
    ],
)
def test_every_remedy_can_be_taken(values: Values, given: dict[str, Any]) -> None:
    """One after the other, until none is left: each is a parameter, and its value is accepted."""
    current = {name: value for name, value in values(**given).items() if value is not None}
    for _ in range(60):
        config = make_config(current)
        found = models_of(config).resolved
        if find_spec("bitsandbytes") is None and config.optimizer == "adamw8bit":
            check_config(config.model_copy(update={"optimizer": "adamw"}), found)
        else:
            check_config(config, found)
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        left = remedies(config, models_of(config, dtype), TRAINING)
        if not left:
            return
        said = left[0].said
        if said.startswith("fp8_models with "):
            path = said.removeprefix("fp8_models with ").rpartition(" (")[0]
            current["fp8_models"] = [*current.get("fp8_models", []), path]
        elif said == "ema_sigma_rel: left out":
            del current["ema_sigma_rel"]
        elif " in place of trainable_models" in said:
            name = current.pop("trainable_models")
            current |= {"lora_base_model": name, "remove_prefix_in_ckpt": "pipe.dit."}
        else:
            current |= dict(re.findall(r"(\w+): ([^\s,;]+)", said))
    raise AssertionError(f"there is no end: {current}")


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (lambda: torch.empty(10**14), 4 * 10**14),
        (lambda: bytearray(10**15), None),
        (lambda: raised(torch.OutOfMemoryError(CUDA)), 2.5 * 2**30),
        (lambda: raised(RuntimeError("CUDA error: out of memory")), None),
        (lambda: wrapped(torch.OutOfMemoryError(CUDA)), 2.5 * 2**30),
        (lambda: raised(OSError(12, "Cannot allocate memory")), None),
    ],
)
def test_a_shortage_is_told_by_whatever_raises_it(
    error: Callable[[], Any], asked: float | None
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        error()
    cause = says_short(caught.value)
    assert cause is not None
    assert bytes_asked(cause) == asked
    assert isinstance(out_of_memory(caught.value), OutOfMemory)


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"


def raised(error: Exception) -> None:
    raise error


def wrapped(error: Exception) -> None:
    try:
        raise error
    except RuntimeError as cause:
        raise WeightsError("the model file cannot be read") from cause


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        ParameterError("cannot allocate memory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OutOfMemory("said already"),
    ],
)
def test_another_error_is_none(error: Exception) -> None:
    assert out_of_memory(error) is None


def test_it_is_a_mistake_that_is_not_tried_again(tmp_path: Path) -> None:
    with FailureGuard(WrittenFailures(tmp_path)) as guard:
        torch.empty(10**14)
    assert guard.code == 2
    (failure,) = read_failures(tmp_path)
    assert (failure.kind, failure.may_retry, failure.traceback) == ("mistake", False, None)
    assert failure.what == "the memory is not enough: 363.8 TiB more were asked for"
    assert failure_of(OutOfMemory("a")).kind == "mistake"


BOUNDED = """
import resource, sys
import psutil
from diffsynth_dagster.training.sampling import Evaluation

def bound(mebibytes):
    limit = psutil.Process().memory_info().vms + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def before_the_steps(generate):
    bound(int(sys.argv[2]))
    return Evaluation({}, {})

def at_samples(generate):
    bound(int(sys.argv[2]))
    generate(["a", "b", "c", "d"], 0)

def start():
    from diffsynth_dagster.train import main
    import diffsynth_dagster.training.loop, diffusers, transformers
    if sys.argv[1] == "at_once":
        bound(int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
"""


def bounded(folder: Path, when: str, mebibytes: int, given: dict[str, Any]) -> str:
    """What a training says that may take so much more memory from some moment on."""
    (folder / "bounded.py").write_text(BOUNDED, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**given, "output_path": str(folder / "run")}))
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import bounded; bounded.start()"
    done = python("-c", code, when, str(mebibytes), "--recipe", str(recipe))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("moment", "when", "mebibytes", "given"),
    [
        pytest.param(
            *("while samples were encoded", "at_once", 3000, {"height": 4096, "width": 4096}),
            id="encoding",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            *("in the training", "before_the_steps", 300),
            {"dataset_repeat": 128, "batch_size": 1024},
            id="step",
        ),
        pytest.param(
            *("while samples were made", "at_samples", 200, {"sample_num_inference_steps": 1}),
            id="sampling",
            marks=pytest.mark.soak,
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="there is no limit of memory to set")
def test_memory_that_is_really_not_enough(
    values: Values, tmp_path: Path, moment: str, when: str, mebibytes: int, given: dict[str, Any]
) -> None:
    looks = {} if when == "at_once" else {"customized_evaluation": f"bounded.{when}"}
    said = bounded(tmp_path, when, mebibytes, values(**given, **looks))
    assert f"the memory of the CPU is not enough {moment}" in said
    assert "it was taken by: weights " in said
    assert "try, in this order: " in said


READ = """
import resource, sys
import psutil
from pathlib import Path
from diffsynth_dagster.shortage import out_of_memory
from diffsynth_dagster.weights.load import read_tensors
limit = psutil.Process().memory_info().vms + 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    read_tensors([Path(sys.argv[1])])
except Exception as error:
    print(type(error).__name__, repr(out_of_memory(error)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is no limit of memory to set")
def test_a_file_that_does_not_fit_is_not_damaged(tmp_path: Path) -> None:
    """A file of 4 GiB, which takes no room on the disk, where 500 MiB are left."""
    path = tmp_path / "large.safetensors"
    length = 2**32
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, length]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + length)
    done = python("-c", READ, str(path))
    assert " OutOfMemory('the memory is not enough" in done.stdout, done.stdout + done.stderr
