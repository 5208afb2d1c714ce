"""Tiny models and LoRA adapters as transformers and PEFT save them, and what PEFT merges of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from expo.checkpoint.folder import TensorInfo

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


def llama(*, tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2, tie_word_embeddings=tied))


def tied_llama() -> nn.Module:
    return llama(tied=True)


def wide_llama() -> nn.Module:
    """Its heads have as many dimensions as vLLM computes with on a CPU."""
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS, num_key_value_heads=1, tie_word_embeddings=False))


def qwen() -> nn.Module:
    """Its attention has biases."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **TOKENS, num_key_value_heads=2, tie_word_embeddings=False))


def gpt2() -> nn.Module:
    """Its Conv1D layers store weights as [in, out], some of them square; its head is tied."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **TOKENS))


def untied_gpt2() -> nn.Module:
    """Its head, beside Conv1D layers, stores weights as [out, in]."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False, **TOKENS)
    return GPT2LMHeadModel(config)


def save_base(make: Callable[[], nn.Module], dtype: torch.dtype, folder: Path) -> Path:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases too
    model.to(dtype).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Give a base an adapter of random values, as if it were trained."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """θ_dpo in float64."""
    model = AutoModelForCausalLM.from_pretrained(base).double()
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload().state_dict()


PLAIN = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
PATTERNS = {
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 3},
    "alpha_pattern": {r"model.layers.\d.mlp.down_proj": 5, "q_proj": 7, "layers.1.self_attn.q_proj": 11},
}
CASES = {
    "plain": (llama, PLAIN),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "biases beside it": (qwen, {"target_modules": "all-linear"}),
    "rank-stabilised": (llama, {**PLAIN, "use_rslora": True}),
    "patterns": (llama, {**PLAIN, **PATTERNS}),
    "patterns, rank-stabilised": (llama, {**PLAIN, **PATTERNS, "use_rslora": True}),
    "layers": (llama, {**PLAIN, "layers_to_transform": [1]}),
    "saved modules": (llama, {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved module of modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "trained biases": (qwen, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": (qwen, {"target_modules": ["q_proj"], "bias": "all"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "v_proj"]}),
    "fan-in fan-out": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "fan-in fan-out, all linear": (gpt2, {"target_modules": "all-linear", "use_rslora": True}),
    "fan-in fan-out, but for the head": (untied_gpt2, {"target_modules": ["c_attn", "attn.c_proj", "lm_head"]}),
    "tied base": (tied_llama, {"target_modules": "all-linear"}),
}

TOUCHING_ONE = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
"""Adapters to a tied embedding or its head."""

Case = tuple[Callable[[], nn.Module], dict[str, object]]


def values(info: TensorInfo) -> Tensor:
    with safe_open(info.file, "pt") as file:
        return file.get_tensor(info.name)


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class Maker:
    """Makes a case's base and its adapter, each once; they are not to be changed.

    Args:
        folder: Gives a new folder for a name.
    """

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._made: dict[tuple[object, ...], Path] = {}
        self._merged: dict[Path, dict[str, Tensor]] = {}

    def __call__(self, case: Case, dtype: torch.dtype) -> tuple[Path, Path]:
        build, options = case
        base = self._once((build, dtype), lambda: save_base(build, dtype, self._folder("base")))
        return base, self._once((build, dtype, repr(options)), lambda: self._adapter(base, options, dtype))

    def _adapter(self, base: Path, options: dict[str, object], dtype: torch.dtype) -> Path:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
        return save_adapter(base, self._folder("adapter"), config, dtype)

    def _once(self, key: tuple[object, ...], make: Callable[[], Path]) -> Path:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def merged(self, pair: tuple[Path, Path]) -> dict[str, Tensor]:
        """θ_dpo in float64, as PEFT merges it."""
        if pair[1] not in self._merged:
            self._merged[pair[1]] = merged_by_peft(*pair)
        return self._merged[pair[1]]
