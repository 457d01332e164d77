"""The command line of each variant of the guide prints a plan, with no file there.

And each template in recipes/examples/ asks for the same as its command line, but for what makes it train well.
"""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from guide_variants import FULL, FULL_LORA, VARIANTS, Variant

from diffsynth_dagster import families
from diffsynth_dagster.config import read_recipe, unsupported
from diffsynth_dagster.config.flags import read_arguments
from diffsynth_dagster.errors import ParameterError
from diffsynth_dagster.families import family_names, repositories_of
from diffsynth_dagster.plan import make_plan
from diffsynth_dagster.train import main
from diffsynth_dagster.weights.identify import guess_model


def command(variant: Variant, kind: str) -> list[str]:
    flags = {
        "--dataset_base_path": "data/example",
        "--dataset_metadata_path": "data/example/metadata.csv",
        "--model_id_with_origin_paths": variant.models,
        "--output_path": "./models/train/example",
        **variant.flags,
    }
    if kind == "lora":
        flags |= {**FULL_LORA, "--lora_base_model": variant.base}
        flags |= {
            "--lora_target_modules": variant.targets,
            "--remove_prefix_in_ckpt": variant.prefix,
        }
        flags |= variant.lora
    else:
        assert variant.full is not None
        prefix = variant.prefix
        if variant.trained == "controlnet":
            prefix = "pipe.controlnet.models.0."
        flags |= {**FULL, "--trainable_models": variant.trained, "--remove_prefix_in_ckpt": prefix}
        flags |= variant.full
    # No target at all means automatic ones, and is a value.
    return [
        word
        for name, value in flags.items()
        for word in ([name, value] if value or name == "--lora_target_modules" else [name])
    ]


