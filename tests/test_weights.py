"""Finding model files, telling what they are, and building them from a config or from shapes."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Values, lora_values, make_config, model_files, train, train_to_end, why_refused
from hub_server import serve_hub
from safetensors.torch import load_file, save_file

from diffsynth_dagster.config import TrainingConfig
from diffsynth_dagster.config.entries import folder_entry, model_entries, parse_hub_entry
from diffsynth_dagster.errors import DownloadError, UserError, WeightsError
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import build_empty, load_component

LOCAL = ModelHub(Path("models"), skip_download=True)


def config_for(
    files: list[str] | list[list[str]], tokenizer: Path, **more: object
) -> TrainingConfig:
    base = {
        "dataset_base_path": "d",
        "dataset_metadata_path": "m.csv",
        "model_paths": files,
        "lora_base_model": "dit",
        "tokenizer_path": str(tokenizer),
    }
    return make_config({**base, **more})


@pytest.fixture
def model(tiny_qwen: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_qwen, tmp_path / "model"))


def test_family_and_components_are_told_from_tensor_names(tiny_qwen: Path) -> None:
    found = find_model(config_for(model_files(tiny_qwen), tiny_qwen / "tokenizer"), LOCAL)
    assert found.family.name == "qwen_image"
    assert set(found.components) == {"dit", "text_encoder", "vae"}


def test_names_of_files_do_not_matter(model: Path) -> None:
    files = []
    for index, name in enumerate(model_files(model)):
        folder = model / f"x{index}"
        folder.mkdir()
        files.append(str(shutil.move(name, folder / f"{index}.safetensors")))
        shutil.copy(Path(name).parent / "config.json", folder)
    found = find_model(config_for(files, model / "tokenizer"), LOCAL)
    assert {n: f.files[0].name for n, f in found.components.items()} == {
        "dit": "0.safetensors",
        "text_encoder": "1.safetensors",
        "vae": "2.safetensors",
    }


def test_shapes_alone_give_the_same_transformer_and_vae(model: Path) -> None:
    config = config_for(model_files(model), model / "tokenizer")
    torch.manual_seed(0)
    x, text = torch.randn(1, 4, 64), torch.randn(1, 3, 256)

    def predict() -> torch.Tensor:
        dit = load_component(find_model(config, LOCAL).components["dit"], "cpu", torch.float32)
        with torch.no_grad():
            return dit(
                hidden_states=x,
                encoder_hidden_states=text,
                timestep=torch.tensor([0.5]),
                img_shapes=[[(1, 2, 2)]],
                return_dict=False,
            )[0]

    first = predict()
    vae = build_empty(find_model(config, LOCAL).components["vae"])
    for folder in ("transformer", "vae"):
        (model / folder / "config.json").unlink()
    assert torch.equal(first, predict())
    again = build_empty(find_model(config, LOCAL).components["vae"])
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (vae, again)]
    assert shapes[0] == shapes[1]


def test_shapes_alone_give_the_text_encoder(tmp_path: Path) -> None:
    """With the published 128 channels of a head, and the names of the published files."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 32,
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
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 256}
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    ).eval()
    published = {
        name.replace("model.visual.", "visual.").replace(
            "model.language_model.", "model."
        ): t.clone()
        for name, t in encoder.state_dict().items()
    }
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.parent.mkdir()
    save_file(published, file)
    config = config_for([str(file)], tmp_path / "text_encoder", family="qwen_image")
    found = find_model(config, LOCAL).components["text_encoder"]
    loaded = load_component(found, "cpu", torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, encoder(ids).logits)


