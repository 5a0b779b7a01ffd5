"""What PEFT's public test-suite shows users rely on, for docs/support.md: (behaviour, in PEFT, here, the test that shows it)."""

HERE = "field/test_what_peft_users_rely_on.py"

BEHAVIOURS = [
    # choosing what is adapted
    (
        "default targets by architecture",
        "`target_modules=None`",
        "every linear layer but the head, of any architecture: no table",
        f"{HERE}::test_default_targets_whatever_the_architecture",
    ),
    (
        "targets by name, suffix, regex, all linear",
        "`target_modules`",
        "`targets`",
        "adapter/test_targets.py::test_lists_regexes_and_all_linear",
    ),
    ("modules left out", "`exclude_modules`", "`exclude`", "adapter/test_targets.py::test_magnitude_only_exclude_and_overrides"),
    (
        "some layers only",
        "`layers_to_transform`",
        "`layers`, by the first index in a name",
        "adapter/test_targets.py::test_layers_as_peft_takes_them",
    ),
    (
        "ranks and alphas by module",
        "`rank_pattern`, `alpha_pattern`",
        "`rank_overrides`, `alpha_overrides`",
        "adapter/test_targets.py::test_magnitude_only_exclude_and_overrides",
    ),
    (
        "parameters that are no layer's",
        "`target_parameters`",
        "batched experts by their module's name; PEFT's folders of it are refused, not guessed at",
        "layers/test_experts.py",
    ),
    (
        "rows of an embedding",
        "`trainable_token_indices`",
        "refused: a row by itself has no direction to share; the embedding is a target (a magnitude a token) or trained whole",
        f"{HERE}::test_folders_of_peft_that_say_more_than_we_honour",
    ),
    (
        "biases",
        "`bias`, `lora_bias`",
        "refused: DoRA's magnitude and direction say nothing of a bias, and merging must not change one; "
        "`also_train` trains a module with its bias",
        f"{HERE}::test_folders_of_peft_that_say_more_than_we_honour",
    ),
    (
        "modules trained whole",
        "`modules_to_save`",
        "`also_train`, in fp32, switched with the adapter",
        "adapter/test_several.py::test_modules_that_are_trained_whole_are_switched_too",
    ),
    (
        "replicated layers",
        "`layer_replication`",
        "refused: it is another model",
        f"{HERE}::test_folders_of_peft_that_say_more_than_we_honour",
    ),
    (
        "tied weights",
        "`ensure_weight_tying`",
        "folders are read; a tied target is refused in memory: merging one would change the other",
        "adapter/test_targets.py::test_tied_quantized_and_empty_weights_are_refused",
    ),
    (
        "starts",
        "`init_lora_weights`",
        "zero, PiSSA, OLoRA, LoftQ; EVA, CorDA and LoRA-GA need data at attach and are no choice",
        "directions/test_directions.py",
    ),
    # training
    (
        "adapters in fp32 over a half-precision base",
        "`autocast_adapter_dtype`",
        "always; the output keeps the base's dtype",
        f"{HERE}::test_generation_in_half_precision_with_positional_inputs",
    ),
    (
        "gradient checkpointing, both kinds",
        "`gradient_checkpointing_enable`",
        "yes",
        "training/test_plain_trainer.py::test_gradient_checkpointing",
    ),
    ("gradients of the active adapter alone", "`set_adapter`", "yes", f"{HERE}::test_gradients_of_one_adapter_among_several"),
    ("weight decay", "Trainer", "m does not decay (PEFT's does)", "training/test_plain_trainer.py::test_m_does_not_decay"),
    (
        "LoRA+",
        "`create_loraplus_optimizer`",
        "`parameter_groups(output_factor_lr_ratio=…)`",
        "layers/test_layer.py::test_parameter_groups",
    ),
    ("TRL's trainers", "`peft_config=`", "`as_peft(model)`", "training/test_trl.py::test_step_by_step_as_peft"),
    ("several processes", "DDP", "yes", "field/test_module_names.py::test_distributed_data_parallel"),
    ("inputs as embeddings", "`inputs_embeds`", "yes", f"{HERE}::test_inputs_as_embeddings"),
    (
        "generation, positional inputs, half precision",
        "`generate`",
        "yes",
        f"{HERE}::test_generation_in_half_precision_with_positional_inputs",
    ),
    # merging
    (
        "merge and unmerge",
        "`merge_adapter`",
        "bit for bit back (PEFT's rounds)",
        "layers/test_layer.py::test_merge_and_unmerge_a_thousand_times",
    ),
    (
        "merge that would not be finite",
        "`safe_merge=True`",
        "always refused, nothing changed",
        "layers/test_layer.py::test_merge_refuses_nan_before_it_changes_anything",
    ),
    (
        "a second merge",
        "`merge_adapter` twice",
        "refused: it is merged already (PEFT warns)",
        f"{HERE}::test_merged_twice_disabled_or_loaded_over_while_merged",
    ),
    (
        "disable, switch or load while merged",
        "`disable_adapter`",
        "refused: unmerge first (PEFT unmerges)",
        f"{HERE}::test_merged_twice_disabled_or_loaded_over_while_merged",
    ),
    (
        "save while merged",
        "`save_pretrained`",
        "`doratune.save` writes the adapter, `save_pretrained` the merged model",
        "field/test_usual_saving.py::test_after_merge_it_writes_the_merged_weights_and_after_unmerge_the_adapter",
    ),
    (
        "merge and unload, then a new adapter",
        "`merge_and_unload`",
        '`merge(keep="none")`, then as any model',
        "adapter/test_merge_and_go_on.py::test_a_second_adapter_over_the_merged_weights",
    ),
    ("unload", "`unload`", "`detach`: the same tensors", "adapter/test_several.py::test_requires_grad_and_the_base_come_back"),
    ("merged quantized layers", "`merge_and_unload`", "dense, or quantized again", "bases/test_bases.py"),
    # several adapters
    (
        "adapters by name, added later",
        "`add_adapter`, `load_adapter`",
        "`attach`, `load` with `name`",
        "adapter/test_several.py::test_each_adapter_is_as_if_it_were_alone",
    ),
    (
        "switch, delete",
        "`set_adapter`, `delete_adapter`",
        "`use`, `delete`",
        "adapter/test_several.py::test_training_one_leaves_the_others_as_they_were",
    ),
    (
        "several active at once",
        "`set_adapter([…])`",
        "refused: norms do not add up; `combine` makes one of them",
        "training/test_peft_view.py::test_what_is_refused",
    ),
    (
        "weighted sums",
        "`add_weighted_adapter`",
        "`combine` by one norm; no svd, ties, dare: they are rules for LoRA without a norm",
        "adapter/test_several.py::test_a_sum_is_the_rule_of_one_norm",
    ),
    (
        "disable in a block",
        "`disable_adapter`",
        "`disabled`: the base bit for bit, by thread",
        "adapter/test_several.py::test_disabled_is_the_base_bit_for_bit_and_nests",
    ),
    (
        "mixed batches",
        "`adapter_names`",
        "`mixed`; the argument through `as_peft`",
        "training/test_peft_view.py::test_mixed_batches_by_peft_s_argument",
    ),
    (
        "hot swap",
        "`hotswap_adapter`",
        "`use`, compiled or not; other ranks and targets too",
        f"{HERE}::test_an_adapter_swapped_under_a_compiled_model",
    ),
    (
        "kinds side by side",
        "`PeftMixedModel`",
        "kinds by adapter, by example in a batch; not two kinds in one layer at once",
        "adapter/test_several.py::test_mixed_batches_equal_single_runs",
    ),
    (
        "a prompt and an adapter",
        "PromptTuning, PrefixTuning, PTuning over it",
        "refused: they freeze and do not save it",
        "field/test_foreign_adapters.py::test_prompts_over_ours",
    ),
    # files
    ("folders of PEFT, both ways", "`from_pretrained`", "`load`, `save`", "checkpoint/test_peft_format.py::test_theirs_in_ours"),
    ("auto classes on an adapter folder", "`AutoPeftModel…`", "yes", f"{HERE}::test_our_folder_in_peft_s_auto_classes"),
    ("chosen adapters only", "`selected_adapters`", "through `as_peft`", "training/test_peft_view.py::test_folders"),
    (
        "safetensors or pickle",
        "`safe_serialization`",
        "safetensors alone; a pickle is refused",
        "checkpoint/test_peft_format.py::test_broken_files",
    ),
    (
        "embeddings with a resized vocabulary",
        "`save_embedding_layers`",
        "trained whole and saved, by themselves",
        "field/test_numbers_in_no_file.py::test_a_resized_vocabulary_is_saved_whole",
    ),
    (
        "tensors that do not fit",
        "`ignore_mismatched_sizes`",
        "refused, all named: what is ignored is lost",
        "checkpoint/test_peft_format.py::test_all_mismatches_in_one_message",
    ),
    (
        "weights on the meta device",
        "`low_cpu_mem_usage`",
        "refused: m starts at the weights' norms",
        f"{HERE}::test_a_model_that_is_still_on_the_meta_device",
    ),
    ("copies and pickles of a model", "`copy.deepcopy`", "yes", "adapter/test_several.py::test_copies_have_all_adapters"),
    (
        "torch.compile",
        "`torch.compile`",
        "in one graph, training and inference",
        "layers/test_layer.py::test_compiled_model_gives_the_same",
    ),
    ("what is adapted", "`get_layer_status`", "`inspect`, `verify`", "adapter/test_inspect.py"),
    (
        "hooks of accelerate",
        "`device_map`",
        "hooks are kept",
        "layers/test_layer.py::test_accelerate_hooks_run_the_adapter",
    ),
]


def section() -> list[str]:
    """The table of docs/support.md."""
    lines = [
        "",
        "## What PEFT's users rely on",
        "",
        "Behaviour by behaviour, as PEFT's public test-suite shows them; the test is in `tests/`.",
        "",
        "| behaviour | in PEFT | here | shown by |",
        "|---|---|---|---|",
    ]
    return [*lines, *(f"| {behaviour} | {call} | {here} | `{test}` |" for behaviour, call, here, test in BEHAVIOURS)]
