"""Headers with the names of a model's tensors and the shapes of none."""

import contextlib
from pathlib import Path

import pytest
import torch
from conftest import make_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile_models import write_header

from diffsynth_dagster.errors import UserError
from diffsynth_dagster.families import family_names, find_family
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component

HUB = ModelHub(Path("models"), skip_download=True)
SHAPES = st.lists(st.integers(0, 5) | st.sampled_from([0, 64, 2**20, 2**40]), max_size=5)
LAYOUTS = [
    (family, names)
    for family in family_names()
    for component in find_family(family).components
    for names in component.recognition.signatures
]


def entries(shapes: dict[str, list[int]]) -> dict[str, object]:
    """A header of tensors of these shapes. Those that would be large have a side of 0."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        if size > 10_000:
            shape, size = [0, *shape][:3], 0
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header | {"__metadata__": {"size": str(end)}}


@pytest.mark.parametrize("family", family_names())
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_names_with_any_shapes_end_without_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shapes")
    for tokenizer in find_family(family).tokenizers:
        (folder / tokenizer.name).mkdir()
    files: list[str] = []
    layouts = [names for owner, names in LAYOUTS if owner == family]
    for index, names in enumerate(
        data.draw(st.lists(st.sampled_from(layouts), min_size=1, max_size=2, unique=True))
    ):
        more = data.draw(st.lists(st.sampled_from(["x.1.y", "blocks.x.weight", "a"]), unique=True))
        header = entries({name: data.draw(SHAPES) for name in (*names, *more)})
        size = int(header["__metadata__"]["size"])  # type: ignore[index]
        files.append(str(write_header(folder / f"{index}.safetensors", header, size)))
    config = make_config(
        {
            "dataset_base_path": "d",
            "dataset_metadata_path": "m.csv",
            "model_paths": files,
            "lora_base_model": find_family(family).denoiser,
            "family": family,
        }
    )
    with contextlib.suppress(UserError):
        for found in find_model(config, HUB).components.values():
            load_component(found, "cpu", torch.float32)
