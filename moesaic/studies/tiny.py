"""A dense model of random weights, small enough that the whole demo takes seconds."""

from __future__ import annotations

import json
import sysconfig
import tempfile
from pathlib import Path

import torch

from moesaic.model.build import build_model, init_weights, save_model
from moesaic.spec import ModelSpec

SPEC = ModelSpec(
    family="llama",
    vocab_size=512,
    hidden_dim=32,
    ffn_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    tied_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
    pad_token_id=0,
)


def tiny_folder(out: Path) -> Path:
    """Write a Llama of 2 layers, with a tokenizer trained on a few files of the standard library.

    Raises:
        FolderError: `out` is taken or cannot be written.
    """
    model = build_model(SPEC, dtype=torch.float32)
    init_weights(model, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder))
        return save_model(model, out, like=folder, dtype=torch.bfloat16)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SPEC.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("ast.py", "abc.py")]
    tokenizer.train_from_iterator(texts, trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
