"""One minute model of each family that has default targets: its configuration, and an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **WIDTH,
}
GROUPED: dict[str, Any] = {**DECODER, "num_key_value_heads": 2}
HEADED: dict[str, Any] = {**GROUPED, "head_dim": 8}
EXPERTS: dict[str, Any] = {**HEADED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **DECODER,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {**WIDTH, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SWIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
CONVNEXT: dict[str, Any] = {
    "image_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_stages": 2,
    "layer_scale_init_value": 1.0,
}
MAMBA: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
SPEECH: dict[str, Any] = {
    **WIDTH,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "apply_spec_augment": False,
}
TOWER: dict[str, Any] = {**WIDTH, "intermediate_size": 48}
PAIR: dict[str, Any] = {
    "text_config": {**TOWER, "vocab_size": 64, "max_position_embeddings": 32, "eos_token_id": 2, "projection_dim": 32},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 8},
}


@dataclass(frozen=True)
class Family:
    """Settings of a model's configuration; `read` names its inputs, `louder` multiplies its initial matrices."""

    settings: dict[str, Any]
    read: str = "text"
    louder: float = 1.0


FAMILIES: dict[str, Family] = {
    # decoders
    "LlamaForCausalLM": Family(GROUPED),
    "Llama4ForCausalLM": Family(
        {
            **HEADED,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "pad_token_id": 0,
        }
    ),
    "MistralForCausalLM": Family(GROUPED),
    "Ministral3ForCausalLM": Family(HEADED),
    "MinistralForCausalLM": Family({**HEADED, "sliding_window": 4}),
    "MixtralForCausalLM": Family({**GROUPED, "num_local_experts": 2}),
    "GemmaForCausalLM": Family(HEADED),
    "Gemma2ForCausalLM": Family(HEADED),
    "Gemma3ForCausalLM": Family(HEADED),
    "Gemma4ForCausalLM": Family(
        {
            **HEADED,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    ),
    "Qwen2ForCausalLM": Family(GROUPED),
    "Qwen3ForCausalLM": Family(HEADED),
    "Qwen2MoeForCausalLM": Family({**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}),
    "Qwen3MoeForCausalLM": Family({**EXPERTS, "mlp_only_layers": [0]}),
    "SmolLM3ForCausalLM": Family(GROUPED),
    "GraniteForCausalLM": Family(GROUPED),
    "OlmoForCausalLM": Family(GROUPED),
    "Olmo2ForCausalLM": Family(GROUPED),
    "Olmo3ForCausalLM": Family(GROUPED),
    "OlmoeForCausalLM": Family({**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "CohereForCausalLM": Family(GROUPED),
    "Cohere2ForCausalLM": Family(GROUPED),
    "GlmForCausalLM": Family({**HEADED, "partial_rotary_factor": 0.5}),
    "Glm4ForCausalLM": Family({**HEADED, "partial_rotary_factor": 0.5}),
    "Glm4MoeForCausalLM": Family(
        {
            **HEADED,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        }
    ),
    "StableLmForCausalLM": Family(GROUPED),
    "Starcoder2ForCausalLM": Family(GROUPED),
    "PhiForCausalLM": Family(GROUPED),
    "Phi3ForCausalLM": Family(GROUPED),
    "PhimoeForCausalLM": Family({**GROUPED, "num_local_experts": 4}),
    "GptOssForCausalLM": Family({**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV2ForCausalLM": Family({**LATENT, "topk_method": "greedy"}),  # the other one fails in transformers 5.6
    "DeepseekV3ForCausalLM": Family(LATENT),
    "NemotronHForCausalLM": Family(
        {
            **HEADED,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 4,
        }
    ),
    "OPTForCausalLM": Family(
        {"vocab_size": 64, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32, **WIDTH}
    ),
    "BloomForCausalLM": Family({"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "FalconForCausalLM": Family({"vocab_size": 64, **WIDTH}),
    "MptForCausalLM": Family({"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}),
    "GPT2LMHeadModel": Family(GPT),
    "GPTJForCausalLM": Family({**GPT, "rotary_dim": 4}),
    "CodeGenForCausalLM": Family({**GPT, "rotary_dim": 4}),
    "GPTBigCodeForCausalLM": Family(GPT),
    "GPTNeoForCausalLM": Family(
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
        }
    ),
    "GPTNeoXForCausalLM": Family(DECODER),
    "MambaForCausalLM": Family(MAMBA),
    "Mamba2ForCausalLM": Family({**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "FalconMambaForCausalLM": Family(MAMBA),
    "RwkvForCausalLM": Family(
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "context_length": 32,
            "rescale_every": 1,
            "use_cache": False,
        }
    ),
    # encoders, and both
    "BertForMaskedLM": Family(DECODER),
    "RobertaForMaskedLM": Family({**DECODER, "max_position_embeddings": 40}),
    "XLMRobertaForMaskedLM": Family({**DECODER, "max_position_embeddings": 40}),
    "CamembertForMaskedLM": Family({**DECODER, "max_position_embeddings": 40}),
    "ElectraForMaskedLM": Family({**DECODER, "embedding_size": 32}),
    "LayoutLMForMaskedLM": Family(DECODER),
    "DebertaForMaskedLM": Family({**DECODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DebertaV2ForMaskedLM": Family(DECODER),
    "ModernBertForMaskedLM": Family({**DECODER, "cls_token_id": 1, "sep_token_id": 2}),
    "MPNetForMaskedLM": Family({**DECODER, "max_position_embeddings": 40}),
    "AlbertForMaskedLM": Family({**DECODER, "embedding_size": 16}),
    "DistilBertForMaskedLM": Family({"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "T5ForConditionalGeneration": Family(T5),
    "MT5ForConditionalGeneration": Family(T5),
    "BartForConditionalGeneration": Family(SEQ2SEQ),
    "MBartForConditionalGeneration": Family(SEQ2SEQ),
    "MarianMTModel": Family(SEQ2SEQ),
    "PegasusForConditionalGeneration": Family(SEQ2SEQ),
    "M2M100ForConditionalGeneration": Family(SEQ2SEQ),
    "WhisperForConditionalGeneration": Family(
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
        },
        "sound",
    ),
    "Wav2Vec2ForCTC": Family(SPEECH, "wave"),
    "HubertForCTC": Family(SPEECH, "wave"),
    # pictures
    "ViTForImageClassification": Family(VISION, "pictures"),
    "DeiTForImageClassification": Family(VISION, "pictures"),
    "Dinov2ForImageClassification": Family(VISION, "pictures"),
    "Dinov2WithRegistersForImageClassification": Family({**VISION, "num_register_tokens": 2}, "pictures"),
    "DINOv3ViTModel": Family({**VISION, "num_register_tokens": 2}, "pictures"),
    "SwinForImageClassification": Family(SWIN, "pictures", louder=5.0),
    "Swinv2ForImageClassification": Family(SWIN, "pictures", louder=5.0),
    "ConvNextForImageClassification": Family(CONVNEXT, "pictures", louder=5.0),
    "ConvNextV2ForImageClassification": Family(CONVNEXT, "pictures", louder=5.0),
    "CLIPModel": Family({**PAIR, "projection_dim": 32}, "pairs"),
    "SiglipModel": Family(PAIR, "pairs"),
    "SamModel": Family(
        {
            "vision_config": {
                **VISION,
                "output_channels": 16,
                "mlp_dim": 48,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 16, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
                "iou_head_depth": 2,
            },
        },
        "pictures",
        louder=8.0,
    ),
    # language models that also see
    "Gemma3ForConditionalGeneration": Family(
        {
            "text_config": HEADED,
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        }
    ),
    "Gemma4ForConditionalGeneration": Family(
        {
            "text_config": {
                **HEADED,
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            }
        }
    ),
    "Llama4ForConditionalGeneration": Family(
        {
            "text_config": {
                **HEADED,
                "num_local_experts": 2,
                "intermediate_size_mlp": 48,
                "interleave_moe_layer_step": 2,
            },
            "vision_config": {**VISION, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        }
    ),
    "Mistral3ForConditionalGeneration": Family(
        {"text_config": {**HEADED, "model_type": "mistral"}, "vision_config": {**VISION, "model_type": "pixtral"}}
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        {
            "text_config": {
                **GROUPED,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "out_hidden_size": 32,
            },
        }
    ),
    "Qwen2VLForConditionalGeneration": Family(
        {
            "text_config": {
                **GROUPED,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
        }
    ),
    "Qwen3VLForConditionalGeneration": Family(
        {
            "text_config": {
                **HEADED,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        }
    ),
    "Blip2ForConditionalGeneration": Family(
        {
            "vision_config": VISION,
            "qformer_config": {**WIDTH, "intermediate_size": 48, "vocab_size": 64, "encoder_hidden_size": 32},
            "text_config": {
                "model_type": "opt",
                "vocab_size": 64,
                "ffn_dim": 48,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 32,
                **WIDTH,
            },
            "num_query_tokens": 2,
            "image_token_index": 60,
        },
        "captions",
    ),
}
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))


def config_of(name: str) -> transformers.PreTrainedConfig:
    """The configuration of a family's minute model."""
    config = getattr(transformers, name).config_class(**FAMILIES[name].settings)
    if config.is_encoder_decoder and FAMILIES[name].read == "text":
        config.decoder_start_token_id = 0
    config.architectures = [name]
    return config


def make(name: str) -> Any:
    """The model, the same each time."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config_of(name)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= FAMILIES[name].louder
        return model


def inputs_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Arguments of a forward pass."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(2)
    read = FAMILIES[name].read
    if read == "wave":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if read == "sound":
        sound = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {"input_features": sound, "decoder_input_ids": IDS}
    pictures = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if read == "pictures":
        if name == "SamModel":
            pictures["input_points"] = 16 * torch.rand(2, 1, 2, 2, generator=generator)
        return pictures
    if read == "pairs":
        return {"input_ids": IDS, **pictures}
    if read == "captions":
        ids = IDS.clone()
        ids[:, :2] = config.image_token_index
        return {"input_ids": ids, **pictures}
    return {"input_ids": IDS, **({"decoder_input_ids": IDS.flip(1)} if config.is_encoder_decoder else {})}
