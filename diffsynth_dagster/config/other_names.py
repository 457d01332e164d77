"""Our names for the parameters of other trainers: kohya's sd-scripts, musubi-tuner, ai-toolkit, the
example scripts of diffusers, diffusion-pipe, SimpleTuner and OneTrainer."""

_MODELS = "`model_id_with_origin_paths` (from the hub) or `model_paths` (files)"
_CHECKPOINTS = "`save_steps` (in optimizer steps; left out, each epoch leaves a checkpoint)"
_SAMPLES = "`sample_steps` (in optimizer steps; left out, with each checkpoint)"

_NAMES: dict[str, str] = {
    # The adapter.
    "`lora_rank`": "network_dim network_rank rank linear",
    "`lora_alpha`": "network_alpha linear_alpha",
    "`lora_dropout`": "network_dropout",
    "`lora_target_modules`": "lora_layers target_modules",
    "`lora_checkpoint`": "network_weights init_from_existing init_lora",
    "`preset_lora_path`": "base_weights",
    "`lora_method`": "network_module use_dora",
    "`lora_base_model` or `trainable_models`": "train_text_encoder network_train_unet_only",
    # The course.
    "`batch_size`": "train_batch_size micro_batch_size_per_gpu",
    "`num_epochs`": "max_train_epochs num_train_epochs epochs",
    "`max_train_steps`": "steps max_steps",
    "`learning_rate`": "lr unet_lr",
    "`learning_rates` (module=rate)": "text_encoder_lr",
    "`lr_scheduler`": "learning_rate_scheduler lr_scheduler_type",
    "`lr_warmup_steps`": "warmup_steps learning_rate_warmup_steps",
    "`max_grad_norm`": "gradient_clipping clip_grad_norm",
    "`gradient_accumulation_steps`": "gradient_accumulation",
    "`optimizer`": "optimizer_type use_8bit_adam",
    "`optimizer_arguments`": "optimizer_args optimizer_params adam_beta1 adam_beta2 adam_epsilon betas",
    "`weight_decay`": "adam_weight_decay",
    "`ema_sigma_rel`": "use_ema ema_config ema_decay",
    "`mixed_precision`": "train_dtype",
    "`use_gradient_checkpointing`": "gradient_checkpointing activation_checkpointing",
    "`fp8_models`": "fp8_base quantize base_model_precision",
    # The objective.
    "`min_snr_gamma`": "snr_gamma",
    "`prediction_type`": "v_parameterization",
    "`timestep_shift`": "discrete_flow_shift flow_schedule_shift",
    "`timestep_sampling`": "weighting_scheme timestep_distribution timestep_type",
    # Other trainers count timesteps from the data, we count fractions from the noise.
    "`max_timestep_boundary` = 1 - min_timestep / 1000 (the schedule begins with the most noise)": (
        "min_timestep"
    ),
    "`min_timestep_boundary` = 1 - max_timestep / 1000 (the schedule begins with the most noise)": (
        "max_timestep"
    ),
    "`loss_mask_column`": "masked_loss masked_training alpha_mask",
    # The data.
    "`dataset_base_path`": "train_data_dir instance_data_dir data_dir folder_path image_directory "
    "video_directory",
    "`dataset_metadata_path`": "in_json image_jsonl_file video_jsonl_file",
    "`dataset_repeat`": "num_repeats repeats",
    "`dataset_num_workers`": "max_data_loader_n_workers dataloader_num_workers num_workers",
    "`max_pixels` (an area: 1048576 for 1024x1024), or `height` and `width`": "resolution resolutions "
    "max_bucket_reso",
    "`bucket_step`": "bucket_reso_steps bucket_reso_step",
    "`num_frames`": "target_frames frame_buckets",
    "`frame_rate`": "fps",
    "`caption_dropout_rate`": "caption_dropout_probability caption_dropout proportion_empty_prompts",
    "`shuffle_tags`": "shuffle_caption shuffle_tokens",
    "`keep_tags`": "keep_tokens",
    "`caption_prefix`": "instance_prompt trigger_word class_tokens",
    "`caption_extension`": "caption_ext",
    "`caption_chunks` (chunks of 75 tokens)": "max_token_length",
    "`cache_path`": "cache_directory",
    # The models.
    _MODELS: "pretrained_model_name_or_path name_or_path base_model_name diffusers_path ckpt_path "
    "transformer_path",
    "`family`": "model_family arch",
    # What is written.
    "`output_path`": "output_dir training_folder output_model_destination",
    _CHECKPOINTS: "save_every_n_epochs save_every_n_steps save_every checkpointing_steps "
    "checkpoint_step_interval",
    "`save_keep`": "checkpoints_total_limit max_step_saves_to_keep save_last_n_steps save_last_n_epochs",
    "`state_minutes`": "checkpoint_every_n_minutes",
    "`state_steps`": "save_state backup_after checkpoint_every_n_epochs",
    "`sample_prompts`": "validation_prompt validation_prompts",
    "`sample_negative_prompt`": "validation_negative_prompt",
    _SAMPLES: "sample_every_n_steps sample_every_n_epochs sample_every validation_epochs "
    "validation_step_interval",
    "`sample_num_inference_steps`": "validation_num_inference_steps",
    "`sample_cfg_scale`": "validation_guidance",
    "`validation_steps`": "eval_steps eval_every_n_steps eval_every_n_epochs",
    "`enable_tensorboard_log`, or that of another tracker": "log_with report_to",
    "`wandb_project`": "log_tracker_name tracker_project_name",
}
"""Our name (parameters are between backticks) → the names in other trainers."""

OTHER_NAMES = {name: here for here, names in _NAMES.items() for name in names.split()}
"""Name in another trainer → our name, with parameters between backticks."""


def other_name(name: str) -> str:
    """A hint for the name of another trainer's parameter; empty if no trainer has it."""
    here = OTHER_NAMES.get(name.lower().replace("-", "_"))
    return "" if here is None else f"{name} is {here.replace('`', '')} here"
