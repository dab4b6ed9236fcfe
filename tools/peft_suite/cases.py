"""Which tests of each of PEFT's files are run, and which of their tables hold the method's rows.

A test runs when its parameters hold the method's configuration (PEFT's tables, filled from `rows`), or when it is named
in `lora_tests`: tests that take LoRA (in one file LoKr) as an example of any method; the method is put in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from .rows import ROWS, language


@dataclass(frozen=True)
class FilePlan:
    """What to run of one test file.

    Attributes:
        rest: Why its other tests are not run.
        tables: Rows for its module-level tables, by name.
        inline: Rows for the tables written inside a decorator, by test name.
        lora_tests: Patterns of tests in which PiCa stands in for `example`.
        example: The configuration class that those tests use.
        quick: Whether `--quick` runs it.
    """

    rest: str
    tables: dict[str, list] = field(default_factory=dict)
    inline: dict[str, list] = field(default_factory=dict)
    lora_tests: tuple[str, ...] = ()
    example: str = "LoraConfig"
    quick: bool = False


_OTHER_METHOD = "tests of LoRA or of another method by name: their parameters, options or initialisations"

FILES: dict[str, FilePlan] = {
    "test_custom_models.py": FilePlan(
        rest=_OTHER_METHOD,
        tables={
            "TEST_CASES": ROWS.custom_models,
            "ALL_PEFT_CONFIG_CLASSES": [ROWS.config],
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": ROWS.several_active,
            "MIXED_ADAPTER_TEST_CASES": ROWS.mixed_batches,
        },
        lora_tests=(
            "*::test_add_adapter_rejects_duplicate_name_without_mutation[[]False[]]",
            "*::test_set_adapter_non_overlapping_trainable_token_indices",
            "*::test_multiple_active_adapters_with_*_trainable_token_indices_*",
            "*::test_delete_adapter_with_multiple_adapters_works",
            "*::test_delete_adapter_multiple_adapters_with_*",
            "*::test_weight_bias_attributes",
            "*::test_multiple_adapters_no_needless_copy_modules_to_save",
            "*::test_existing_model_card",
            "*::test_non_existing_model_card",
            "*::test_save_embedding_layers_excludes_similarly_named_sibling*",
            "*::test_load_does_not_overwrite_similarly_named_sibling",
            "*::test_ignore_mismatched_sizes_with_scalar_modules_to_save",
            "TestMixedAdapterBatches::test_mixed_adapter_batches_l*_mismatch_raises",
            "TestMixedAdapterBatches::test_mixed_adapter_batches_training_mode_raises",
            "TestMixedAdapterBatches::test_mixed_adapter_batches_disabled",
        ),
        quick=True,
    ),
    "test_decoder_models.py": FilePlan(rest=_OTHER_METHOD, tables={"ALL_CONFIGS": language("CAUSAL_LM")}, quick=True),
    "test_encoder_decoder_models.py": FilePlan(
        rest=_OTHER_METHOD,
        tables={"ALL_CONFIGS": language("SEQ_2_SEQ_LM")},
        lora_tests=("*::test_load_model_low_cpu_mem_usage", "*::test_save_shared_tensors"),
    ),
    "test_feature_extraction_models.py": FilePlan(
        rest=_OTHER_METHOD, tables={"ALL_CONFIGS": language("FEATURE_EXTRACTION")}
    ),
    "test_seq_classifier.py": FilePlan(rest=_OTHER_METHOD, tables={"ALL_CONFIGS": language("SEQ_CLS")}),
    "test_token_classification_qa.py": FilePlan(
        rest=_OTHER_METHOD,
        tables={"TOKEN_CLS_CONFIGS": language("TOKEN_CLS"), "QA_CONFIGS": language("QUESTION_ANS")},
    ),
    "test_stablediffusion.py": FilePlan(rest=_OTHER_METHOD, tables={"DIFFUSERS_CONFIGS": ROWS.diffusion}),
    "test_config.py": FilePlan(
        rest=_OTHER_METHOD,
        tables={
            "ALL_CONFIG_CLASSES": [pytest.param(ROWS.config, {}, id=ROWS.name)],
            "LAYER_INDEXING_CONFIG_CLASSES": [pytest.param(ROWS.config, {}, id=ROWS.name)],
        },
        inline={"test_save_pretrained_with_target_modules": [ROWS.config]},
        quick=True,
    ),
    "test_low_level_api.py": FilePlan(
        rest="LoRA's parameter names; injection driven by the keys of a LoRA file, which PiCa does from the configuration",
        lora_tests=(
            "TestPeftStateDict::test_get_*",
            "TestPeftStateDict::test_trained_modules_to_save_*",
            "TestPeftStateDict::test_set_peft_model_state_dict_preserves_input",
            "TestGetBaseModelStateDict::*",
            "TestInjectAdapterFromStateDict::test_inject_from_state_dict_compiled_model*",
            "TestStateDictFsdpShapeValidation::test_save_pretrained_succeeds_for_normal_lora",
        ),
        quick=True,
    ),
    "test_tuners_utils.py": FilePlan(
        rest="LoRA's class and parameter names, alpha_pattern, target_parameters, or an embedding as a target",
        lora_tests=(
            "TestPeftCustomKwargs::test_regex_matching_valid_*",
            "TestPeftCustomKwargs::test_maybe_include_all_linear_layers_lora_[0-9]_*",
            "TestPeftCustomKwargs::test_maybe_include_all_linear_layers_internals_*",
            "TestPeftCustomKwargs::test_all_linear_nested_targets_correct_layers_*",
            "TestTargetedModuleNames::test_*_targeted_module_*",
            "TestTargetedModuleNames::test_layers_to_transform_filters_by_layer_not_expert_index*",
            "TestExcludedModuleNames::test_t*",
            "TestExcludedModuleNames::test_multiple_excluded_modules_list",
            "TestExcludedModuleNames::test_all_modules_excluded",
            "TestExcludedModuleNames::test_no_modules_matched*",
            "TestExcludedModuleNames::test_exclude_modules_not_used",
            "TestModelAndLayerStatus::test_*_small",
            "TestModelAndLayerStatus::test_with_*",
            "TestModelAndLayerStatus::test_*_irregular_with_*",
            "TestModelAndLayerStatus::test_*_with_*_irregular",
            "TestModelAndLayerStatus::test_quantization_backend_irregular",
            "TestModelAndLayerStatus::test_model_quantization_backend_irregular",
            "TestBaseTunerWarnForTiedEmbeddings::*",
            "TestFindMinimalTargetModules::test_get_peft_modules_module_name_is_suffix_of_another_module",
            "TestTunerStateDictKeyPrefixes::test_prefixes_*_not_included",
        ),
        quick=True,
    ),
    "test_other.py": FilePlan(
        rest="no adapter of the method under test involved",
        inline={
            "test_self_targeting_is_ignored": [
                pytest.param(ROWS.config, {"target_modules": "l1.*"}, id=ROWS.name),
                pytest.param(ROWS.config, {"target_modules": f"(l1|{ROWS.bank}).*"}, id=f"{ROWS.name} and its bank"),
            ]
        },
        lora_tests=(
            "test_modules_to_save_targets_module_dict_raises*",
            "test_load_multiple_adapters_different_modules_to_save",
            "TestModulesToSave*",
            "TestTargetingAuxiliaryTrainingWrapper::*",
            "TestGetModuleNamesTiedWithEmbedding::test_get_modules_tied_to_embedding_peft*",
        ),
    ),
    "test_lora_conversion.py": FilePlan(
        rest="conversion of other methods", lora_tests=("TestLoraConversion::*",), example="LoKrConfig"
    ),
    "test_mapping.py": FilePlan(rest="", lora_tests=("*",)),
    "test_trainable_tokens.py": FilePlan(
        rest="trainable tokens as a method of its own, or LoRA's ensure_weight_tying",
        lora_tests=(
            "*::test_multiple_adapters_*",
            "*::test_original_module_not_in_state_dict",
            "*::test_default_embedding_name_is_inferred_combined*",
            "*::test_embedding_name_is_used_when_given_combined",
            "*::test_scaled_embedding_with_lora",
        ),
    ),
    "test_hub_features.py": FilePlan(
        rest="revisions and files on the Hub; LoRA's tag on model cards",
        lora_tests=("*::test_from_config_model_saving_skips_empty_name_or_path",),
    ),
    "test_initialization.py": FilePlan(
        rest="LoRA's and other methods' initialisations and variants; hot-swapping, which PEFT offers for LoRA only",
        lora_tests=(
            "*::test_trainable_token_indices_targets_head_and_embedding",
            "*::test_multiple_configs_with_bias_raises",
            "*::test_unmatched_rank_pattern_key_warns",
            "TestCustomModelConfigWarning::*",
            "TestLowCpuMemUsage::test_from_pretrained_low_cpu_mem_usage_works*",
            "TestNamingConflictWarning::*",
            "TestLoadPeftKeyMapping::test_key_mapping_save_new_load_new_lora",
        ),
    ),
}
