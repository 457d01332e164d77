"""Model files, and what lies beside and in them, that are not what they should be: one message each."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, model_files, write_qwen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffsynth_dagster.errors import UserError, WeightsError
from diffsynth_dagster.families import family_names, find_family
from diffsynth_dagster.weights.header import TensorInfo, read_header, read_metadata
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import build_empty, load_component
from diffsynth_dagster.weights.lora import ADAPTER_KEY, PROVENANCE_KEY, read_lora

HUB = ModelHub(Path("models"), skip_download=True)


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    """Also of types that NumPy lacks; and the file is not kept mapped."""
    path = tmp_path / "x.safetensors"
    kinds = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    save_file({n: torch.zeros(2, 0, 1).to(kind) for n, kind in kinds.items()}, path, {"k": "v"})
    assert read_header(path) == {name: TensorInfo(name, (2, 0, 1)) for name in kinds}
    assert read_metadata(path) == {"k": "v"}
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("shape", "span"),
    [
        ([3], [0, 8]),  # of another size
        ([2], [4, 12]),  # after a gap
        ([4], [0, 16]),  # cut off
        ([1], [0, 4]),  # more than the tensors
        ([-2], [0, 8]),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, shape: list[int], span: list[int]
) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": span}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    for read in (read_header, read_metadata):
        with pytest.raises(WeightsError, match="not a whole safetensors file: Error") as error:
            read(path)
        assert error.value.where == str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("hostile") / "model")


def build_with(model: Path, folder: str, change: dict[str, Any]) -> Any:
    """Build the component of a folder with other settings in its config.json."""
    path = model / folder / "config.json"
    before = path.read_text()
    data = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "lora_base_model": "dit"}
    tokenizer = str(model / "tokenizer")
    config = make_config({**data, "model_paths": model_files(model), "tokenizer_path": tokenizer})
    path.write_text(json.dumps({**json.loads(before), **change}))
    try:
        found = find_model(config, HUB).components.values()
        return build_empty(next(f for f in found if f.component.names.folder == folder))
    finally:
        path.write_text(before)


SIZES = {
    "transformer": ["num_layers", "attention_head_dim", "num_attention_heads", "in_channels"],
    "vae": ["base_dim", "z_dim", "num_res_blocks", "dim_mult", "input_channels"],
    "text_encoder": ["text_config", "vision_config", "vocab_size"],
}


@pytest.mark.parametrize("value", [None, "x", [], -1, 0.5, 6], ids=str)
@pytest.mark.parametrize("folder", SIZES)
def test_a_setting_of_another_size_is_refused(model: Path, folder: str, value: object) -> None:
    """Or it changes nothing, as a name that the architecture does not know."""
    whole = {n: t.shape for n, t in build_with(model, folder, {}).state_dict().items()}
    for name in SIZES[folder]:
        with contextlib.suppress(UserError):
            built = build_with(model, folder, {name: value})
            assert {n: t.shape for n, t in built.state_dict().items()} == whole, name


def test_a_configuration_names_no_code(model: Path) -> None:
    """transformers would load kernels of this name from a hub."""
    code = {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "evil.Model"}}
    built = build_with(model, "text_encoder", code)
    assert built.config._attn_implementation != "someone/kernel"


@pytest.mark.parametrize("family", family_names())
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_names_with_any_shapes_end_without_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    folder, owner = tmp_path_factory.mktemp("shapes"), find_family(family)
    for tokenizer in owner.tokenizers:
        (folder / tokenizer.name).mkdir()
    layouts = [
        names for component in owner.components for names in component.recognition.signatures
    ]
    drawn = st.lists(st.sampled_from(layouts), min_size=1, max_size=2, unique=True)
    shapes = st.lists(st.integers(0, 5) | st.just(64), max_size=4)
    for index, names in enumerate(data.draw(drawn)):
        more = data.draw(st.lists(st.sampled_from(["x.1.y", "blocks.x.weight", "a"]), unique=True))
        tensors = {n: torch.zeros(data.draw(shapes), dtype=torch.uint8) for n in (*names, *more)}
        save_file(tensors, folder / f"{index}.safetensors")
    files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    data_set = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "family": family}
    config = make_config({**data_set, "model_paths": files, "lora_base_model": owner.denoiser})
    with contextlib.suppress(UserError):
        for found in find_model(config, HUB).components.values():
            load_component(found, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("alpha", "notes", "words"),
    [
        (None, {PROVENANCE_KEY: "{"}, "about its alpha cannot be read"),
        (None, {PROVENANCE_KEY: '{"lora": {"alpha": "many"}}'}, "about its alpha cannot be read"),
        (None, {PROVENANCE_KEY: '{"lora": {"alpha": 1e999}}'}, "about its alpha cannot be read"),
        (None, {ADAPTER_KEY: '{"transformer.lora_alpha": []}'}, "about its alpha cannot be read"),
        (torch.ones(2), {}, r"an alpha is no number: a\.alpha"),
        (torch.tensor(torch.nan), {}, r"'a\.alpha' hold NaN"),
    ],
)
def test_an_alpha_that_is_no_number_is_named(
    tmp_path: Path, alpha: torch.Tensor | None, notes: dict[str, str], words: str
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    save_file(tensors if alpha is None else {**tensors, "a.alpha": alpha}, path, notes)
    with pytest.raises(WeightsError, match=words):
        read_lora(path, find_family("qwen_image"), "dit", "lora_checkpoint")
