"""What only LTX-2 does: sound that may be missing, its weight, files that hold halves, spectrograms."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import make_config, samples_of, train, train_to_end, why_refused
from diffusers import LTX2VideoTransformer3DModel
from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE
from families.ltx2.cases import (
    CASES,
    FRAMES,
    LAYOUTS,
    SIDE,
    TRANSFORMER,
    rows,
    write,
)
from families.ltx2.original import authors_vocoder_name, original_dit
from process_support import two_processes
from safetensors.torch import load_file, save_file

from diffsynth_dagster.dry_run import make_plan
from diffsynth_dagster.errors import UserError
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.ltx2.components import convert_dit, dit_settings
from diffsynth_dagster.families.shared.ltx_vae import log_mel
from diffsynth_dagster.training.batches import StepDataset
from diffsynth_dagster.training.sampling import make_clips
from diffsynth_dagster.training.step import TrainingStep
from diffsynth_dagster.weights.hub import ModelHub
from diffsynth_dagster.weights.identify import find_model
from diffsynth_dagster.weights.load import load_component

HUB = ModelHub(Path(), skip_download=True)
T2AV = CASES[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx2") / "model"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def values(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four clips, the last two of them silent."""
    folder = tmp_path_factory.mktemp("values")
    path = rows(folder / "data")
    table = json.loads(path.read_text())
    for row in table[2:]:
        row["input_audio"] = ""
    path.write_text(json.dumps(table))
    return {
        "family": "ltx2",
        "dataset_base_path": str(path.parent),
        "dataset_metadata_path": str(path),
        "cache_path": str(folder / "cache"),
        "output_path": str(folder / "run"),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        **T2AV.models(model, "diffusers"),
        **T2AV.parameters,
    }


def losses(values: dict[str, Any], run: Path, **more: Any) -> dict[int, float]:
    """Row of the table → its loss at the first visit."""
    config = make_config({**values, **more, "output_path": str(run)})
    found = find_model(config, HUB)
    dit = load_component(found.components["dit"], "cpu", torch.float32)
    step = TrainingStep(found, {"dit": dit}, {}, config)
    data = StepDataset(config, found, samples_of(run), 0, 1)
    rows_of = dict(pl.read_parquet(run / "samples.parquet").select("sample", "row").iter_rows())
    found_losses: dict[int, float] = {}
    for index in range(data.order.steps_per_epoch):
        for batch in data[index]:
            with torch.no_grad():
                each = step(batch).tolist()
            found_losses |= {rows_of[s]: x for s, x in zip(batch.samples, each, strict=True)}
    return found_losses


def test_silent_clips_train_beside_others(values: dict[str, Any], tmp_path: Path) -> None:
    """Their loss is that of the video alone, whatever the weight of the sound."""
    run = train_to_end({**values, "batch_size": 4, "num_epochs": 2}, tmp_path / "run")
    whole, half, none = (
        losses(values, run, audio_loss_weight=weight) for weight in (1.0, 0.5, 0.0)
    )
    assert sorted(whole) == [1, 2, 3, 4]
    for row in (3, 4):
        assert whole[row] == half[row] == none[row] > 0
    for row in (1, 2):
        assert whole[row] > half[row] > none[row] > 0
        assert whole[row] - half[row] == pytest.approx(half[row] - none[row], rel=1e-4)


