"""Make `recipes/demo_base/`: a tiny model in the published Qwen-Image layout, from nothing.

It is the base model of the offline demo. It draws the handwritten digits zero to seven at 64x64
and has never seen an eight or a nine. Everything is seeded:

1. a byte-level BPE tokenizer that knows the words of the prompt template and of the captions;
2. a text encoder with random weights, never trained: distinct words give distinct embeddings;
3. a VAE trained here by reconstruction, with the statistics of its latents in its config;
4. a transformer trained by this project's own full training, `recipes/demo_base/recipe.yaml`.

Run it from the project's root: `python recipes/make_demo_base.py`.
"""

import argparse
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth_dagster.config.recipe import read_recipe
from diffsynth_dagster.demo.digits import DIGIT_NAMES, draw, load_scans

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "recipes" / "demo_base"
RECIPE = BASE / "recipe.yaml"
TRANSFORMER_FILE = BASE / "transformer" / "diffusion_pytorch_model.safetensors"
SEED = 0
TEXT_ENCODER_SEED = 133
"""With this one, `eight` and `nine` lie nearest to `zero`, not between `three` and `five`. The base
model still draws an eight for one in six prompts of it: blends of what it knows look like eights."""

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_PREFIX_TOKENS = 34
"""Tokens before the prompt that the published pipeline drops, whatever the tokenizer."""
CAPTION_WORDS = (
    "a an the of in on with and photo picture drawing image handwritten printed digit number "
    "white black red green blue grey background small large"
)
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
"""Those of the published tokenizer, in its order."""

HIDDEN = 64
"""Width of the text encoder, and so the transformer's `joint_attention_dim`."""
LATENT_CHANNELS = 16
VAE_STEPS = 600
VAE_BATCH = 16
VAE_LEARNING_RATE = 2e-3
VAE_LATENT_NOISE = 0.2
"""Noise on the latents while the VAE trains, as a fraction of their standard deviation, so that
the decoder forgives what a small transformer gets wrong."""

log = logging.getLogger("make_demo_base")


def make_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Train a small BPE in which every word of the template and the captions is one token.

    Writes `vocab.json` and `merges.txt` as well as what `save_pretrained` writes.
    """
    words = TEMPLATE.format("").split("<|im_end|>")[0].removeprefix("<|im_start|>")
    corpus = [words, "user\n", "assistant\n"]
    corpus += [f" {word}" for word in (*CAPTION_WORDS.split(), *DIGIT_NAMES)]
    corpus += [*CAPTION_WORDS.split(), *DIGIT_NAMES]
    bpe = Tokenizer(models.BPE())
    # The pre-tokenizer of the published tokenizer, so that merges never cross its boundaries.
    bpe.pre_tokenizer = cast("Any", Qwen2Tokenizer())._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    tokenizer = Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=131072,
    )
    prefix = TEMPLATE.split("{}")[0]
    count = len(cast("Any", tokenizer)(prefix).input_ids)
    assert count == TEMPLATE_PREFIX_TOKENS, f"the prefix has {count} tokens"
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL with seeded random weights: two layers, width `HIDDEN`, two vision blocks."""
    ids = {name: cast("Any", tokenizer).convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(cast("Any", tokenizer)) // 64) * 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(TEXT_ENCODER_SEED)
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    return encoder.float().eval()


def digit_pixels() -> Tensor:
    """All ten digits of the training split as pixels in -1..1, of shape (N, 3, 1, 64, 64)."""
    images = [torch.from_numpy(np.array(draw(grey))) for grey in load_scans().grey]
    pixels = torch.stack(images).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).unsqueeze(2)


