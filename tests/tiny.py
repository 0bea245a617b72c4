"""Models, folders and a tokenizer so small that a test makes them anew.

`TINY` has one spec of every family. The vocabulary is the tokenizer's, so a tiny model can be
prompted with text.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moesaic.model.build import build_model, save_model
from moesaic.model.transformer import Transformer
from moesaic.spec import ModelSpec, MoESpec

VOCAB_SIZE = 300
BOS, EOS = 0, 1

LLAMA = ModelSpec(
    family="llama",
    vocab_size=VOCAB_SIZE,
    hidden_dim=32,
    ffn_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)
EVERY_LAYER = tuple(range(LLAMA.num_layers))
MOE = MoESpec(num_experts=4, top_k=2, expert_dim=24)

QWEN2 = LLAMA.replace(family="qwen2", qkv_bias=True)
QWEN3 = LLAMA.replace(family="qwen3", qk_norm=True, head_dim=12)
MIXTRAL = LLAMA.replace(family="mixtral", ffn_dim=24, moe=MOE, moe_layers=EVERY_LAYER)

TINY: dict[str, ModelSpec] = {
    "llama": LLAMA,
    "mistral": LLAMA.replace(family="mistral", sliding_window=6, sliding_layers=EVERY_LAYER),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "skywork dense": LLAMA.replace(family="skywork", num_kv_heads=4),
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2.replace(
        family="qwen2_moe",
        moe=MoESpec(num_experts=4, top_k=2, expert_dim=24, shared_expert_dim=16),
        moe_layers=EVERY_LAYER,
    ),
    "qwen3_moe": QWEN3.replace(family="qwen3_moe", moe=MOE, moe_layers=EVERY_LAYER),
    "skywork moe": LLAMA.replace(
        family="skywork",
        num_kv_heads=4,
        moe=MoESpec(num_experts=4, top_k=2, expert_dim=24, gate_norm_scale=1.0),
        moe_layers=EVERY_LAYER,
    ),
}
"""One of every family, dense first."""


def tiny_model(
    spec: ModelSpec, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A model with random weights, norms and biases among them, whose logits are of order 1."""
    model = build_model(spec, dtype=dtype).eval()
    randomize(model, seed=seed)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Give every parameter and saved buffer random values in which no term drowns."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.2 * values)
        elif "bias" in name:
            tensor.copy_(0.3 * values)
        else:
            tensor.copy_(0.2 * values)


def tiny_folder(
    path: Path,
    spec: ModelSpec,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
) -> Path:
    """A model folder with random weights, and with the tiny tokenizer unless told not to."""
    save_model(tiny_model(spec, seed=seed), path, dtype=dtype)
    if tokenizer:
        tiny_tokenizer(path)
    return path


def token_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, (B, S)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=generator)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(path: Path) -> Path:
    """Write a byte-level BPE tokenizer with a chat template, as Hugging Face files, to `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_trained_tokenizer(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [line for line in (__doc__, tiny_tokenizer.__doc__, randomize.__doc__) if line]
    tokenizer.train_from_iterator(text * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, f"{tokenizer.get_vocab_size()=}"
    return str(tokenizer.to_str())
