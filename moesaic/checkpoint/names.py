"""Which tensor on disk is which parameter of the model: the one table between the two.

In memory the experts of a layer are stacked, (E, F, D) and (E, D, F), so that they are one
grouped product. On disk every expert is a tensor of its own, under the names of transformers
4.57, which every reader knows:

    module                          skywork, mixtral                  qwen2_moe, qwen3_moe
    block_sparse_moe.gate           block_sparse_moe.gate             mlp.gate
    block_sparse_moe.experts.w1[j]  block_sparse_moe.experts.j.w1     mlp.experts.j.gate_proj
    block_sparse_moe.experts.w3[j]  block_sparse_moe.experts.j.w3     mlp.experts.j.up_proj
    block_sparse_moe.experts.w2[j]  block_sparse_moe.experts.j.w2     mlp.experts.j.down_proj
    block_sparse_moe.shared_expert  block_sparse_moe.shared_expert    mlp.shared_expert

Everything else has Llama's names in memory and on disk.

Letters: V vocabulary, D model width, F inner width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.spec import ModelSpec, MoESpec


@dataclass(frozen=True)
class Entry:
    """One tensor on disk, and where it belongs in the model."""

    name: str
    """On disk."""

    shape: tuple[int, ...]

    param: str
    """Parameter or buffer of the model."""

    expert: int | None = None
    """The slice of `param` that this is; None where it is all of it."""


def disk_entries(spec: ModelSpec) -> list[Entry]:
    """Every tensor of a model folder, in the order in which it is written.

    A tied model has no `lm_head.weight`; a shared expert of width 0 has no tensors.
    """
    embedding = (spec.vocab_size, spec.hidden_dim)
    entries = [_same("model.embed_tokens.weight", embedding)]
    for layer in range(spec.num_layers):
        entries += _attention(spec, f"model.layers.{layer}")
        if spec.moe is not None and spec.is_moe_layer(layer):
            entries += _moe(spec, spec.moe, f"model.layers.{layer}")
        else:
            prefix = f"model.layers.{layer}.mlp"
            entries += _feed_forward(prefix, prefix, spec.hidden_dim, spec.ffn_dim)
    entries.append(_same("model.norm.weight", (spec.hidden_dim,)))
    if not spec.tied_embeddings:
        entries.append(_same("lm_head.weight", embedding))
    return entries


def _same(name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name, shape, name)


def _attention(spec: ModelSpec, layer: str) -> list[Entry]:
    entries = [_same(f"{layer}.input_layernorm.weight", (spec.hidden_dim,))]
    for part, width in (("q", spec.q_dim), ("k", spec.kv_dim), ("v", spec.kv_dim)):
        entries.append(_same(f"{layer}.self_attn.{part}_proj.weight", (width, spec.hidden_dim)))
        if spec.qkv_bias:
            entries.append(_same(f"{layer}.self_attn.{part}_proj.bias", (width,)))
    entries.append(_same(f"{layer}.self_attn.o_proj.weight", (spec.hidden_dim, spec.q_dim)))
    if spec.out_bias:
        entries.append(_same(f"{layer}.self_attn.o_proj.bias", (spec.hidden_dim,)))
    if spec.qk_norm:
        for part in ("q", "k"):
            entries.append(_same(f"{layer}.self_attn.{part}_norm.weight", (spec.head_dim,)))
    entries.append(_same(f"{layer}.post_attention_layernorm.weight", (spec.hidden_dim,)))
    return entries


def _feed_forward(name: str, param: str, hidden_dim: int, inner_dim: int) -> list[Entry]:
    shapes = {
        "gate_proj": (inner_dim, hidden_dim),
        "up_proj": (inner_dim, hidden_dim),
        "down_proj": (hidden_dim, inner_dim),
    }
    return [
        Entry(f"{name}.{part}.weight", shape, f"{param}.{part}.weight")
        for part, shape in shapes.items()
    ]


def _moe(spec: ModelSpec, moe: MoESpec, layer: str) -> list[Entry]:
    param = f"{layer}.block_sparse_moe"
    is_qwen = spec.family in ("qwen2_moe", "qwen3_moe")
    name = f"{layer}.mlp" if is_qwen else param
    w1, w3, w2 = ("gate_proj", "up_proj", "down_proj") if is_qwen else ("w1", "w3", "w2")
    inwards, outwards = (moe.expert_dim, spec.hidden_dim), (spec.hidden_dim, moe.expert_dim)

    gate = (moe.num_experts, spec.hidden_dim)
    entries = [Entry(f"{name}.gate.weight", gate, f"{param}.gate.weight")]
    if moe.selection_bias:
        bias = "gate.e_score_correction_bias"
        entries.append(Entry(f"{name}.{bias}", (moe.num_experts,), f"{param}.{bias}"))
    for expert in range(moe.num_experts):
        where = f"{name}.experts.{expert}"
        entries += [
            Entry(f"{where}.{w1}.weight", inwards, f"{param}.experts.w1", expert),
            Entry(f"{where}.{w3}.weight", inwards, f"{param}.experts.w3", expert),
            Entry(f"{where}.{w2}.weight", outwards, f"{param}.experts.w2", expert),
        ]
    if moe.shared_expert_dim:
        entries += _feed_forward(
            f"{name}.shared_expert",
            f"{param}.shared_expert",
            spec.hidden_dim,
            moe.shared_expert_dim,
        )
        part = "shared_expert_gate.weight"
        entries.append(Entry(f"{name}.{part}", (1, spec.hidden_dim), f"{param}.{part}"))
    return entries