def train_vae(pixels: Tensor) -> AutoencoderKLQwenImage:
    """Train the VAE to reconstruct `pixels`, (N, 3, 1, 64, 64) in -1..1, from noisy latents."""
    torch.manual_seed(SEED)
    shape: dict[str, Any] = {"base_dim": 8, "z_dim": LATENT_CHANNELS, "num_res_blocks": 1}
    vae = AutoencoderKLQwenImage(**shape)
    model = cast("Any", vae)
    with torch.no_grad():  # the posterior's log-variance is not trained: make it a small constant
        model.quant_conv.weight[LATENT_CHANNELS:] = 0
        model.quant_conv.bias[LATENT_CHANNELS:] = -10
    optimizer = torch.optim.AdamW(model.parameters(), lr=VAE_LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_LEARNING_RATE, VAE_STEPS)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(VAE_STEPS):
        x = pixels[torch.randint(len(pixels), (VAE_BATCH,), generator=generator)]
        z = model.encode(x).latent_dist.mode()
        spread = z.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        noise = torch.randn(z.shape, generator=generator)
        y = model.decode(z + VAE_LATENT_NOISE * spread * noise).sample
        loss = functional.mse_loss(y, x) + 1e-4 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == VAE_STEPS - 1:
            log.info("VAE step %d of %d: loss %.5f", step, VAE_STEPS, loss.item())
    mean, std = latent_statistics(vae, pixels)
    model.register_to_config(latents_mean=mean, latents_std=std)
    return vae


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLQwenImage, pixels: Tensor
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over `pixels`, (N, 3, 1, 64, 64)."""
    encode = cast("Any", vae).encode
    z = torch.cat([encode(x).latent_dist.mode() for x in pixels.split(32)])
    std, mean = torch.std_mean(z, dim=(0, 2, 3, 4))
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in std.tolist()]


def make_transformer() -> QwenImageTransformer2DModel:
    """A four-block transformer, seeded random weights, every block starting near the identity."""
    torch.manual_seed(SEED)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in transformer.named_parameters():
        if "img_mod" in name or "txt_mod" in name or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with the published Qwen-Image configuration."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        invert_sigmas=False,
        max_image_seq_len=8192,
        max_shift=0.9,
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=0.02,
        stochastic_sampling=False,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def save_base() -> None:
    """Write the whole model with an untrained transformer, in bfloat16 but for the text encoder.

    The text encoder stays float32, because transformers loads weights in the type of the file:
    so the folder loads in one type whether or not a type is asked for.
    """
    vae = train_vae(digit_pixels())
    for made in (path for path in BASE.iterdir() if path.is_dir()):
        shutil.rmtree(made)
    tokenizer = make_tokenizer(BASE / "tokenizer")
    pipeline = QwenImagePipeline(
        scheduler=make_scheduler(),
        vae=cast("Any", vae).to(torch.bfloat16),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=cast("Any", make_transformer()).to(torch.bfloat16),
    )
    pipeline.save_pretrained(BASE)
    for weights in BASE.rglob("*.safetensors"):
        weights.chmod(0o644)


def train_transformer() -> None:
    """Train the transformer with this project's own trainer and put it in its place, in bfloat16.

    Raises:
        CalledProcessError: the training failed; it has said why.
    """
    config = read_recipe(RECIPE).config
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    trainer = ["-m", "diffsynth_dagster.train", "--recipe", str(RECIPE.relative_to(ROOT))]
    subprocess.run([*launch, *trainer], cwd=ROOT, check=True)
    checkpoint = ROOT / config.output_path / f"epoch-{config.num_epochs - 1}.safetensors"
    trained = {name: t.to(torch.bfloat16) for name, t in load_file(checkpoint).items()}
    assert trained.keys() == load_file(TRANSFORMER_FILE).keys(), "the transformer, whole"
    save_file(trained, TRANSFORMER_FILE, metadata={"format": "pt"})


def main() -> None:
    """Make the base model from nothing, or with `--only-transformer` train that part again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only-transformer", action="store_true")
    only_transformer = parser.parse_args().only_transformer
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    if only_transformer:
        cast("Any", make_transformer()).to(torch.bfloat16).save_pretrained(TRANSFORMER_FILE.parent)
    else:
        save_base()
    train_transformer()
    log.info("made %s in %.0f s", BASE, time.perf_counter() - began)


if __name__ == "__main__":
    main()
