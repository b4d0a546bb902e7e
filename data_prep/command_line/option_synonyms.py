"""Names of settings elsewhere (transformers' TrainingArguments and example scripts, TRL, peft), and what they are
here.

    other_name("lr", {"learning_rate": "Peak learning rate. …", …})    Here it is learning_rate: Peak learning rate.
    other_name("push_to_hub", …)    When training has ended: diptych publish RUN --to owner/name.
    other_name("spam", …)

Only names of other libraries stand here. A misspelt name of ours is found by `nearest`.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

HERE = {
    "learning_rate": "lr lr_rate peak_lr max_lr",
    "epochs": "num_train_epochs num_epochs n_epochs epoch train_epochs",
    "max_steps": "steps num_steps train_steps max_train_steps num_train_steps",
    "batch_size": "per_device_train_batch_size train_batch_size per_gpu_train_batch_size micro_batch_size bs",
    "batch_tokens=auto": "auto_find_batch_size",
    "eval_batch_size batch_size": "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps accumulate_grad_batches",
    "out out_file": "output_dir out_dir output save_dir logging_dir output_file output_path",
    "betas": "adam_beta1 adam_beta2 adam_betas beta1 beta2",
    "epsilon": "adam_epsilon adam_eps eps",
    "weight_decay": "wd",
    "schedule": "lr_scheduler_type lr_scheduler scheduler scheduler_type",
    "schedule_settings": "lr_scheduler_kwargs",
    "optimizer": "optim",
    "optimizer_settings": "optim_args",
    "neftune": "neftune_noise_alpha",
    "ema": "ema_decay use_ema",
    "run_name": "wandb_run_name",
    "project": "wandb_project trackio_*",
    "warmup_steps warmup_ratio": "num_warmup_steps lr_warmup_steps warmup",
    "max_grad_norm": "max_norm clip_grad_norm gradient_clipping grad_clip gradient_clip_val",
    "label_smoothing": "label_smoothing_factor",
    "precision=bf16 dtype=bfloat16": "bf16 bf16_full_eval",
    "precision=fp16 dtype=float16": "fp16 fp16_full_eval half",
    "precision=fp32 dtype=float32": "fp32 tf32",
    "precision dtype": "mixed_precision amp torch_dtype",
    "gradient_checkpointing": "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs",
    "attention": "attn_implementation use_flash_attention_2 flash_attention flash_attn use_flash_attn",
    "compile": "torch_compile torch_compile_backend torch_compile_mode",
    "packed packing": "packing eval_packing packing_strategy pack group_texts padding_free",
    "group_by_length": "train_sampling_strategy length_column_name sortish_sampler",
    "trackers": "report_to log_with tracker wandb use_wandb",
    "logging_every": "logging_steps log_steps log_every log_interval logging_strategy logging_first_step",
    "eval_every": "eval_steps eval_strategy evaluation_strategy eval_interval eval_delay eval_on_start",
    "save_every": "save_steps save_strategy checkpointing_steps save_interval",
    "keep_last": "save_total_limit",
    "final": "load_best_model_at_end",
    "best_metric": "metric_for_best_model greater_is_better",
    "patience": "early_stopping_patience early_stopping early_stopping_threshold",
    "metrics": "compute_metrics predict_with_generate metric include_for_metrics",
    "max_new_tokens": "generation_max_length val_max_target_length max_tokens max_output_tokens",
    "num_beams": "generation_num_beams beams beam_size",
    "generation": "generation_config generate_kwargs top_p top_k repetition_penalty length_penalty min_new_tokens "
    "no_repeat_ngram_size",
    "temperature": "do_sample sample sampling",
    "num_return_sequences": "num_samples num_outputs",
    "resume": "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
    "seed": "data_seed random_seed full_determinism shuffle_seed",
    "device=cpu": "use_cpu no_cuda",
    "device": "gpu cuda device_map",
    "model encoder adapter": "model_name_or_path model_name model_id base_model checkpoint model_path",
    "model_overrides": "config_overrides config_name model_init_kwargs",
    "tokenizer": "tokenizer_name tokenizer_name_or_path processing_class",
    "teacher": "ref_model teacher_model teacher_model_name_or_path",
    "data": "dataset_name dataset dataset_path dataset_dir train_file data_path data_dir train_data",
    "validation validation_fraction split": "validation_file eval_file dev_file eval_dataset dataset_test_split "
    "validation_split_percentage val_set_size validation_split eval_split",
    "test test_fraction split": "test_file test_data test_size",
    "limit metrics_limit": "max_train_samples max_eval_samples max_predict_samples max_samples",
    "max_source_tokens + max_new_tokens": "max_length",
    "max_source_tokens max_target_tokens": "max_seq_length max_seq_len max_length model_max_length block_size "
    "cutoff_len",
    "max_source_tokens": "max_source_length max_prompt_length max_input_length",
    "max_target_tokens max_new_tokens": "max_target_length max_completion_length max_output_length",
    "source_language": "source_lang src_lang",
    "target_language": "target_lang tgt_lang forced_bos_token forced_bos_token_id",
    "template": "source_prefix instruction_template prompt_template chat_template chat_template_path",
    "map": "text_column summary_column column_names dataset_text_field input_column target_column",
    "workers": "preprocessing_num_workers dataset_num_proc num_proc num_workers",
    "overwrite": "overwrite_output_dir",
    "method=lora": "use_peft use_lora peft lora",
    "method": "peft_method",
    "lora_rank": "lora_r r rank lora_dim",
    "lora_targets": "lora_target_modules target_modules lora_target_parameters",
    "lora_variant=dora": "use_dora",
    "lora_variant=rslora": "use_rslora",
    "lora_variant": "init_lora_weights",
    "lora_embeddings": "lora_modules_to_save modules_to_save",
    "quantize=4bit": "load_in_4bit qlora",
    "quantize": "load_in_8bit use_bnb_nested_quant bnb_4bit_quant_type quantization",
    "sharding": "fsdp fsdp_config parallelism_config zero_stage",
    "rank_timeout": "ddp_timeout",
    "profile": "profiler profiling",
}
"""Our names (some with a value) → names elsewhere. Those that a command does not have are left out; of `a + b`, it
must have both."""

PREPARED = "When rows are prepared, that is decided: see diptych prepare --help,"
OTHERWISE = {
    "DeepSpeed does not run here; --sharding full (FSDP2) spreads a model over the ranks.": "deepspeed*",
    f"{PREPARED} --max_source_tokens and --max_target_tokens.": "max_seq_length max_seq_len max_length block_size "
    "model_max_length cutoff_len max_source_length max_prompt_length max_input_length max_target_length "
    "max_completion_length max_output_length",
    f"{PREPARED} --source_language and --target_language.": "source_lang src_lang target_lang tgt_lang "
    "forced_bos_token forced_bos_token_id",
    f"{PREPARED} --template.": "source_prefix instruction_template prompt_template chat_template chat_template_path",
    f"{PREPARED} --map.": "text_column summary_column column_names dataset_text_field input_column target_column",
    f"{PREPARED} under splits.": "validation_file eval_file dev_file eval_dataset dataset_test_split test_file "
    "test_data test_size validation_split_percentage val_set_size validation_split eval_split max_train_samples "
    "max_eval_samples max_predict_samples max_samples",
    "Which weights are trained is said by method, trainable and lora_targets.": "optim_target_modules",
    "Validation is greedy; `diptych evaluate` takes num_beams.": "generation_num_beams beams beam_size",
    "`diptych generate` takes any argument of transformers' generate: --generation.NAME.": "generation_config "
    "generate_kwargs top_p top_k repetition_penalty length_penalty no_repeat_ngram_size",
    "Training takes the accelerator that is there; ACCELERATE_USE_CPU=true in the environment keeps it on the CPU.": ""
    "use_cpu no_cuda gpu cuda device_map",
    "Nothing that exists is overwritten. Name a new folder: --out.": "overwrite_output_dir",
    "When training has ended: diptych publish RUN --to owner/name.": "push_to_hub* hub_*",
    "Launch the ranks with torchrun or accelerate launch -m diptych.finetune.train; nothing else is to be set.": ""
    "ddp_* local_rank num_processes num_gpus n_gpu nproc_per_node accelerator_config",
    "Rows come from the prepared tables as fast as they are needed; nothing is to be set.": "dataloader_* "
    "streaming preprocessing_num_workers dataset_num_proc num_proc num_workers overwrite_cache remove_unused_columns "
    "label_names dataset_kwargs torch_empty_cache_steps",
    "`diptych train` also evaluates on the validation split; `diptych evaluate` does it alone.": "do_train do_eval "
    "do_predict prediction_loss_only batch_eval_metrics eval_do_concat_batches eval_use_gather_object",
    "The loss is of targets alone, over all target tokens of a step and all ranks; nothing is to be set.": ""
    "assistant_only_loss completion_only_loss train_on_inputs average_tokens_across_devices",
    "A checkpoint holds all that a run needs to go on, in safetensors; nothing is to be set.": "save_only_model "
    "save_safetensors save_on_each_node enable_jit_checkpoint",
    "A run always says the same, and writes it to metrics.jsonl; nothing is to be set.": "log_level "
    "log_level_replica log_on_each_node logging_nan_inf_filter disable_tqdm skip_memory_metrics verbose "
    "include_num_input_tokens_seen include_tokens_per_second",
    "Diptych has nothing of the kind.": "use_liger_kernel liger_kernel_config loss_type use_cache "
    "activation_offloading",
    "Code in a checkpoint is never run, and what concerns the Hub is huggingface_hub's (HF_TOKEN, HF_HOME).": ""
    "trust_remote_code token use_auth_token cache_dir model_revision revision use_fast_tokenizer",
}
"""What to do if a command has no such setting."""


def other_name(name: str, settings: Mapping[str, str], before: str = "") -> str:
    """What to use in place of `name`, as a sentence; "" if it is not known. `settings` are those of a command with
    their descriptions; `before` stands before their names, such as dashes."""
    name = name.replace("-", "_").casefold()
    for ours, theirs in HERE.items():
        found = [setting for setting in ours.split() if setting.partition("=")[0] in settings]
        if len(found) > (" + " in ours) and _is_among(name, theirs):
            first = " ".join(settings[found[0].partition("=")[0]].split()).split(". ")[0].rstrip(".:")
            shown = [f"{before}{setting.replace('=', ' ')}" for setting in found]
            listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
            return f"Here it is {listed}{f': {first}' if len(found) == 1 else ''}."
    return next((sentence for sentence, theirs in OTHERWISE.items() if _is_among(name, theirs)), "")


def _is_among(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())
