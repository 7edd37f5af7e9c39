"""The tiny models that are compared with transformers: plain data, no imports beyond the standard library."""

from __future__ import annotations

from typing import Any

# "heads" is (query heads, KV heads, head dim); "config" is what config.json says beyond the common keys;
# "layers", "shards", "storage" and "seed" shape the checkpoint and are not part of config.json.
CASES: dict[str, dict[str, Any]] = {
    "llama_mha_untied": {
        "family": "llama",
        "heads": (4, 4, 16),
        "tied": False,
        "config": {"rope_theta": 10000.0},
    },
    "llama_gqa_tied_llama3": {
        "family": "llama",
        "heads": (8, 2, 32),
        "tied": True,
        "shards": 3,
        "config": {
            "rope_theta": 500000.0,
            "torch_dtype": "float32",
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    },
    "llama_mha_tied_linear": {
        "family": "llama",
        "heads": (3, 3, 24),
        "tied": True,
        "storage": "bfloat16",
        "config": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    },
    "llama_gqa_untied_yarn": {
        "family": "llama",
        "heads": (4, 2, 64),
        "tied": False,
        "config": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    },
    "llama_mqa_biases_gelu": {
        "family": "llama",
        "heads": (3, 1, 96),
        "tied": False,
        "config": {
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
            "head_dim": 96,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "mistral_gqa_untied_window": {
        "family": "mistral",
        "heads": (4, 2, 32),
        "tied": False,
        "shards": 2,
        "config": {"sliding_window": 16, "rope_theta": 10000.0, "head_dim": None},
    },
    "mistral_mha_tied": {
        "family": "mistral",
        "heads": (2, 2, 128),
        "tied": True,
        "config": {
            "sliding_window": None,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    },
    "mistral_mha_untied_window_yarn": {
        "family": "mistral",
        "heads": (4, 4, 16),
        "tied": False,
        "config": {
            "sliding_window": 40,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            },
        },
    },
    "mistral_gqa_tied_window_linear": {
        "family": "mistral",
        "heads": (4, 1, 48),
        "tied": True,
        "config": {
            "sliding_window": 24,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        },
    },
    "qwen2_gqa_tied": {
        "family": "qwen2",
        "seed": 1,
        "heads": (4, 2, 64),
        "tied": True,
        "config": {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 16},
    },
    "qwen2_mha_untied_window": {
        "family": "qwen2",
        "seed": 1,
        "heads": (2, 2, 80),
        "tied": False,
        "layers": 3,
        "config": {
            "rope_theta": 10000.0,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    },
    "qwen2_gqa_untied_yarn": {
        "family": "qwen2",
        "heads": (2, 1, 128),
        "tied": False,
        "shards": 2,
        "config": {
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.3,
            },
        },
    },
    "qwen2_mha_tied_layer_types": {
        "family": "qwen2",
        "seed": 1,
        "heads": (4, 4, 16),
        "tied": True,
        "config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    },
    "qwen3_gqa_tied": {
        "family": "qwen3",
        "heads": (4, 2, 128),
        "tied": True,
        "config": {"head_dim": 128, "rope_theta": 1000000.0},
    },
    "qwen3_mha_untied_window": {
        "family": "qwen3",
        "heads": (3, 3, 80),
        "tied": False,
        "config": {
            "head_dim": 80,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    "qwen3_gqa_untied_biases_llama3": {
        "family": "qwen3",
        "heads": (6, 2, 32),
        "tied": False,
        "shards": 2,
        "config": {
            "head_dim": 32,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "qwen3_mha_tied_yarn": {
        "family": "qwen3",
        "heads": (2, 2, 64),
        "tied": True,
        "config": {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 6.0,
                "original_max_position_embeddings": 48,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        },
    },
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