def test_shards_are_one_model(model: Path) -> None:
    path = Path(model_files(model)[0])
    tensors = load_file(path)
    names = sorted(tensors)
    shards = [path.parent / f"part-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        save_file({n: tensors[n] for n in part}, shard)
    path.unlink()
    files = [[str(s) for s in shards], *model_files(model)[1:]]
    found = find_model(config_for(files, model / "tokenizer"), LOCAL)
    dit = load_component(found.components["dit"], "cpu", torch.float32)
    assert all(torch.equal(t, tensors[n]) for n, t in dit.state_dict().items())
    globbed = [str(path.parent / "part-*.safetensors"), *model_files(model)[1:]]
    assert find_model(config_for(globbed, model / "tokenizer"), LOCAL).components["dit"].files == (
        tuple(shards)
    )


def test_a_missing_last_shard_is_named(model: Path) -> None:
    """Without a config.json the shapes alone would make a smaller model."""
    file = Path(model_files(model)[0])
    (file.parent / "config.json").unlink()
    tensors = load_file(file)
    last = max(int(name.split(".")[1]) for name in tensors if "transformer_blocks" in name)
    kept = {n: t for n, t in tensors.items() if f"transformer_blocks.{last}." not in n}
    file.unlink()
    save_file(kept, file.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    files = [str(file.parent / "*.safetensors"), *model_files(model)[1:]]
    with pytest.raises(WeightsError, match="shard 2 of 2 is missing"):
        find_model(config_for(files, model / "tokenizer"), LOCAL)


@pytest.mark.parametrize("kept", ["tokenizer_config.json", "vocab.json", "the model's folder"])
def test_a_tokenizer_that_is_not_whole_is_refused(
    values: Values, model: Path, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its captions would be empty, or the template's markers words."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (model / "tokenizer").iterdir():
        if file.name.startswith(kept) or (kept == "vocab.json" and file.name == "merges.txt"):
            shutil.copy(file, folder)
    given = model if kept == "the model's folder" else folder
    code, _ = train(values(tokenizer_path=str(given)), tmp_path / "run")
    error = capsys.readouterr().err
    assert code == 2, error
    assert "tokenizer" in error
    assert "Traceback" not in error


def test_the_family_is_told_without_the_tokenizer(
    values: Values, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be downloaded later, or lie beside the single files."""
    given = values(family=None, tokenizer_path=None, model_paths=model_files(model))
    shutil.move(model / "tokenizer", model / "transformer" / "tokenizer")
    train_to_end(given, tmp_path / "run", "--dry_run")
    assert '"family": "qwen_image"' in capsys.readouterr().out
    train_to_end(given, tmp_path / "run")


def test_bf16_weights_and_float32_rotary_buffers(tiny_qwen: Path) -> None:
    found = find_model(config_for(model_files(tiny_qwen), tiny_qwen / "tokenizer"), LOCAL)
    encoder = load_component(found.components["text_encoder"], "cpu", torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for n, b in encoder.named_buffers() if "inv_freq" in n)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_pytorch_files_load_and_pickles_do_not(model: Path, tmp_path: Path) -> None:
    path = Path(model_files(model)[0])
    torch.save(load_file(path), path.with_suffix(".pth"))
    path.unlink()
    files = [str(path.with_suffix(".pth")), *model_files(model)[1:]]
    found = find_model(config_for(files, model / "tokenizer"), LOCAL)
    load_component(found.components["dit"], "cpu", torch.float32)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    evil = path.with_name("evil.pth")
    evil.write_bytes(pickle.dumps(Evil()))
    for content in (None, {5: torch.zeros(1)}, {"a": 5}, [torch.zeros(1)]):
        if content is not None:
            torch.save(content, evil)
        with pytest.raises(WeightsError, match="holds more than tensors"):
            find_model(config_for([str(evil)], model / "tokenizer"), LOCAL)
    assert not (tmp_path / "touched").exists()


LOST = "transformer_blocks.1.attn.to_q.weight"


def settings_of(path: Path) -> Path:
    return path.parent / "config.json"


def of_larger(path: Path) -> None:
    """The settings of a larger model."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 60}))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: save_file({n: t for n, t in load_file(p).items() if n != LOST}, p), LOST),
    (
        lambda p: save_file(load_file(p) | {"proj_out.bias": torch.zeros(3)}, p),
        r"shapes: proj_out.bias is \(3,\), not \(64,\)",
    ),
    (lambda p: p.write_bytes(p.read_bytes()[:-100]), "not a whole safetensors file"),
    (lambda p: p.write_text("<html>not found</html>"), "not a whole safetensors file"),
    (lambda p: save_file({"foo": torch.zeros(2)}, p), "unknown kind: its first tensors are foo"),
    (lambda p: settings_of(p).write_text("{"), "settings of the architecture cannot"),
    (lambda p: settings_of(p).write_text("[]"), "they are not a mapping"),
    (
        lambda p: of_larger(settings_of(p)),
        r"missing: transformer_blocks(?s:.*) its own config\.json",
    ),
    (Path.unlink, "does not exist"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_files_are_named(
    model: Path, damage: Callable[[Path], object], message: str
) -> None:
    path = Path(model_files(model)[0])
    damage(path)
    config = config_for(model_files(model), model / "tokenizer")
    with pytest.raises(UserError, match=message) as error:
        build_empty(find_model(config, LOCAL).components["dit"])
    assert "transformer" in str(error.value)


def test_the_same_component_twice_is_refused(tiny_qwen: Path, model: Path) -> None:
    files = [*model_files(tiny_qwen), model_files(model)[0]]
    with pytest.raises(WeightsError, match="two entries are the component 'dit'"):
        find_model(config_for(files, tiny_qwen / "tokenizer"), LOCAL)


def test_missing_component_is_named(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = values()
    code, _ = train({**config, "model_paths": config["model_paths"][:2]}, tmp_path / "run")
    assert code == 2
    assert "lacks the component 'vae'" in capsys.readouterr().err


def test_names_are_of_models_and_not_of_shards() -> None:
    base = {"dataset_base_path": "d", "dataset_metadata_path": "m.csv", "lora_base_model": "dit"}
    entries = model_entries(
        make_config(
            {
                **base,
                "model_paths": '["a/b/model.safetensors", ["/t/x-00001-of-00002.safetensors", '
                '"/t/x-00002-of-00002.safetensors"]]',
                "model_id_with_origin_paths": "Qwen/Qwen-Image:transformer/diff*.safetensors,"
                "Qwen/Qwen-Image:vae/diffusion_pytorch_model*.safetensors,Q/FLUX.1:ae.safetensors,"
                "Q/Wan:",
            }
        )
    )
    names = [tuple(re.sub("_[0-9a-f]{6}$", "_MARK", part) for part in e.name) for e in entries]
    assert names == [
        ("a", "b", "model"),
        ("t", "x_MARK"),
        ("Qwen", "Qwen-Image", "transformer", "diffall"),
        ("Qwen", "Qwen-Image", "vae"),
        ("Q", "FLUX_1", "ae"),
        ("Q", "Wan", "all"),
    ]


def test_a_repository_alone_names_all_of_its_weights(tmp_path: Path) -> None:
    """As the guide writes it: `Qwen/Qwen2.5-VL-7B-Instruct:`, also for the folder of a tokenizer."""
    folder = tmp_path / "Qwen" / "Qwen2.5-VL-7B-Instruct"
    (folder / "inside").mkdir(parents=True)
    for name in ("b.safetensors", "a.safetensors", "config.json", "inside/c.safetensors"):
        (folder / name).write_bytes(b"x")
    hub = ModelHub(tmp_path, skip_download=True)
    text = "Qwen/Qwen2.5-VL-7B-Instruct:"
    entry = parse_hub_entry(text, "model_id_with_origin_paths")
    assert entry.text == text
    assert hub.files(entry) == [folder / "a.safetensors", folder / "b.safetensors"]
    for named in (text, f"{text}./", f"{text}inside/"):
        inside = folder / "inside" if "inside" in named else folder
        assert hub.folder(folder_entry(named, "tokenizer_path")) == inside


@pytest.fixture
def hub_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "downloads"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    return monkeypatch


def test_downloads_with_the_real_client(
    tiny_qwen: Path, values: Values, tmp_path: Path, hub_environment: pytest.MonkeyPatch
) -> None:
    """The whole training from the hub, then again with the hub gone."""
    shutil.copytree(tiny_qwen, tmp_path / "hub" / "Qwen" / "Qwen-Image")
    config = values(
        model_paths=None,
        tokenizer_path=None,
        family=None,
        model_id_with_origin_paths=",".join(
            f"Qwen/Qwen-Image:{p}"
            for p in (
                "transformer/diffusion_pytorch_model*.safetensors",
                "text_encoder/model*.safetensors",
                "vae/diffusion_pytorch_model.safetensors",
            )
        ),
    )
    with serve_hub(tmp_path / "hub") as hub:
        hub_environment.setenv("MODELSCOPE_ENDPOINT", hub.url)
        train_to_end(config, tmp_path / "a")
        assert "transformer/config.json" in hub.downloads
        assert any(name.startswith("tokenizer/") for name in hub.downloads)
        assert "model_index.json" not in hub.downloads
        count = len(hub.downloads)
        train_to_end(config, tmp_path / "b")
        assert len(hub.downloads) == count
    hub_environment.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    train_to_end(config, tmp_path / "c")
    files = [(tmp_path / n / "epoch-0.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] == files[2]


def test_hub_that_lacks_the_model_or_is_gone(
    tmp_path: Path, hub_environment: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub" / "Qwen" / "Other").mkdir(parents=True)
    config = make_config(
        {
            "dataset_base_path": "d",
            "dataset_metadata_path": "m.csv",
            "model_id_with_origin_paths": "Qwen/Nothing:vae/*.safetensors",
            "lora_base_model": "dit",
        }
    )
    (entry,) = model_entries(config)
    with serve_hub(tmp_path / "hub") as hub:
        hub_environment.setenv("MODELSCOPE_ENDPOINT", hub.url)
        with pytest.raises(DownloadError, match="Qwen/Nothing"):
            ModelHub.from_environment().files(entry)
    hub_environment.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    with pytest.raises(WeightsError, match="unset DIFFSYNTH_SKIP_DOWNLOAD"):
        ModelHub.from_environment().files(entry)


@pytest.mark.parametrize("name", ["trainable_models", "preset_lora_model"])
def test_a_model_that_the_family_lacks_is_named(tiny_qwen: Path, name: str, tmp_path: Path) -> None:
    """Also where the family is recognised from the files."""
    values = lora_values(tiny_qwen, tmp_path, tmp_path / "cache")
    values = {k: v for k, v in values.items() if k != "family" and not k.startswith("lora_")}
    (tmp_path / "metadata.csv").write_text("image,prompt\n0.png,a\n")
    (tmp_path / "lora.safetensors").write_bytes(b"")
    values |= {"trainable_models": "dit"}
    if name == "preset_lora_model":
        values |= {"preset_lora_path": str(tmp_path / "lora.safetensors")}
    assert "qwen_image has no model 'ditt'; did you mean 'dit'" in why_refused(
        values | {name: "ditt"}, tmp_path / "run"
    )