def test_two_processes_train_clips_with_and_without_sound(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Which weights get a gradient differs from step to step, and from process to process."""
    given = {**values, "batch_size": 1, "num_epochs": 2}
    train_to_end({**given, "gradient_accumulation_steps": 2}, tmp_path / "one")
    config = {**given, "output_path": str(tmp_path / "two")}
    done = two_processes(config, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "epoch-1.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_a_silent_clip_is_trained_as_without_a_column(
    values: dict[str, Any], tmp_path: Path
) -> None:
    table = json.loads(Path(values["dataset_metadata_path"]).read_text())
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps([{k: r[k] for k in ("video", "prompt")} for r in table]))
    alone = {"extra_inputs": [], "data_file_keys": ["video"], "dataset_metadata_path": str(silent)}
    run = train_to_end({**values, **alone, "task": "sft:data_process"}, tmp_path / "alone")
    config = make_config({**values, **alone, "output_path": str(run)})
    found = find_model(config, HUB)
    data = StepDataset(config, found, samples_of(run), 0, 1)
    assert set(data[0][0].outputs) == {"prompt_embeds", "audio_prompt_embeds", "video"}


def test_the_video_of_a_silent_clip_does_not_see_sound(model: Path, values: dict[str, Any]) -> None:
    """The token of silence that stands in its place changes nothing."""
    found = find_model(make_config(values), HUB)
    dit: Any = load_component(found.components["dit"], "cpu", torch.float32)
    source = torch.Generator().manual_seed(0)
    prompts = {
        name: torch.randn(1, 1024, 128, generator=source)
        for name in ("prompt_embeds", "audio_prompt_embeds")
    }
    x_t = {"video": torch.randn(1, 16, 2, 2, 2, generator=source)}
    t = torch.tensor([500.0])
    with torch.no_grad():
        plain = found.family.denoise(dit, {}, prompts, x_t, t)
        dit.audio_proj_in.bias.data += 1.0
        dit.transformer_blocks[0].audio_attn1.to_v.weight.data *= 3.0
        other = found.family.denoise(dit, {}, prompts, x_t, t)
    assert plain.keys() == {"video"}
    assert torch.equal(plain["video"], other["video"])


def encoders_alone(model: Path, folder: Path) -> list[str]:
    """The authors' files, the VAEs without their decoders."""
    folder.mkdir()
    paths = [str(model / name) for name in LAYOUTS["original"]["model_paths"]]
    for index, name in ((3, "video_vae_encoder"), (4, "audio_vae_encoder")):
        tensors = {n: t for n, t in load_file(paths[index]).items() if ".decoder." not in n}
        paths[index] = str(folder / f"{name}.safetensors")
        save_file(tensors, paths[index])
    return paths


@pytest.mark.soak
def test_vaes_without_decoders_train_alike_and_make_no_samples(
    model: Path, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = encoders_alone(model, tmp_path / "halves")
    whole = {**values, **T2AV.models(model, "original"), "cache_path": str(tmp_path / "a")}
    run = train_to_end(whole, tmp_path / "whole")
    given = {**values, "model_paths": paths, "cache_path": str(tmp_path / "b")}
    other = train_to_end(given, tmp_path / "halves-run")
    ours, theirs = (load_file(folder / "epoch-0.safetensors") for folder in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    vocoder = str(model / "diffusers" / "vocoder" / "diffusion_pytorch_model.safetensors")
    given |= {"model_paths": [*paths, vocoder], "sample_prompts": ["a clip"]}
    capsys.readouterr()
    assert "the files of 'vae' hold no decoder" in why_refused(given, tmp_path / "samples")


def test_one_file_holds_all_but_the_text_encoder(
    model: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    paths = [model / name for name in LAYOUTS["original"]["model_paths"]]
    together = {n: t for i in (0, 2, 3, 4) for n, t in load_file(paths[i]).items()}
    whole = tmp_path / "ltx-2-19b-dev.safetensors"
    save_file(together, whole)
    found = find_model(make_config({**values, "model_paths": [str(whole), str(paths[1])]}), HUB)
    apart = find_model(make_config(values), HUB)
    assert found.components.keys() == apart.components.keys()
    for name, item in found.components.items():
        ours = load_component(item, "cpu", torch.float32).state_dict()
        theirs = load_component(apart.components[name], "cpu", torch.float32).state_dict()
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


@pytest.mark.parametrize("kind", [LTX2Vocoder, LTX2VocoderWithBWE])
def test_the_authors_names_of_the_vocoder_are_read(
    kind: Any, values: dict[str, Any], tmp_path: Path
) -> None:
    """In the whole checkpoint: that of 2.0, and that of 2.3 with its higher rate."""
    with torch.device("meta"):
        module = kind()
    ours = {name: torch.zeros(tensor.shape[:1]) for name, tensor in module.state_dict().items()}
    theirs = {f"vocoder.{authors_vocoder_name(name)}": tensor for name, tensor in ours.items()}
    assert ours.keys() != {name.removeprefix("vocoder.") for name in theirs}
    path, alone = tmp_path / "ltx.safetensors", tmp_path / "vocoder.safetensors"
    save_file({**load_file(values["model_paths"][0]), **theirs}, path)
    save_file(ours, alone)
    others = values["model_paths"][1:]
    for paths in ([str(path)], [values["model_paths"][0], str(alone)]):
        found = find_model(make_config({**values, "model_paths": [*paths, *others]}), HUB)
        vocoder = found.components["vocoder"]
        assert vocoder.shapes.keys() == ours.keys()
        assert vocoder.component.construction.kind_of(vocoder.shapes) is kind


def test_a_rate_that_clips_are_not_resampled_to_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads(rows(tmp_path / "data").read_text())
    for row, rate in zip(table, (24, 25, "24.0", 23.976), strict=True):
        row["frame_rate"] = rate
    path = tmp_path / "data" / "rates.json"
    path.write_text(json.dumps(table))
    given = {
        "family": "ltx2",
        "dataset_base_path": str(path.parent),
        "dataset_metadata_path": str(path),
        "cache_path": str(tmp_path / "cache"),
        "lora_base_model": "dit",
        "task": "sft:data_process",
        **T2AV.models(model, "diffusers"),
        **T2AV.parameters,
        "extra_inputs": ["input_audio", "frame_rate"],
    }
    code, run = train(given, tmp_path / "run")
    assert code == 2
    assert "frame_rate takes 24, the rate of the clips" in capsys.readouterr().err
    run = train_to_end({**given, "max_rejected_fraction": 0.5}, tmp_path / "run")
    table = pl.read_parquet(run / "samples.parquet")
    assert sorted(table["row"]) == [1, 3]


def test_samples_are_clips_with_sound(model: Path, values: dict[str, Any], tmp_path: Path) -> None:
    from diffsynth_dagster.families.contract import SampleRequest

    vocoder = str(model / "diffusers" / "vocoder" / "diffusion_pytorch_model.safetensors")
    found = find_model(
        make_config({**values, "model_paths": [*values["model_paths"], vocoder]}), HUB
    )
    loaded = {
        name: load_component(found.components[name], "cpu", torch.float32)
        for name in ("dit", *found.family.decoder)
    }
    source = torch.Generator().manual_seed(0)
    prompts = {
        name: torch.randn(2, 1024, 128, generator=source)
        for name in ("prompt_embeds", "audio_prompt_embeds")
    }
    request = SampleRequest(
        conditions=prompts,
        negative={name: torch.zeros_like(tensor) for name, tensor in prompts.items()},
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        frame_rate=24.0,
        num_inference_steps=2,
        cfg_scale=2.0,
        generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        noising=found.noising,
    )
    with torch.no_grad():
        clips = make_clips(found.family, loaded, request)
    assert [len(clip.frames) for clip in clips] == [FRAMES, FRAMES]
    for clip in clips:
        assert clip.frames[0].size == (SIDE, SIDE)
        assert clip.sound is not None
        seconds = clip.sound.shape[1] / clip.sound_rate
        assert clip.sound.shape[0] == 2
        assert seconds == pytest.approx(FRAMES / 24, abs=0.1)
    assert not torch.equal(clips[0].sound, clips[1].sound)  # pyright: ignore[reportArgumentType]


def test_the_transformer_of_2_3_is_told_by_its_shapes() -> None:
    torch.manual_seed(0)
    settings = {
        **TRANSFORMER,
        "gated_attn": True,
        "audio_gated_attn": True,
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
    }
    made = LTX2VideoTransformer3DModel(**settings)
    state = made.state_dict()
    swaps = (
        ("audio_prompt_adaln.", "audio_prompt_adaln_single."),
        ("prompt_adaln.", "prompt_adaln_single."),
    )
    theirs = original_dit(state)
    for ours, name in swaps:
        theirs = {n.replace(f"model.{ours}", f"model.{name}"): t for n, t in theirs.items()}
    converted = convert_dit(
        {n.removeprefix("model.diffusion_model."): t for n, t in theirs.items()}
    )
    assert converted.keys() == state.keys()
    told = dit_settings({name: tuple(t.shape) for name, t in converted.items()})
    again = LTX2VideoTransformer3DModel(**told)  # pyright: ignore[reportArgumentType]
    again.load_state_dict(converted)
    assert again.config.gated_attn
    assert again.config.cross_attn_mod


def test_spectrograms_are_those_of_the_formula() -> None:
    """Of a tone of 1 kHz: one bin of Slaney's scale, linear up to 1 kHz, holds most of it."""
    times = torch.arange(16000) / 16000
    sound = torch.sin(2 * math.pi * 1000 * times).expand(1, 2, -1)
    mel = log_mel(sound)
    assert mel.shape == (1, 2, 101, 64)
    torch.testing.assert_close(mel[:, 0], mel[:, 1])
    # 64 bins up to 8 kHz: mel(1000) = 15, and mel(8000) = 15 + 27 ln(8) / ln(6.4).
    highest = 15 + 27 * math.log(8) / math.log(6.4)
    assert int(mel[0, 0, 50].argmax()) == round(15 / highest * 65) - 1
    silent = log_mel(torch.zeros(1, 2, 1600))
    assert torch.equal(silent, torch.full_like(silent, math.log(1e-5)))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["in_context_videos"], "in_context_downsample_factor"),
        (["in_context_downsample_factor"], "in_context_videos"),
        (["input_audo"], "did you mean 'input_audio'"),
        ([], "audio_loss_weight is given, but nothing is trained on sound"),
    ],
)
def test_what_does_not_go_together_is_refused(extra: list[str], words: str) -> None:
    config = make_config(
        {
            "dataset_base_path": "d",
            "dataset_metadata_path": "m.json",
            "family": "ltx2",
            "lora_base_model": "dit",
            "model_paths": ["x"],
            "extra_inputs": extra,
            **({} if extra else {"audio_loss_weight": 0.5}),
        }
    )
    with pytest.raises(UserError, match=words):
        make_plan(config)


def test_a_transformer_of_2_5_is_refused(
    model: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    first, *others = values["model_paths"]
    tensors = load_file(first) | {"keyframes_abs_pos_embedding": torch.zeros(1, 128)}
    newer = tmp_path / "transformer.safetensors"
    save_file(tensors, newer)
    with pytest.raises(UserError, match=r"that of LTX-2\.5, which is not supported"):
        find_model(make_config({**values, "model_paths": [str(newer), *others]}), HUB)


def test_the_path_ends_above_zero() -> None:
    path = find_family("ltx2").noising(
        make_config(
            {
                "dataset_base_path": "d",
                "dataset_metadata_path": "m",
                "lora_base_model": "dit",
                "model_paths": ["x"],
            }
        ),
        {},
    )
    assert float(path.timesteps[0]) == 1000
    assert float(path.timesteps[-1]) == pytest.approx(100, abs=1e-3)
    assert np.all(np.diff(path.timesteps.numpy()) < 0)
