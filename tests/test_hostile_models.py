"""Model files and configurations that were made to do harm: one message, at once, each time."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, model_files, write_qwen
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffsynth_dagster.errors import UserError, WeightsError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.weights.header import TensorInfo, read_header, read_metadata
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import build_empty
from diffsynth_dagster.weights.lora import ADAPTER_KEY, PROVENANCE_KEY, read_lora

WHOLE = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}


def write_header(path: Path, header: object, size: int) -> Path:
    """A safetensors file with a header of any JSON and `size` bytes of data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "replace")
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NUMBERS = st.lists(st.integers(-1, 9) | st.sampled_from([0, 2**63, 10**30]), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "X", 5]) | JSON,
        "shape": NUMBERS | JSON,
        "data_offsets": NUMBERS | JSON,
    },
)
HEADERS = JSON | st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=3)


@given(HEADERS | st.just(WHOLE), st.integers(0, 12), st.none() | JSON)
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Any, size: int, metadata: object
) -> None:
    """And what is read, safetensors itself reads alike."""
    if isinstance(header, dict) and metadata is not None:
        header = {**header, "__metadata__": metadata}
    path = write_header(tmp_path_factory.getbasetemp() / "any.safetensors", header, size)
    try:
        read, texts = read_header(path), read_metadata(path)
    except WeightsError:
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(read)
        assert (file.metadata() or {}) == texts
        assert all(tuple(file.get_slice(n).get_shape()) == i.shape for n, i in read.items())


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    for suffix in (".safetensors", ".pth"):
        path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
        path.write_bytes(content)
        with pytest.raises(WeightsError):
            read_header(path)


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", {**WHOLE, "__metadata__": {"k": "v"}}, 8)
    assert read_header(path) == {"a": TensorInfo("F32", (2, 1))}
    assert read_metadata(path) == {"k": "v"}


def entry(**changes: object) -> dict[str, object]:
    return {"a": {k: v for k, v in {**WHOLE["a"], **changes}.items() if v is not None}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry(shape=[-2, -1]), "'a' has no shape: [-2, -1]"),
        (entry(shape="21"), "'a' has no shape: '21'"),
        (entry(shape=None), "'a' has no shape: None"),
        (entry(shape=[2, True]), "'a' has no shape"),
        (entry(shape=[3]), "'a' of shape [3] has 8 bytes"),
        (entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), "impossible shape"),
        (entry(dtype="F33"), "'a' has no known type: 'F33'"),
        (entry(dtype=["F32"]), "no known type"),
        (entry(data_offsets=[4, 12]), "a gap or overlap"),
        (entry(data_offsets=[8, 0]), "has -8 bytes"),
        (entry(data_offsets=[0]), "are nowhere"),
        ({"a": 5}, "says nothing about 'a'"),
        ({"\ud800": WHOLE["a"]}, "no tensor can be called"),
        ({**WHOLE, "b": WHOLE["a"]}, "a gap or overlap"),
        ({**WHOLE, "__metadata__": {"k": 5}}, "is not text"),
        ({**WHOLE, "__metadata__": ["k"]}, "is no mapping"),
        ([], "its header is no mapping"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "not a whole safetensors file"),
    ],
)
def test_a_header_of_nonsense_is_named(tmp_path: Path, header: object, message: str) -> None:
    path = write_header(tmp_path / "x.safetensors", header, 8)
    with pytest.raises(WeightsError) as error:
        read_header(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt"):
        pass


@pytest.mark.parametrize(
    "content",
    [
        {5: torch.zeros(1)},
        {"a": torch.zeros(1).expand(2**40)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": 5},
        [torch.zeros(1)],
    ],
)
def test_a_state_dict_that_is_none_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError):
        read_header(tmp_path / "x.pth")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("hostile") / "model")


def build_with(model: Path, folder: str, change: dict[str, object] | str) -> Any:
    """Build the component of a folder with other settings in its config.json."""
    path = model / folder / "config.json"
    before = path.read_text()
    text = change if isinstance(change, str) else json.dumps({**json.loads(before), **change})
    config = make_config(
        {
            "dataset_base_path": "d",
            "dataset_metadata_path": "m.csv",
            "model_paths": model_files(model),
            "lora_base_model": "dit",
            "tokenizer_path": str(model / "tokenizer"),
        }
    )
    path.write_text(text)
    try:
        found = find_model(config, ModelHub(Path("models"), skip_download=True))
        return build_empty(
            next(f for f in found.components.values() if f.component.names.folder == folder)
        )
    finally:
        path.write_text(before)


HUGE = [10**7, 10**9, 10**30, 1e9, 1e300]
WRONG: list[object] = [None, "x", [], {}, [[1]], -1, 0, 0.5, True]
SIZES = {
    "transformer": ["num_layers", "attention_head_dim", "num_attention_heads", "in_channels"],
    "vae": ["base_dim", "z_dim", "num_res_blocks", "dim_mult", "input_channels"],
    "text_encoder": ["text_config", "vision_config", "vocab_size"],
}


