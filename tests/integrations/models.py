"""Small models of transformers with random weights, made from their config classes."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
_TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
_KIMI = {
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16},
    **{"num_local_experts": 4, "num_experts_per_tok": 2},
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        _WIDTHS | _ATTENTION | _TWO_LAYERS | _DELTA,
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _WIDTHS
        | _ATTENTION
        | _TWO_LAYERS
        | _DELTA
        | _EXPERTS
        | {"shared_expert_intermediate_size": 16},
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        _WIDTHS
        | _TWO_LAYERS
        | _DELTA
        | {"num_attention_heads": 2, "linear_num_value_heads": 2, "linear_num_key_heads": 2},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        _WIDTHS
        | _TWO_LAYERS
        | _KIMI
        | {"linear_head_dim": 16, "linear_num_heads": 2, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2}),
    "falcon_mamba": (
        "FalconMambaConfig",
        "FalconMambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2},
    ),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        _WIDTHS
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    ),
    "zamba": (
        "ZambaConfig",
        "ZambaForCausalLM",
        _WIDTHS
        | {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}
        | {"n_groups": 2, "state_size": 16, "chunk_size": 8},
    ),
    "bamba": (
        "BambaConfig",
        "BambaForCausalLM",
        _WIDTHS | _MAMBA_2 | _ATTENTION | {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    ),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        _WIDTHS | _MAMBA_2 | _ATTENTION | {"num_hidden_layers": 2, "mamba_d_ssm": 64},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _WIDTHS
        | _MAMBA_2
        | {"num_attention_heads": 2, "num_key_value_heads": 1}
        | {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
        | {"num_local_experts": 2, "shared_intermediate_size": 16},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _WIDTHS
        | _ATTENTION
        | {"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8}
        | {"mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8},
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        _WIDTHS
        | {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 8}
        | {"mamba_headdim": 8, "mamba_ngroups": 2, "mamba_d_state": 16, "chunk_size": 8},
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        _WIDTHS
        | {"num_attention_heads": 2, "num_key_value_heads": 1}
        | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    ),
}
"""Config class, model class and settings by the name of the model's folder in transformers."""


def make_model(name: str, **settings: Any) -> Any:
    """A model of a folder of transformers, with weights whose size makes differences show."""
    config_name, model_name, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**(_TOKENS | sizes | settings))
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()
