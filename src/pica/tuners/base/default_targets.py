"""Default target modules by model family, and the layers of some families whose weight is read past any adapter."""

from __future__ import annotations

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

_DECODER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# Mixtures of experts: the attention. (PEFT reads a LoRA on dense layers called up_proj beside the experts of many of these
# families as one on the experts, so such an adapter could not be exported.)
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LATENT = ["q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
_ENCODER = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
# the names of transformers 5 first, then those of 4: whatever a model has counts
_VISION = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", *_ENCODER]
_TOWERS = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
# of a model that also sees or hears: the language model
_LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj|down_proj)"

# The paper's choices for the families it uses (q k v up down; all six of an encoder) and their relatives; elsewhere the
# layers that PEFT adapts by default. A list covers every model of its family: an entry that a model lacks is left out.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    **dict.fromkeys(["llama", "mistral", "ministral", "ministral3", "smollm3", "granite"], _DECODER),
    **dict.fromkeys(["gemma", "gemma2", "gemma3_text", "gemma4_text", "qwen2", "qwen3"], _DECODER),
    **dict.fromkeys(["olmo", "olmo2", "olmo3", "cohere", "cohere2"], _DECODER),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "olmoe"], _ATTENTION),
    **dict.fromkeys(["llama4_text", "glm4_moe"], _ATTENTION),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3"], _LATENT),
    **dict.fromkeys(["gemma3", "gemma4", "llama4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"], _LANGUAGE),
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    **dict.fromkeys(["glm", "glm4"], ["q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj"]),
    "starcoder2": ["q_proj", "k_proj", "v_proj", "c_fc", "c_proj"],
    **dict.fromkeys(["mbart", "m2m_100", "marian", "pegasus"], ["q_proj", "v_proj"]),
    "whisper": _TOWERS,
    **dict.fromkeys(["wav2vec2", "hubert"], ["q_proj", "k_proj", "v_proj", "intermediate_dense", "output_dense"]),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "camembert", "layoutlm"], _ENCODER),
    "deberta": ["in_proj", "attention.output.dense", "intermediate.dense", "output.dense"],
    "deberta-v2": [
        "query_proj",
        "key_proj",
        "value_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    "modernbert": ["Wqkv", "Wi", "Wo"],
    "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"],
    "albert": ["query", "key", "value", "attention.dense", "ffn", "ffn_output"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    **dict.fromkeys(["vit", "deit", "dinov2", "dinov2_with_registers", "swin", "swinv2"], _VISION),
    "dinov3_vit": [*_DECODER, "o_proj"],
    **dict.fromkeys(["convnext", "convnextv2"], ["pwconv1", "pwconv2"]),
    **dict.fromkeys(["clip", "clip_text_model", "clip_vision_model"], _TOWERS),
    **dict.fromkeys(["siglip", "siglip_text_model", "siglip_vision_model"], _TOWERS),
    "sam": ["qkv", "q_proj", "k_proj", "v_proj", "lin1", "lin2"],
    # the other layers' weights are read past any adapter: see below
    **dict.fromkeys(["mamba", "mamba2", "falcon_mamba"], ["in_proj"]),
    "rwkv": ["attention.key", "attention.value", "receptance", "feed_forward.key"],
}

# {family: names of layers that its code never calls: it reads their weight, and would pass over an adapter}
UNCALLED: dict[str, frozenset[str]] = {
    **dict.fromkeys(["mamba", "falcon_mamba"], frozenset({"x_proj", "dt_proj", "out_proj", "conv1d"})),
    "jamba": frozenset({"x_proj", "dt_proj", "out_proj", "conv1d"}),
    **dict.fromkeys(["mamba2", "nemotron_h", "falcon_h1"], frozenset({"out_proj", "conv1d"})),
    "wavlm": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
}
# {family: ends of paths of layers whose weight its code changes as it goes from training to evaluation and back}
REWRITTEN: dict[str, tuple[str, ...]] = {"rwkv": ("attention.output", "feed_forward.value")}
