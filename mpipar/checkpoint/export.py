"""The weights of a checkpoint for other programs: model.safetensors and config.json.

Under the names of mpipar the tensors are those of the checkpoint. Under those of the Hugging Face library a llama is a
LlamaForCausalLM and a gpt2 a GPT2LMHeadModel: the same numbers, renamed; those of a gpt2 transposed and put together,
since its matrices are stored [in, out] and queries, keys and values are one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mpipar.checkpoint.read import Checkpoint
from mpipar.errors import CheckpointError
from mpipar.storage import atomic_folder

Names = Literal["mpipar", "huggingface"]

_WEIGHTS = "weights/"
_LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_GPT2 = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "ln_1",
    "attention.wo": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_TRANSPOSED = ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")


def export(found: Checkpoint, out: Path, names: Names) -> int:
    """Writes the folder `out`, which appears whole or not at all. Returns the bytes of the weights.

    Args:
        found: An open checkpoint of a run.
        out: A folder that is not there yet.
        names: Whose.

    Raises:
        CheckpointError: The checkpoint is damaged, or the library has no such model; `out` cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if out.exists():
        raise CheckpointError(f"--out {out} exists: give the name of a new folder")
    weights = {name.removeprefix(_WEIGHTS): found[name] for name in found if name.startswith(_WEIGHTS)}
    model: dict[str, Any] = found.attributes["config"]["model"]
    config: dict[str, Any] = {"step": found.step, "vocab_size": found.attributes["vocab_size"], "model": model}
    if names == "huggingface":
        config = _config(model, weights)
        weights = _llama(weights) if model["family"] == "llama" else _gpt2(weights)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as partial:
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            shutil.copymode(partial / "config.json", partial / "model.safetensors")  # the library lets nobody else read
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"--out {out} cannot be written: {reason}. Make room, or choose another place") from error
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def _llama(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_renamed(name, _LLAMA, "model.layers"): tensor for name, tensor in weights.items()}


def _gpt2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".attention.wq." in name:
            qkv = torch.cat([weights[name.replace(".wq.", f".{which}.")] for which in ("wq", "wk", "wv")])
            number, kind = name.split(".")[1], name.rpartition(".")[2]
            renamed[f"transformer.h.{number}.attn.c_attn.{kind}"] = qkv.T if kind == "weight" else qkv
        elif ".attention.wk." not in name and ".attention.wv." not in name:
            new = _renamed(name, _GPT2, "transformer.h")
            renamed[new] = tensor.T if new.endswith(_TRANSPOSED) else tensor
    return renamed


def _renamed(name: str, table: Mapping[str, str], layers: str) -> str:
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        module, _, kind = name.rpartition(".")
        return f"{table[module]}.{kind}"
    return f"{layers}.{match[1]}.{table[match[2]]}.{match[3]}"


def _config(model: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The library's config.json of the same model."""
    vocab_size = weights["embedding.weight"].shape[0]
    shared = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": model["tied"],
        "torch_dtype": str(weights["embedding.weight"].dtype).removeprefix("torch."),
    }
    if model["family"] == "llama":
        return shared | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": model["dim"],
            "intermediate_size": model["ffn_dim"],
            "num_hidden_layers": model["layers"],
            "num_attention_heads": model["heads"],
            "num_key_value_heads": model["kv_heads"],
            "max_position_embeddings": model["max_seq_len"],
            "rms_norm_eps": model["norm_eps"],
            "rope_theta": model["rope_theta"],
        }
    if model["kv_heads"] != model["heads"]:
        raise CheckpointError(
            f"the Hugging Face library has no gpt2 of {model['heads']} heads and --model.kv-heads {model['kv_heads']}: "
            "give --names mpipar"
        )
    return shared | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": model["dim"],
        "n_inner": model["ffn_dim"],
        "n_layer": model["layers"],
        "n_head": model["heads"],
        "n_positions": model["max_seq_len"],
        "layer_norm_epsilon": model["norm_eps"],
    }
