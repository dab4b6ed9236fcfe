"""What is not run of PEFT's tests, and why. The driver prints this, and writes it into docs/peft-tests.md."""

from __future__ import annotations

_UNKNOWN_FIELDS = "expects unknown fields of a configuration to be dropped; PiCa refuses an adapter that it may misread"
_HUB = "loads an adapter or a data set from the Hub"
_PROMPT = "a prompt-learning method"
_LORA_NAMES = "asserts LoRA's class names or parameter counts"
_EMBEDDING = (
    "expects a TypeError where PiCa refuses with a ConfigError (an embedding as a target that has trainable tokens too)"
)
_OTHER_BASE = "loads an adapter onto a base model with other random weights, which PiCa refuses (basis fingerprint)"
_GPU = "needs a GPU or a quantisation library"

# Tests that would otherwise be run: a pattern of "file::test", and the reason.
EXCLUSIONS: dict[str, str] = {
    "*::test_training*layer_indexing[[]* shared-*": (
        "counts parameter tensors, of which one layer has as many as all layers that share theirs; run with share='none'"
    ),
    "test_stablediffusion.py::*::test_load_model_low_cpu_mem_usage*": (
        "injects an adapter a second time under the same name and expects new parameters; PiCa keeps the parameter objects"
    ),
    "test_custom_models.py::*::test_load_does_not_overwrite_similarly_named_sibling": _OTHER_BASE,
    "test_custom_models.py::*::test_ignore_mismatched_sizes_with_scalar_modules_to_save": _OTHER_BASE,
    "test_custom_models.py::*::test_loading_model_*requires_grad_set_correctly*": _OTHER_BASE,
    "test_low_level_api.py::*::test_set_peft_model_state_dict_preserves_input": _OTHER_BASE,
    "test_low_level_api.py::*::test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name": (
        "expects a target module's name in every key of the file; PiCa's fingerprint belongs to all of them"
    ),
    "test_config.py::*::test_from_pretrained[[]*": _HUB,
    "test_config.py::*::test_from_json_file*": _UNKNOWN_FIELDS,
    "test_config.py::*::test_from_pretrained_forward_compatible*": _UNKNOWN_FIELDS,
    "test_config.py::*::test_from_pretrained_sanity_check*": _UNKNOWN_FIELDS,
    "test_config.py::*::test_from_pretrained_cache_dir*": _HUB,
    "test_config.py::*::test_save_pretrained_with_runtime_config*": _HUB,
    "test_tuners_utils.py::*::test_module_type_small": _LORA_NAMES,
    "test_tuners_utils.py::*::test_adapter_model_type_small": _LORA_NAMES,
    "test_tuners_utils.py::*::test_peft_types_small": _LORA_NAMES,
    "test_tuners_utils.py::*::test_nb_params_small": _LORA_NAMES,
    "test_other.py::*::test_targeting_trainable_tokens_raises": _EMBEDDING,
    "test_lora_conversion.py::*::test_model_with_unsupported_layers_raises": (
        "a convolution with a kernel larger than 1 as a target, which PiCa refuses from the start"
    ),
    "test_lora_conversion.py::*::test_targeted_modules_identical*": "looks for parameters called lokr",
    "test_lora_conversion.py::*::test_converted_lora_with_multiple_adapters": (
        "cuts random weights of rank 16 to rank 8 and bounds the error for LoKr's (0.1; PiCa's flat spectrum gives 0.11)"
    ),
    "test_lora_conversion.py::*::test_convert_float16_dtype*": (
        "expects half precision; PiCa's update is float32 or better, so that a merge or an export rounds once"
    ),
}

_FULL_RANK = (
    "converts at a low rank and bounds the error; SVFT's update has full rank, tests/tuners/svft converts it at that"
)

# Of tests that fit PiCa, those that do not fit SVFT.
SVFT_EXCLUSIONS: dict[str, str] = {
    "*::test_lora_conversion[[]SVFT*": _FULL_RANK,
    "test_lora_conversion.py::*::test_converting_transformers_model_works": _FULL_RANK,
    "test_lora_conversion.py::*::test_converted_lora_approximates_original_adapter": _FULL_RANK,
    "test_lora_conversion.py::*::test_model_without_peft_config": _FULL_RANK,
    "test_initialization.py::*::test_unmatched_rank_pattern_key_warns": "SVFT has no ranks",
}

# Whole files. The driver fails on a test file that neither this table nor `cases.FILES` knows.
OTHER_FILES: dict[str, str] = {
    "test_adamss_asa.py": "AdaMSS",
    "test_adaption_prompt.py": "Adaption Prompt",
    "test_arrow.py": "Arrow routing of LoRA adapters",
    "test_auto.py": _HUB + "; AutoPeftModel* is in tests/tuners/pica/test_peft_integration.py",
    "test_bdlora.py": "BD-LoRA",
    "test_boft.py": "BOFT",
    "test_bufferdict.py": "a container class of PEFT",
    "test_cartridge.py": _PROMPT,
    "test_common_gpu.py": _GPU,
    "test_cpt.py": _PROMPT,
    "test_deft.py": "DEFT",
    "test_frod.py": "FRoD",
    "test_gptqmodel.py": _GPU,
    "test_gpu_examples.py": _GPU,
    "test_helpers.py": "helpers of LoRA (scaling, DoRA caching, input casts) or of no method",
    "test_incremental_pca.py": "a numerical routine of LoRA's EVA initialisation",
    "test_integrations.py": "helpers of no method, and conversion of LoRA files between transformers versions",
    "test_lora_ga.py": "LoRA-GA",
    "test_lora_intruders.py": "a LoRA utility",
    "test_lora_megatron.py": "Megatron layers, LoRA only",
    "test_lora_variants.py": "LoRA variants",
    "test_lorafa.py": "the LoRA-FA optimizer",
    "test_loraplus.py": "the LoRA+ optimizer",
    "test_mixed.py": "PeftMixedModel, whose methods PEFT lists by name",
    "test_multitask_prompt_tuning.py": _PROMPT,
    "test_osf.py": "OSF",
    "test_poly.py": "Poly",
    "test_pvera.py": "PVeRA",
    "test_quantization.py": _GPU,
    "test_randlora.py": "RandLora",
    "test_riemannian_lora.py": "an optimizer for LoRA",
    "test_shadow.py": "ShadowPEFT",
    "test_shira.py": "SHiRA",
    "test_supertuning.py": "Supertuning",
    "test_target_parameters.py": "LoRA on bare parameters, by its class names; PiCa's: tests/tuners/pica/test_experts.py",
    "test_torch_compile.py": _HUB + "; compilation is in tests/tuners/pica/test_peft_integration.py",
    "test_unilora.py": "UniLoRA",
    "test_vblora.py": "VB-LoRA",
    "test_velora.py": "VeLoRA",
    "test_vera.py": "VeRA",
    "test_vision_models.py": "convolutional models, and data from the Hub",
    "test_xlora.py": "X-LoRA",
}
