"""What most tests share: a tiny Qwen-Image model with random weights, pictures, and a training."""

import gc
import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

# Before any library is imported. Several tests run at once on two cores, where the libraries'
# threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import pytest
import torch
import yaml
from PIL import Image

from diffsynth_dagster.cache.manifest import read_manifest
from diffsynth_dagster.cache.resolve import Samples, resolve
from diffsynth_dagster.config import TrainingConfig, read_config
from diffsynth_dagster.run.record import RunRecord, read_record
from diffsynth_dagster.train import main

ROOT = Path(__file__).parents[1]


BEGIN_WITH = (
    *("test_dagster_browser.py", "test_dagster_ui.py", "test_dagster_resume.py"),
    *("test_dagster_stop.py", "test_soak.py"),
    *("test_resume_kills.py", "test_dagster_failure.py", "test_benchmarks.py"),
)
"""Test files that mostly wait for processes: they run first, beside others that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in BEGIN_WITH)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Make garbage collections quick."""
    # Imported modules stay. Without `freeze`, each collection searches them for a quarter second.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give this test process its own folder of device locks (see `resources.places`)."""
    # Otherwise tests in parallel would wait until another one's training has freed the CPU.
    os.environ["DIFFSYNTH_DAGSTER_PLACES"] = str(tmp_path_factory.mktemp("places"))


LORA = ["to_q", "to_v"]


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer: 256 bytes, no merges, the special tokens of Qwen's
    templates."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    names = ["im_start", "im_end", "endoftext", "vision_start", "vision_end", "image_pad"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{n}|>" for n in names]})
    tokenizer.save_pretrained(folder)


def write_qwen(folder: Path) -> Path:
    """Write a tiny Qwen-Image with random weights, in the layout of diffusers."""
    # Sizes that cannot be computed from the shapes of tensors are those of every published
    # text encoder: 128 channels per head, and 16 vision heads. So the model can be recognised
    # without its config.json.
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    QwenImageTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=64,
        out_channels=16,
        joint_attention_dim=256,
        axes_dims_rope=(4, 14, 14),
    ).save_pretrained(folder / "transformer")
    AutoencoderKLQwenImage(base_dim=8).save_pretrained(folder / "vae")
    text = {
        "vocab_size": 300,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1e6,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 16,
        "intermediate_size": 32,
        "out_hidden_size": 256,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=259,
        image_token_id=261,
        tie_word_embeddings=False,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    return folder


def write_images(folder: Path, count: int, sizes: list[tuple[int, int]] | None = None) -> Path:
    """Write images of random pixels with captions of different lengths, and their metadata.csv.

    Args:
        sizes: (width, height) of the images, in turn; 32x32 if left out.
    """
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(1)
    lines = ["image,prompt"]
    for index in range(count):
        width, height = (sizes or [(32, 32)])[index % len(sizes or [0])]
        pixels = torch.randint(0, 255, (height, width, 3), generator=source, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        lines.append(f'{index}.png,"picture number {"x" * (index % 5)} {index}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "Qwen-Image")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 32x32."""
    return write_images(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for all tests that do not look into it, so that the pictures are encoded once."""
    return tmp_path_factory.mktemp("cache")


def model_files(model: Path) -> list[str]:
    """The three model files, as `model_paths` takes them."""
    return [
        str(model / "transformer" / "diffusion_pytorch_model.safetensors"),
        str(model / "text_encoder" / "model.safetensors"),
        str(model / "vae" / "diffusion_pytorch_model.safetensors"),
    ]


def lora_values(model: Path, pictures: Path, cache: Path) -> dict[str, Any]:
    """The parameters of a LoRA training of two steps on eight pictures, without `output_path`."""
    return {
        "family": "qwen_image",
        "dataset_base_path": str(pictures),
        "dataset_metadata_path": str(pictures / "metadata.csv"),
        "model_paths": model_files(model),
        "tokenizer_path": str(model / "tokenizer"),
        "batch_size": 4,
        "learning_rate": 1e-3,
        "lora_base_model": "dit",
        "lora_target_modules": LORA,
        "lora_rank": 4,
        "cache_path": str(cache),
    }


Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def shared_values(tiny_qwen: Path, pictures: Path, shared_cache: Path) -> dict[str, Any]:
    """The parameters that `values` begins with, for fixtures of a larger scope."""
    return lora_values(tiny_qwen, pictures, shared_cache)


@pytest.fixture
def values(shared_values: dict[str, Any], tmp_path: Path) -> Values:
    """A function that returns the parameters of a LoRA training of two steps.

    Keywords override parameters; None removes one.
    """

    def make(**overrides: Any) -> dict[str, Any]:
        base = {**shared_values, "output_path": str(tmp_path / "run")}
        # Full training: parameters of a LoRA would be refused.
        if "trainable_models" in overrides:
            for name in [key for key in base if key.startswith("lora_")]:
                del base[name]
        return {k: v for k, v in {**base, **overrides}.items() if v is not None}

    return make


def make_config(values: dict[str, Any]) -> TrainingConfig:
    return read_config(values, "the test")


def train(
    values: dict[str, Any], folder: Path, *flags: str, exports: bool = False
) -> tuple[int, Path]:
    """Run the trainer's command line in this process.

    Args:
        folder: the run folder.
        exports: whether exports are written, too. Most tests do not look at them.

    Returns:
        The exit code and the run folder.
    """
    values = {**values, "output_path": str(folder)}
    recipe = folder.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    less = [] if exports else ["--checkpoints_only"]
    return main(["--recipe", str(recipe), *flags, *less]), folder


def train_to_end(values: dict[str, Any], folder: Path, *flags: str, exports: bool = False) -> Path:
    """Run the trainer's command line, which succeeds; returns the run folder."""
    code, run = train(values, folder, *flags, exports=exports)
    assert code == 0
    return run


def why_refused(values: dict[str, Any], folder: Path, *flags: str, exports: bool = False) -> str:
    """What the command line says of a training that it refuses."""
    said = io.StringIO()
    with redirect_stderr(said):
        assert train(values, folder, *flags, exports=exports)[0] == 2
    assert "Traceback" not in said.getvalue()
    return said.getvalue()


def record_of(run: Path) -> RunRecord:
    """The record in a run folder, which has one."""
    record = read_record(run)
    assert record is not None
    return record


def samples_of(run: Path) -> Samples:
    """The samples of a run folder, as its training reads them."""
    return resolve(read_manifest(run), run)


def keys_of(run: Path) -> set[str]:
    """The keys of all samples of a run folder."""
    return set(read_manifest(run).keys.collect()["key"])


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """A function that prints to the terminal although pytest captures output."""

    def printed(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return printed
