"""Captions in chunks of 75 tokens, of Stable Diffusion 1.5 and XL."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from conftest import make_config, train_to_end
from diffusers import (
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from families.stable_diffusion import cases as sd15
from families.stable_diffusion.training import losses_of, noise_of, published_losses, values_of
from families.stable_diffusion_xl import cases as sdxl
from transformers import CLIPTokenizer

from diffsynth_dagster.cache.keys import stage_digest
from diffsynth_dagster.families import find_family
from diffsynth_dagster.families.contract import Family, Tensors
from diffsynth_dagster.families.shared.chunks import chunk_rows, of_one_length
from diffsynth_dagster.weights.resolved import as_used

PIPELINES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
WORDS = [f"{chr(97 + n % 26)}" for n in range(200)]
"""Each is a token of the tiny tokenizers."""
PROMPTS = [" ".join(WORDS[:n]) for n in (3, 75, 76, 190)]


class Kind:
    """A family, a tiny model of it, and rows whose captions have 1, 1, 2 and 3 chunks."""

    def __init__(self, name: str, folder: Path) -> None:
        cases: Any = sd15 if name == "sd15" else sdxl
        self.name, self.cases, self.case = name, cases, cases.CASES[0]
        self.model = folder / "model"
        cases.write(self.model)
        self.data = cases.rows(folder / "data")
        table = pl.read_csv(self.data)
        table.with_columns(pl.Series("prompt", PROMPTS)).write_csv(self.data)
        self.pipeline = PIPELINES[name](**cases.parts_of(self.model / "diffusers"))

    def values(self, **more: Any) -> dict[str, Any]:
        return values_of(self.case, self.model, self.data, **more)

    def embeds(self, prompt: str, chunks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each chunk as a prompt of the pipeline: (1, 77 n, width), and the first pooled (1, width)."""
        words = prompt.split()[: 75 * chunks]
        texts = [" ".join(words[at : at + 75]) for at in range(0, len(words), 75)]
        given = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "device": "cpu"}
        with torch.no_grad():
            embeds, _, *pooled = self.pipeline.encode_prompt(prompt=texts, **given)
        return embeds.flatten(0, 1)[None], pooled[0][:1] if pooled else None


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(request.param, tmp_path_factory.mktemp(request.param))


def test_losses_are_those_of_the_pipelines_chunks(kind: Kind, tmp_path: Path) -> None:
    """Of samples with 1, 1, 2 and 3 chunks in one batch, each against the pipeline's UNet alone."""
    values = kind.values(caption_chunks=3, min_snr_gamma=None)
    _, batch, ours = losses_of(values, tmp_path / "run")
    names = ["prompt_embeds", *(["prompt_embeds_2"] if kind.name == "sdxl" else [])]
    latents = batch.outputs["image"].float()
    epsilon, timesteps = noise_of(batch, latents.shape)
    scheduler = DDPMScheduler.from_config(kind.pipeline.scheduler.config)
    expected = [kind.embeds(prompt, 3) for prompt in PROMPTS]
    seen: set[int] = set()
    for at in range(4):
        count = int(batch.outputs["prompt_embeds_mask"][at].sum())
        told = torch.cat([batch.outputs[n][at, :count] for n in names], -1)[None]
        (which,) = (
            i
            for i, (embeds, _) in enumerate(expected)
            if embeds.shape == told.shape and float((embeds - told).abs().max()) <= 1e-4
        )
        seen.add(which)
        embeds, pooled = expected[which]
        call: dict[str, Any] = {"encoder_hidden_states": embeds}
        if pooled is not None:
            ids = batch.outputs["time_ids"][at : at + 1]
            call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        one = slice(at, at + 1)
        theirs = published_losses(
            scheduler, kind.pipeline.unet, latents[one], epsilon[one], timesteps[one], None, **call
        )
        assert float((ours[one] - theirs).abs().max()) <= 2e-5
    assert seen == {0, 1, 2, 3}


def test_a_chunk_is_what_the_tokenizer_makes_of_it(kind: Kind) -> None:
    for folder in ("tokenizer", "tokenizer_2")[: 1 + (kind.name == "sdxl")]:
        tokenizer: Any = CLIPTokenizer.from_pretrained(kind.model / "diffusers" / folder)
        for text in ["", "a cat", " ".join(WORDS[:75])]:
            (row,) = chunk_rows(tokenizer, text, 77, 3)
            assert row == tokenizer(text, padding="max_length", max_length=77).input_ids
        assert len(chunk_rows(tokenizer, " ".join(WORDS), 77, 2)) == 2  # the rest is cut off


def used(kind: Kind, **more: Any) -> Family:
    return as_used(find_family(kind.case.family), make_config(kind.values(**more)), {})


def test_only_chunks_that_are_asked_for_change_keys(kind: Kind) -> None:
    prompts = ["prompt", *(["prompt_2"] if kind.name == "sdxl" else [])]
    off, plain = used(kind), used(kind, caption_chunks=1)
    two, three = used(kind, caption_chunks=2), used(kind, caption_chunks=3)
    assert off.stages == plain.stages == find_family(kind.case.family).stages
    for stage in off.stages:
        digests = {stage_digest(family.stage(stage.name)) for family in (off, two, three)}
        assert len(digests) == (3 if stage.name in prompts else 1)
    limit = three.stage("prompt").limit
    assert limit is not None
    assert limit.most == 227


def test_repeated_contexts_change_no_attention() -> None:
    unet = UNet2DConditionModel(**sd15.ARCHITECTURE, up_block_types=sd15.UP)
    source = torch.Generator().manual_seed(0)
    embeds = [torch.randn(77 * n, 64, generator=source) for n in (2, 3)]
    padded = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    mask = torch.arange(231) < torch.tensor([[154], [231]])
    x_t, t = torch.randn(2, 4, 8, 8, generator=source), torch.tensor([10.0, 900.0])
    conditions: Tensors = {"prompt_embeds": padded, "prompt_embeds_mask": mask}
    (joined,) = of_one_length(conditions, "prompt_embeds")
    assert joined.shape == (2, 462, 64)
    with torch.no_grad():
        together = unet(x_t, t, encoder_hidden_states=joined).sample
        for at in range(2):
            one = slice(at, at + 1)
            alone = unet(x_t[one], t[one], encoder_hidden_states=embeds[at][None]).sample
            assert float((together[one] - alone).abs().max()) <= 1e-5
    assert of_one_length({"prompt_embeds": padded}, "prompt_embeds")[0] is padded


def test_training_and_its_samples_read_the_same_chunks(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lengths: list[int] = []
    forward = UNet2DConditionModel.forward

    def watched(self: Any, sample: Any, timestep: Any, *given: Any, **more: Any) -> Any:
        lengths.append(more["encoder_hidden_states"].shape[1])
        return forward(self, sample, timestep, *given, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    sampled = {
        "sample_prompts": [PROMPTS[3]],
        "sample_num_inference_steps": 1,
        "sample_cfg_scale": 2.0,
    }
    values = kind.values(caption_chunks=2, batch_size=4, **sampled)
    train_to_end(values, tmp_path / "run")
    assert set(lengths) == {77, 154}  # of the empty prompt; of the batch, and of the sample
    assert lengths.count(154) > lengths.count(77)
    said = capfd.readouterr().err
    assert "the caption of row 4 is longer than the 152 tokens that the text encoder reads" in said
    assert list((tmp_path / "run" / "samples").glob("*"))
