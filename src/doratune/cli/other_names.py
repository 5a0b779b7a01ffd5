"""What PEFT, transformers' Trainer, TRL, Unsloth, LLaMA-Factory, axolotl and torchtune call settings that have another name here.

Read by the message about an unknown setting alone: their names lie too far from ours for a near miss (`learning_rate` and `lr`).
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import near_misses

OURS = {
    "model": "model_name_or_path model_name base_model pretrained_model_name_or_path tokenizer_name_or_path hf_model",
    "data": "dataset datasets dataset_name dataset_path data_path train_file train_data train_dataset",
    "eval_data": "eval_dataset validation_file val_data test_datasets eval_file",
    "eval_size": "val_size val_set_size validation_split test_size",
    "output": "output_dir out_dir save_dir output_path",
    "lr": "learning_rate lr_rate",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size per_device_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps grad_accum grad_accumulation_steps",
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target lora_target_modules lora_target_linear",
    "exclude": "exclude_modules",
    "also_train": "modules_to_save additional_target lora_modules_to_save",
    "layers": "layers_to_transform",
    "method": "use_dora peft_use_dora finetuning_type peft_type",
    "rank_scaling": "use_rslora peft_use_rslora",
    "start": "init_lora_weights peft_init_lora_weights",
    "rank_overrides": "rank_pattern",
    "alpha_overrides": "alpha_pattern",
    "output_factor_lr_ratio": "loraplus_lr_ratio",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len model_max_length block_size",
    "prompt": "template chat_template prompt_template",
    "packing": "sample_packing pack",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup_steps": "warmup_ratio warmup",
    "optimizer": "optim",
    "max_grad_norm": "gradient_clipping clip_grad_norm grad_clip",
    "log_steps": "logging_steps log_every_n_steps",
    "eval_steps": "evals_per_epoch eval_strategy evaluation_strategy",
    "save_steps": "saves_per_epoch save_strategy",
    "keep_checkpoints": "save_total_limit",
    "best_by": "metric_for_best_model load_best_model_at_end",
    "early_stopping": "early_stopping_patience",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir force",
    "quantize": "load_in_4bit load_in_8bit quantization_bit",
    "double_quantization": "bnb_4bit_use_double_quant",
    "dtype": "bf16 fp16 torch_dtype pure_bf16 precision",
    "checkpointing": "gradient_checkpointing use_gradient_checkpointing enable_activation_checkpointing",
    "workers": "dataloader_num_workers num_workers preprocessing_num_workers",
    "adapter": "adapter_name_or_path lora_path peft_model adapter_path lora",
    "max_new_tokens": "max_tokens new_tokens max_length",
    "task": "tasks task_name benchmark",
    "to": "format target_format",
    "type": "outtype quantization quantization_method",
}
"""Our name: theirs."""


def instead(name: str, known: Iterable[str]) -> str:
    """What may be meant by a name that is no setting: `"; learning_rate is lr here"`, or its near misses among those known."""
    known = set(known)
    ours = [our for our, theirs in OURS.items() if our in known and name in theirs.split()]
    return f"; {name} is {ours[0]} here" if ours else near_misses(name, known)
