"""CLIP sees the whole of a frame that is given, as with the authors of Wan 2.1."""

from typing import Any

import pytest
import torch
from families.wanvideo.cases import write
from families.wanvideo.vision import clip_pixels
from PIL import Image
from transformers import CLIPVisionModel

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.families.wanvideo import stages
from diffsynth_dagster.families.wanvideo.family import FAMILY
from diffsynth_dagster.families.wanvideo.variant import variant

WIDE, TALL = (240, 416), (416, 240)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("wan") / "model"
    write(folder)
    return CLIPVisionModel.from_pretrained(folder / "diffusers" / "image_encoder").eval()


def clip(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A video of noise (3, 5, height, width) whose values are those of 8 bits."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 5, height, width), generator=drawn) / 127.5 - 1


def features(tower: Any, video: torch.Tensor, last: bool = False) -> torch.Tensor:
    with torch.no_grad():
        (found,) = stages.encode_features({"image_encoder": tower}, [{"video": video}], last)
    return found["features"]


def expected(tower: Any, frames: list[torch.Tensor]) -> torch.Tensor:
    """The states before the last layer, of pictures resized by hand."""
    pixels = [((f + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy() for f in frames]
    inputs = torch.stack([clip_pixels(Image.fromarray(each)) for each in pixels])
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(inputs))
        for layer in tower.encoder.layers[:-1]:
            states = layer(states, attention_mask=None)
    return states


@pytest.mark.parametrize("size", [WIDE, TALL, (64, 96), (480, 832)])
@pytest.mark.parametrize("last", [False, True])
def test_features_are_those_of_the_whole_frame(
    tower: Any, size: tuple[int, int], last: bool
) -> None:
    video = clip(*size)
    frames = [video[:, 0], video[:, -1]] if last else [video[:, 0]]
    found = features(tower, video, last)
    assert found.shape == (len(frames), 257, 80)
    assert torch.allclose(found, expected(tower, frames), atol=5e-4)


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("end", [slice(0, 16), slice(-16, None)])
def test_both_ends_of_the_long_side_are_seen(tower: Any, size: tuple[int, int], end: slice) -> None:
    """A square from the middle holds nothing of them."""
    video, changed = clip(*size), clip(*size)
    (changed if size == WIDE else changed.transpose(2, 3))[..., end] = 1.0
    assert (features(tower, video) - features(tower, changed)).abs().max() > 1e-2


def test_what_is_not_given_is_not_seen(tower: Any) -> None:
    video, changed = clip(*WIDE), clip(*WIDE)
    changed[:, 1:] = 0.0
    assert torch.equal(features(tower, video), features(tower, changed))


@pytest.mark.parametrize("last", [False, True])
def test_features_alone_are_encoded_again(last: bool) -> None:
    """Stored samples of before show a square of each frame; all else of them is what it was."""
    named = ["input_image", "end_image"] if last else ["input_image"]
    config = TrainingConfig().model_copy(update={"extra_inputs": named})
    own = variant(FAMILY, config, {"image_encoder": {}})
    versions = {stage.name: stage.version for stage in own.stages}
    assert versions.pop("first_and_last_features" if last else "first_features") == 2
    assert len(versions) == 3
    assert set(versions.values()) == {1}