@pytest.mark.parametrize("value", [*HUGE, *WRONG], ids=str)
@pytest.mark.parametrize(
    ("folder", "name"), [(f, name) for f, names in SIZES.items() for name in names]
)
def test_a_setting_of_another_size_is_refused_at_once(
    model: Path, folder: str, name: str, value: object
) -> None:
    """Or it changes nothing, as a name that the architecture does not know."""
    start = time.process_time()
    with contextlib.suppress(UserError):
        built = build_with(model, folder, {name: value})
        assert {n: t.shape for n, t in built.state_dict().items()} == {
            n: t.shape for n, t in build_with(model, folder, {}).state_dict().items()
        }
    assert time.process_time() - start < 6


@pytest.mark.parametrize("value", [10**7, 2**24])
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "depth", "vocab_size"])
def test_a_size_within_is_refused_at_once(model: Path, part: str, name: str, value: int) -> None:
    own = json.loads((model / "text_encoder" / "config.json").read_text())[part]
    start = time.process_time()
    if name in own:
        with pytest.raises(WeightsError):
            build_with(model, "text_encoder", {part: {**own, name: value}})
    assert time.process_time() - start < 6


def test_a_table_that_no_file_holds_is_bounded_too(model: Path) -> None:
    with pytest.raises(WeightsError, match="much larger than the files"):
        build_with(model, "transformer", {"axes_dims_rope": [10**7, 14, 14]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": 5, "_class_name": None}, "names no architecture"),
        ({"_class_name": 5}, "names no architecture"),
        ({"num_layers": 10**9}, "a number of such a size: 'num_layers'"),
        ({"more": [{"num_blocks": [10**9]}]}, "a number of such a size: 'num_blocks'"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not a mapping"),
        ("9" * 5000, "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_configuration_of_nonsense_is_named(model: Path, change: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as error:
        build_with(model, "transformer", change)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("folder", "change"),
    [
        ("transformer", {"training_tokens": 2 * 10**12, "_seen": 10**10, "note": [10**9]}),
        ("text_encoder", {"num_labels": 2**24, "rope_theta": 100_000_000}),
    ],
)
def test_what_makes_no_model_larger_is_passed_over(
    model: Path, folder: str, change: dict[str, object]
) -> None:
    start = time.process_time()
    built = build_with(model, folder, change)
    assert {n: t.shape for n, t in built.state_dict().items()} == {
        n: t.shape for n, t in build_with(model, folder, {}).state_dict().items()
    }
    assert time.process_time() - start < 6


@pytest.mark.parametrize(
    "change",
    [
        {"latents_mean": "a"},
        {"latents_mean": None},
        {"latents_mean": [0.0] * 3},
        {"latents_mean": [float("nan")] * 16},
        {"latents_std": [0.0] * 16},
        {"latents_std": ["a"] * 16},
    ],
    ids=str,
)
def test_statistics_of_latents_that_are_none_are_named(
    model: Path, change: dict[str, object]
) -> None:
    with pytest.raises(WeightsError, match=f"give {next(iter(change))} = "):
        build_with(model, "vae", change)


def test_a_configuration_names_no_code(model: Path) -> None:
    """transformers would load kernels of this name from a hub."""
    built = build_with(
        model,
        "text_encoder",
        {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "evil.Model"}},
    )
    assert built.config._attn_implementation != "someone/kernel"


@pytest.mark.parametrize(
    "notes",
    [
        {PROVENANCE_KEY: "{"},
        {PROVENANCE_KEY: "5"},
        {PROVENANCE_KEY: '{"lora": 5}'},
        {PROVENANCE_KEY: '{"lora": {"alpha": "many"}}'},
        {PROVENANCE_KEY: '{"lora": {"alpha": 1e999}}'},
        {PROVENANCE_KEY: "[" * 100_000},
        {ADAPTER_KEY: "[]"},
        {ADAPTER_KEY: '{"transformer.lora_alpha": []}'},
        {ADAPTER_KEY: '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 1}}'},
        {ADAPTER_KEY: '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": 7}'},
    ],
)
def test_notes_of_a_lora_that_are_nonsense_are_named(tmp_path: Path, notes: dict[str, str]) -> None:
    halves = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    save_file(halves, tmp_path / "lora.safetensors", notes)
    with pytest.raises(WeightsError, match="about its alpha cannot be read"):
        read_lora(
            tmp_path / "lora.safetensors", find_family("qwen_image"), "dit", "lora_checkpoint"
        )


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.ones(2), r"an alpha is no number: a\.alpha"),
        (torch.tensor(torch.nan), r"'a\.alpha' hold NaN"),
    ],
)
def test_an_alpha_that_is_no_number_is_named(
    tmp_path: Path, alpha: torch.Tensor, words: str
) -> None:
    halves = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    save_file({**halves, "a.alpha": alpha}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=words):
        read_lora(
            tmp_path / "lora.safetensors", find_family("qwen_image"), "dit", "lora_checkpoint"
        )