CHOSEN = {
    *("num_epochs", "dataset_repeat", "max_train_steps", "save_steps", "save_keep"),
    *("max_grad_norm", "sample_prompts", "frame_rate"),
}
"""What templates choose otherwise than the guide's commands: see `test_templates.py`."""
OWN_SIZES = {"height", "width", "max_pixels", "bucket_step"}
"""The same for families whose commands have a fixed size for pictures."""
COMMANDS = [
    pytest.param(variant, kind, id=f"{variant.template}_{kind}")
    for variant in VARIANTS
    for kind in ("lora", "full")
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.template)
def test_the_family_alone_is_imported(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []

    def note(name: str) -> ModuleType:
        imported.append(name)
        return import_module(name)

    monkeypatch.setattr(families, "import_module", note)
    config = read_arguments(command(variant, "lora")).config
    family = guess_model(config).family
    assert set(imported) == {f"diffsynth_dagster.families.{family.name}.family"}


@pytest.mark.parametrize(("variant", "kind"), COMMANDS)
def test_the_command_prints_a_plan(
    variant: Variant,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([*command(variant, kind), "--dry_run", "--no_files"])
    output = capsys.readouterr()
    assert code == 0, output.err
    plan = json.loads(output.out)
    assert plan["family"] == variant.family
    assert set(variant.components) <= set(plan["components"])
    stages = plan["stages"]["cached"] + plan["stages"]["in_step"]
    assert sorted(stages) == sorted(variant.cached)
    assert plan["stages"]["in_step"] == []
    if kind == "lora":
        assert plan["trained"]["lora"]["base_model"] == variant.base
    else:
        assert plan["trained"]["full"] == [variant.trained]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variant", "kind"), COMMANDS)
def test_the_template_asks_for_the_same(variant: Variant, kind: str) -> None:
    (path,) = (ROOT / "recipes" / "examples").rglob(f"{variant.template}_{kind}.yaml")
    recipe = read_recipe(path)
    theirs = read_arguments(command(variant, kind)).config
    own, flags = recipe.config.model_dump(), theirs.model_dump()
    # Where the data and the results lie, and what is told from the files or by accelerate.
    free = {"dataset_base_path", "dataset_metadata_path", "output_path", "family", *CHOSEN}
    if variant.family.startswith("stable_diffusion"):
        free |= OWN_SIZES
    free |= {"mixed_precision", "data_file_keys"}
    # What the guide's script does without a flag.
    free.add("first_frame_crf")
    if own["lora_target_modules"] is None:
        free.add("lora_target_modules")  # the family's usual ones, which are these
    assert {n: v for n, v in own.items() if n not in free} == {
        n: v for n, v in flags.items() if n not in free
    }
    plans = [make_plan(config) for config in (recipe.config, theirs)]
    assert plans[0]["stages"] == plans[1]["stages"]
    assert plans[0]["family"] == variant.family


@pytest.mark.parametrize("half", ["data_process", "train"])
def test_each_half_of_a_split_command_prints_a_plan(
    half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guide's commands for LTX-2 name in each half the models that it needs."""
    monkeypatch.chdir(tmp_path)
    models = BY_NAME["ltx2_t2av"].models.split(",")
    words = command(BY_NAME["ltx2_t2av"], "lora")
    named = models[1:] if half == "data_process" else models[:1]
    words[words.index("--model_id_with_origin_paths") + 1] = ",".join(named)
    if half == "train":
        at = words.index("--dataset_metadata_path")
        words = words[:at] + words[at + 2 :]
    assert main([*words, "--task", f"sft:{half}", "--dry_run", "--no_files"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["family"] == "ltx2"
    assert ("dit" in plan["components"]) == (half == "train")
    assert plan["stages"]["cached"] == ["prompt", "video", "audio"]
    assert list(tmp_path.iterdir()) == []


UNSUPPORTED = [
    (
        "flux_dev",
        "ostris/Flex.2-preview:Flex.2-preview.safetensors",
        "is FLEX.2, and is not supported yet (it is given more than the noise)",
    ),
    (
        "wan21_t2v_14b",
        "meituan-longcat/LongCat-Video:dit/*.safetensors",
        "is LongCat-Video, and is not supported yet (it is no Wan)",
    ),
    ("flux_dev", "black-forest-labs/FLUX.2-dev:ae.safetensors", "'flux2'"),
    ("flux_dev", "Tongyi-MAI/Z-Image-Turbo:text_encoder/*.safetensors", "'z_image'"),
    ("wan21_t2v_14b", "PAI/Wan2.1-Fun-14B-Control:*.safetensors", "is Wan Fun-Control"),
    ("wan21_i2v_14b_480p", "Wan-AI/Wan2.2-S2V-14B:*.safetensors", "is Wan S2V"),
    (
        "flux_dev",
        "black-forest-labs/FLUX.1-Redux-dev:image_embedder/diffusion_pytorch_model.safetensors",
        "is FLUX.1 Redux, and is not supported yet",
    ),
    ("qwen_image", "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny:a", "is a blockwise"),
    ("flux_dev", "black-forest-labs/FLUX.2-dev:transformer/*.safetensors", "'flux2'"),
    ("qwen_image", "Tongyi-MAI/Z-Image:transformer/*.safetensors", "'z_image'"),
    ("qwen_image", "circlestone-labs/Anima:split_files/anima.safetensors", "'anima'"),
    ("wan21_t2v_14b", "openmoss/MOVA-360p:video_dit/*.safetensors", "'mova'"),
    ("qwen_image", "Qwen/Qwen-Image-Layered:transformer/*.safetensors", "is Qwen-Image-Layered"),
]


@pytest.mark.parametrize(("template", "model", "message"), UNSUPPORTED)
@pytest.mark.parametrize("flags", [(), ("--tokenizer_t5xxl_path", "a"), ("--quant_options", "a:b")])
def test_what_is_not_supported_is_named_by_its_repository_before_any_flag(
    template: str,
    model: str,
    message: str,
    flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With no `--dry_run`: before anything is made or downloaded."""
    monkeypatch.chdir(tmp_path)
    words = command(BY_NAME[template], "lora")
    words[words.index("--model_id_with_origin_paths") + 1] += f",{model}"
    assert main([*words, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "not supported yet" in error
    assert "did you mean" not in error
    assert list(tmp_path.iterdir()) == []
    values = {"nonsense": 1, "model_id_with_origin_paths": [model]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ParameterError, match="not supported yet"):
        read_recipe(tmp_path / "recipe.yaml")


def test_shared_files_of_an_unsupported_repository_are_taken(tmp_path: Path) -> None:
    words = command(BY_NAME["wan21_t2v_14b"], "lora")
    at = words.index("--model_id_with_origin_paths") + 1
    dit, text, vae = words[at].split(",")
    other = "PAI/Wan2.1-Fun-14B-Control"
    words[at] = ",".join([dit, f"{other}:{text.split(':')[1]}", f"{other}:{vae.split(':')[1]}"])
    assert make_plan(read_arguments(words).config)["family"] == "wanvideo"


@pytest.mark.parametrize(
    ("template", "vae"),
    [
        ("flux_dev", "Tongyi-MAI/Z-Image-Turbo:vae/*.safetensors"),
        ("qwen_image", "circlestone-labs/Anima:split_files/vae/qwen_image_vae.safetensors"),
    ],
)
def test_a_vae_that_is_that_of_a_supported_model_is_taken_from_anywhere(
    template: str, vae: str
) -> None:
    words = command(BY_NAME[template], "lora")
    at = words.index("--model_id_with_origin_paths") + 1
    *others, _ = words[at].split(",")
    words[at] = ",".join([*others, vae])
    assert make_plan(read_arguments(words).config)["components"]["vae"] == vae
    # On its own it is what the first half of its own family's training lists.
    with pytest.raises(ParameterError, match="not supported yet"):
        unsupported.refuse_unsupported({"model_id_with_origin_paths": [vae]}, "here")


@pytest.mark.parametrize("family", [["qwen_image"], {"name": "flux2"}, 5])
def test_a_family_that_is_no_text_is_one_message(family: object, tmp_path: Path) -> None:
    values = {"family": family, "model_paths": ["a"], "dataset_base_path": "d"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ParameterError, match=r"family.*string"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("template", "column"),
    [
        ("wan21_t2v_14b", "control_video"),
        ("wan21_t2v_14b", "reference_image"),
        ("wan21_t2v_14b", "input_audio"),
        ("wan21_t2v_14b", "vap_video"),
        ("flux_dev", "context_image"),
        ("flux_dev", "flux_redux_image"),
        ("qwen_image", "layer_input_image"),
        ("sd15", "controlnet_inpaint_mask"),
    ],
)
def test_no_column_of_another_variant_is_suggested(
    template: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(BY_NAME[template], "lora"), "--extra_inputs", column, "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert f"'{column}'" in error
    assert "did you mean" not in error


@pytest.mark.parametrize(
    ("flag", "family"),
    [
        ("--tokenizer_t5xxl_path", "anima"),
        ("--noise_scale", "hidream_o1_image"),
        ("--dmd2_student_sample_steps", "flux2"),
        ("--processor_config", "hidream_o1_image"),
    ],
)
def test_a_flag_of_an_unsupported_family_is_not_taken_for_a_slip(
    flag: str, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(BY_NAME["qwen_image"], "lora"), flag, "1"]) == 2
    error = capsys.readouterr().err
    assert f"{flag} is of the family '{family}', which is not supported yet" in error
    assert "did you mean" not in error


def test_no_supported_family_or_repository_counts_as_unsupported() -> None:
    assert not set(unsupported.FAMILIES) & set(family_names())
    for family in family_names():
        for start in repositories_of(family):
            models = {"model_id_with_origin_paths": f"{start}:a.safetensors"}
            unsupported.refuse_unsupported(models, "here")


BY_NAME = {variant.template: variant for variant in VARIANTS}
ACCEPTED = [
    ("qwen_image", "--tokenizer_path", "a"),
    ("qwen_image", "--initialize_model_on_cpu", ""),
    ("qwen_image_edit", "--processor_path", "a"),
    ("qwen_image_edit", "--zero_cond_t", ""),
    ("flux_dev", "--tokenizer_1_path", "a"),
    ("flux_dev", "--tokenizer_2_path", "a"),
    ("flux_dev", "--align_to_opensource_format", ""),
    ("sd15", "--tokenizer_path", "a"),
    ("sd15", "--prediction_type", "v_prediction"),
    ("sd15", "--min_snr_gamma", "5"),
    ("sdxl", "--tokenizer_path", "a"),
    ("sdxl", "--tokenizer_2_path", "a"),
    ("sdxl", "--align_to_opensource_format", ""),
    ("wan21_t2v_1.3b", "--tokenizer_path", "a"),
    ("wan21_t2v_1.3b", "--max_timestep_boundary", "0.417"),
    ("wan21_t2v_1.3b", "--min_timestep_boundary", "0.417"),
    ("wan21_t2v_1.3b", "--initialize_model_on_cpu", ""),
    ("wan21_t2v_1.3b", "--num_frames", "49"),
    ("ltx2_t2av", "--tokenizer_path", "a"),
    ("ltx2_t2av", "--frame_rate", "30"),
    ("ltx2_t2av", "--initialize_model_on_cpu", ""),
    ("ltx2_t2av", "--audio_loss_weight", "0.5"),
    ("ltx2_i2av", "--first_frame_crf", "33"),
    ("sd15", "--caption_chunks", "3"),
    ("sdxl", "--caption_chunks", "2"),
]
REFUSED = [
    ("qwen_image", "--tokenizer_1_path", "a", "qwen_image takes no tokenizer_1_path"),
    ("qwen_image", "--align_to_opensource_format", "", "takes no align_to_opensource_format"),
    ("qwen_image", "--zero_cond_t", "", "zero_cond_t"),
    ("qwen_image", "--processor_path", "a", "processor_path"),
    ("qwen_image", "--num_frames", "49", "num_frames = 49 is given"),
    ("flux_dev", "--tokenizer_path", "a", "flux takes no tokenizer_path"),
    ("flux_dev", "--zero_cond_t", "", "flux takes no zero_cond_t"),
    ("flux_dev", "--extra_inputs", "controlnet_inpaint_mask", "'controlnet_inpaint_mask'"),
    ("flux_dev", "--min_snr_gamma", "5", "flux takes no min_snr_gamma"),
    ("sd15", "--tokenizer_2_path", "a", "stable_diffusion takes no tokenizer_2_path"),
    ("sd15", "--zero_terminal_snr", "", "--zero_terminal_snr is given but no --prediction_type"),
    ("sd15", "--num_frames", "49", "num_frames = 49 is given"),
    ("sdxl", "--extra_inputs", "kontext_images", "'kontext_images'"),
    ("wan21_i2v_14b_480p", "--first_frame_crf", "33", "wanvideo takes no first_frame_crf"),
    ("flux_dev", "--caption_chunks", "3", "flux takes no caption_chunks"),
    ("qwen_image", "--caption_chunks", "3", "qwen_image takes no caption_chunks"),
    ("sd15", "--caption_chunks", "5", "caption_chunks"),
    ("ltx2_t2av", "--first_frame_crf", "33", "first_frame_crf is given, but no first frame is"),
    ("ltx2_i2av", "--first_frame_crf", "52", "first_frame_crf"),
    ("wan21_t2v_1.3b", "--audio_processor_path", "a", "--audio_processor_path is not supported"),
    ("wan21_t2v_1.3b", "--framewise_decoding", "", "--framewise_decoding is not supported"),
    ("wan21_t2v_1.3b", "--extra_inputs", "control_video", "'control_video'"),
    ("wan21_t2v_1.3b", "--extra_inputs", "input_audio", "'input_audio'"),
    ("wan21_t2v_1.3b", "--num_frames", "50", "num_frames = 50 is no length"),
    ("wan21_t2v_1.3b", "--min_timestep_boundary", "1", "--min_timestep_boundary"),
    ("wan21_t2v_1.3b", "--resume_from_checkpoint", "a", "is given but no --trainable_models"),
    *(
        ("wan21_t2v_1.3b", flag, value, f"{flag} is not supported yet")
        for flag, value in (
            ("--offload_models", "a:b"),
            ("--quant_options", "a:bitsandbytes_nf4"),
            ("--template_model_id_or_path", "a"),
            ("--enable_lora_hot_loading", ""),
            ("--enable_model_cpu_offload", ""),
            ("--enable_optimizer_cpu_offload", ""),
            ("--cpu_offload_split_threshold", "100"),
        )
    ),
]


@pytest.mark.parametrize(("template", "flag", "value"), ACCEPTED)
def test_flags_of_the_family_are_accepted(template: str, flag: str, value: str) -> None:
    argv = [*command(BY_NAME[template], "lora"), flag, *([value] if value else [])]
    config = read_arguments(argv).config
    make_plan(config)
    without = [w for w in command(BY_NAME[template], "lora") if w != flag]
    assert getattr(config, flag[2:]) != getattr(read_arguments(without).config, flag[2:])


@pytest.mark.parametrize(("template", "flag", "value", "message"), REFUSED)
def test_what_the_family_does_not_do_is_refused_by_name(
    template: str, flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command(BY_NAME[template], "lora"), flag, *([value] if value else []), "--dry_run"]
    assert main(argv) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
