"""A tensor's layer and module, told from the names that real models have."""

from __future__ import annotations

import pytest

from expo.checkpoint.places import Place, places

MODELS = {
    "llama": {
        "model.embed_tokens.weight": (None, "embed_tokens"),
        "model.layers.0.self_attn.q_proj.weight": (0, "self_attn.q_proj"),
        "model.layers.12.mlp.down_proj.weight": (12, "mlp.down_proj"),
        "model.layers.12.input_layernorm.weight": (12, "input_layernorm"),
        "model.layers.12.self_attn.rotary_emb.inv_freq": (12, "self_attn.rotary_emb.inv_freq"),
        "model.norm.weight": (None, "norm"),
        "lm_head.weight": (None, "lm_head"),
    },
    "qwen2: weight and bias together": {
        "model.layers.3.self_attn.q_proj.weight": (3, "self_attn.q_proj"),
        "model.layers.3.self_attn.q_proj.bias": (3, "self_attn.q_proj"),
    },
    "phi-3: fused": {"model.layers.3.self_attn.qkv_proj.weight": (3, "self_attn.qkv_proj")},
    "internlm2": {
        "model.tok_embeddings.weight": (None, "tok_embeddings"),
        "model.layers.0.attention.wqkv.weight": (0, "attention.wqkv"),
        "model.layers.0.feed_forward.w1.weight": (0, "feed_forward.w1"),
        "output.weight": (None, "output"),
    },
    "gpt-2": {
        "transformer.wte.weight": (None, "wte"),
        "transformer.h.11.attn.c_attn.bias": (11, "attn.c_attn"),
        "transformer.h.11.attn.masked_bias": (11, "attn.masked_bias"),
        "transformer.ln_f.bias": (None, "ln_f"),
    },
    "gpt-2 without a prefix": {"h.0.attn.c_attn.weight": (0, "attn.c_attn"), "wte.weight": (None, "wte")},
    "gpt-neox": {
        "gpt_neox.embed_in.weight": (None, "embed_in"),
        "gpt_neox.layers.5.attention.query_key_value.weight": (5, "attention.query_key_value"),
        "embed_out.weight": (None, "embed_out"),
    },
    "opt": {
        "model.decoder.embed_positions.weight": (None, "embed_positions"),
        "model.decoder.layers.7.fc1.weight": (7, "fc1"),
        "model.decoder.final_layer_norm.bias": (None, "final_layer_norm"),
    },
    "mamba": {
        "backbone.embeddings.weight": (None, "embeddings"),
        "backbone.layers.2.mixer.A_log": (2, "mixer.A_log"),
        "backbone.layers.2.mixer.conv1d.bias": (2, "mixer.conv1d"),
        "backbone.layers.2.norm.weight": (2, "norm"),
        "backbone.norm_f.weight": (None, "norm_f"),
    },
    "mixtral: experts pooled": {
        "model.layers.1.block_sparse_moe.experts.0.w1.weight": (1, "block_sparse_moe.experts.*.w1"),
        "model.layers.1.block_sparse_moe.experts.7.w1.weight": (1, "block_sparse_moe.experts.*.w1"),
        "model.layers.1.block_sparse_moe.gate.weight": (1, "block_sparse_moe.gate"),
    },
    "experts in one tensor": {"model.layers.1.mlp.experts.gate_up_proj": (1, "mlp.experts.gate_up_proj")},
    "vision and language": {
        "model.language_model.layers.0.mlp.up_proj.weight": (0, "mlp.up_proj"),
        "model.language_model.layers.1.mlp.up_proj.weight": (1, "mlp.up_proj"),
        "model.language_model.layers.2.mlp.up_proj.weight": (2, "mlp.up_proj"),
        "model.language_model.embed_tokens.weight": (None, "embed_tokens"),
        "model.visual.blocks.1.attn.qkv.bias": (1, "model.visual.blocks.*.attn.qkv"),
        "model.visual.merger.mlp.2.weight": (2, "model.visual.merger.mlp.*"),
    },
    "encoder and decoder": {
        "decoder.block.0.layer.0.SelfAttention.q.weight": (0, "layer.*.SelfAttention.q"),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": (0, "layer.*.EncDecAttention.q"),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (0, "encoder.block.*.layer.*.SelfAttention.q"),
        "shared.weight": (None, "shared"),
    },
    "no layers": {"a.weight": (None, "a"), "b.c.bias": (None, "b.c"), "weight": (None, "weight")},
    "numbers alone": {"0.weight": (0, "*"), "2": (2, "*")},
    "numbers that are none": {"x.²": (None, "x.²"), "y.12345678.weight": (None, "y.12345678"), "z.1a": (None, "z.1a")},
    "nothing": {},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_places(model: dict[str, tuple[int | None, str]]) -> None:
    assert places(model) == {name: Place(*place) for name, place in model.items()}
    assert places(reversed(list(model))) == places(model), "the order of the names does not matter"
