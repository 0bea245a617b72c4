"""Run a dense model and the MoE made of it on real text, and say how far apart they are.

Both models are read from their folders and run side by side, layer by layer. Attention is
held one layer at a time, everything else one slice of a matrix at a time, so the memory
needed is that of one attention layer plus activations, whatever the model's size. Routing
is computed by the model's own router and every chosen expert is read from its own place on
disk: nothing presumes that experts are equal.

What is looked for is a difference between the models, not between two orders of adding up the
same numbers. In float32 that alone can exceed 1e-4 in a logit: SmolLM2 has activations of
25,000, whose last bit is 0.002. So both models' feed-forward products are computed over
blocks of as many rows, in which a row's result does not depend on the rows around it, and
gates sum to 1 in float64, as they do in the model at inference.

Shapes.
    B rows of text    S tokens in a row    T tokens (B S)    D model width    F inner width
    V vocabulary      K experts per token  f, v slices of F and V             t a block of tokens
"""

from __future__ import annotations

import hashlib
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.checkpoint.folder import WeightReader, read_spec
from moesaic.checkpoint.names import disk_entries
from moesaic.console import track
from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import DataError
from moesaic.model.attention import Attention, attention_mask
from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rope_tables
from moesaic.moe.router import Router, sum_to_one
from moesaic.spec import ModelSpec
from moesaic.version import __version__

EXACT_LIMIT = 1e-4
"""Largest difference of any float32 logit up to which the two models are called equal;
below it is rounding."""

_ROW_TOKENS = 512
_SLICE_BYTES = 64 << 20
_BLOCK_ROWS = 64


@torch.no_grad()
def prove(
    dense: Path,
    moe: Path,
    *,
    text: Path | None = None,
    tokens: int = 512,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Measure how far the MoE in folder `moe` is from the dense model it was made of.

    Args:
        dense: Folder of the dense model; its tokenizer cuts the text. Without one, the bytes
            of the text, modulo the vocabulary, are the tokens.
        moe: Folder of the MoE.
        text: UTF-8 text file; None takes the source of Python's standard library.
        tokens: How many tokens to run, in equal rows of at most 512; a shorter text is run whole.
        dtype: To compute in, float32 or float64.

    Returns:
        What proof.json holds, see docs/upcycling.md, less what only `upcycle` knows.

    Raises:
        DataError: The text cannot be read or is too short.
        FolderError: A folder is missing or damaged.
    """
    start = time.perf_counter()
    sample, source = _read_text(text, characters=16 * tokens)
    ids, tokenizer = _tokens_of(sample, dense, read_spec(dense).vocab_size)
    ids_BS = _in_rows(ids[:tokens], source)
    with WeightReader(dense) as dense_reader, WeightReader(moe) as moe_reader:
        pair = (
            _StreamedModel(dense_reader, read_spec(dense), dtype),
            _StreamedModel(moe_reader, read_spec(moe), dtype),
        )
        layers = _run_layers(pair, ids_BS)
        logits = _compare_logits(pair)
    exact = logits["largest_difference"] <= EXACT_LIMIT
    return {
        "verdict": "exact" if exact else "differs",
        "exact_limit": EXACT_LIMIT,
        "logits": logits,
        "layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
        "text": {
            "source": source,
            "sha256": hashlib.sha256(sample.encode()).hexdigest(),
            "tokenizer": tokenizer,
            "tokens": ids_BS.numel(),
            "row_tokens": ids_BS.shape[1],
        },
        "moesaic": __version__,
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
    }


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the config, weight and tokenizer files in `folder`, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt"):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


class _StreamedModel:
    """A model on disk whose layers are computed one after another, with its activations."""

    def __init__(self, reader: WeightReader, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.dtype = dtype
        self.x_BSD = torch.empty(0)
        self._reader = reader
        self._names = {(entry.param, entry.expert): entry.name for entry in disk_entries(spec)}

    def stored(self, param: str, expert: int | None = None) -> Tensor:
        """The tensor as it lies on disk, memory-mapped, in its own dtype."""
        return self._reader.read(self._names[param, expert])

    def embed(self, ids_BS: Tensor) -> None:
        self.x_BSD = self.stored("model.embed_tokens.weight")[ids_BS].to(self.dtype)

    def run_layer(self, layer: int) -> None:
        prefix = f"model.layers.{layer}"
        normed_BSD = self._normed(f"{prefix}.input_layernorm")
        self.x_BSD = self.x_BSD + self._attend(layer, normed_BSD)
        normed_BSD = self._normed(f"{prefix}.post_attention_layernorm")
        normed_TD = normed_BSD.flatten(0, 1)
        if self.spec.is_moe_layer(layer):
            y_TD = self._mix_experts(f"{prefix}.block_sparse_moe", normed_TD)
        else:
            y_TD = self._swiglu(
                normed_TD, *(f"{prefix}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
            )
        self.x_BSD = self.x_BSD + y_TD.view_as(self.x_BSD)

    def final_TD(self) -> Tensor:
        return self._normed("model.norm").flatten(0, 1)

    def head(self) -> Tensor:
        tied = self.spec.tied_embeddings
        return self.stored("model.embed_tokens.weight" if tied else "lm_head.weight")

    def _loaded(self, make: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A module of the model with its weights read from under `prefix`."""
        with torch.device("meta"):
            module = make()
        state = {
            name: self.stored(f"{prefix}.{name}").to(self.dtype) for name in module.state_dict()
        }
        module.load_state_dict(state, assign=True)
        return module

    def _normed(self, prefix: str) -> Tensor:
        norm = self._loaded(lambda: RMSNorm(self.spec.hidden_dim, self.spec.norm_eps), prefix)
        return norm(self.x_BSD)  # type: ignore[no-any-return]

    def _attend(self, layer: int, normed_BSD: Tensor) -> Tensor:
        spec = self.spec
        length = normed_BSD.shape[1]
        positions_S = torch.arange(length)
        rope = rope_tables(spec.rope, spec.head_dim, positions_S)
        mask = attention_mask(positions_S, length, window=spec.window_of(layer), documents_BS=None)
        attention = self._loaded(lambda: Attention(spec), f"model.layers.{layer}.self_attn")
        # Row by row: the scores of all rows at once would outgrow the weights.
        return torch.cat([attention(row, rope, mask) for row in normed_BSD.split(1)])

    def _mix_experts(self, prefix: str, x_TD: Tensor) -> Tensor:
        moe = self.spec.moe
        assert moe is not None, f"{prefix=}"
        assert moe.shared_expert_dim == 0, f"{moe.shared_expert_dim=}"
        router = self._loaded(lambda: Router(moe, self.spec.hidden_dim), f"{prefix}.gate")
        routed = router(x_TD)
        gates_TK = sum_to_one(routed.gates_TK) if moe.renormalize else routed.gates_TK
        y_TD = torch.zeros_like(x_TD, dtype=gates_TK.dtype)
        for expert in range(moe.num_experts):
            token, choice = (routed.experts_TK == expert).nonzero(as_tuple=True)
            if len(token):
                parts = (f"{prefix}.experts.{matrix}" for matrix in ("w1", "w3", "w2"))
                out_ND = self._swiglu(x_TD[token], *parts, expert=expert)
                y_TD.index_add_(0, token, gates_TK[token, choice, None] * out_ND)
        return y_TD.to(self.dtype)

    def _swiglu(
        self, x_TD: Tensor, gate: str, up: str, down: str, *, expert: int | None = None
    ) -> Tensor:
        gate_FD, up_FD = self.stored(gate, expert), self.stored(up, expert)
        down_DF = self.stored(down, expert)
        tokens = x_TD.shape[0]
        x_TD = F.pad(x_TD, (0, 0, 0, -tokens % _BLOCK_ROWS))
        y_TD = torch.zeros_like(x_TD)
        for inner in _slices(gate_FD.shape[0], 3 * self.dtype.itemsize * gate_FD.shape[1]):
            # Copies, even where the dtype is the same: a matrix product may round differently
            # where memory is aligned differently.
            gate_fD = gate_FD[inner].to(self.dtype, copy=True)
            up_fD = up_FD[inner].to(self.dtype, copy=True)
            down_Df = down_DF[:, inner].to(self.dtype, copy=True)
            for x_tD, y_tD in zip(x_TD.split(_BLOCK_ROWS), y_TD.split(_BLOCK_ROWS), strict=True):
                h_tf = F.silu(F.linear(x_tD, gate_fD)) * F.linear(x_tD, up_fD)
                y_tD += F.linear(h_tf, down_Df)
        return y_TD[:tokens]


def _run_layers(
    pair: tuple[_StreamedModel, _StreamedModel], ids_BS: Tensor
) -> list[dict[str, Any]]:
    """Run both models up to the last layer; the hidden states' differences after each."""
    dense, moe = pair
    for model in pair:
        model.embed(ids_BS)
    layers = []
    for layer in track(range(dense.spec.num_layers), label="Proving"):
        for model in pair:
            model.run_layer(layer)
        layers.append(
            {
                "layer": layer,
                "moe": moe.spec.is_moe_layer(layer),
                "largest_difference": _number((dense.x_BSD - moe.x_BSD).abs().max()),
                "largest_hidden": _number(dense.x_BSD.abs().max()),
            }
        )
    return layers


def _compare_logits(pair: tuple[_StreamedModel, _StreamedModel]) -> dict[str, Any]:
    """Compare all logits, a slice of tokens times a slice of the vocabulary at a time."""
    dense, _ = pair
    hidden = [model.final_TD() for model in pair]
    heads = [model.head() for model in pair]
    tokens, (vocab, dim) = hidden[0].shape[0], heads[0].shape
    largest, largest_logit, total = 0.0, 0.0, 0.0
    best = [torch.full((tokens,), -torch.inf, dtype=dense.dtype) for _ in pair]
    best_id = [torch.zeros(tokens, dtype=torch.int64) for _ in pair]
    for words in _slices(vocab, 2 * dense.dtype.itemsize * dim):
        weights = [head[words].to(dense.dtype) for head in heads]
        for rows in _slices(tokens, 4 * dense.dtype.itemsize * (words.stop - words.start)):
            logits = [
                F.linear(x_TD[rows], weight_vD)
                for x_TD, weight_vD in zip(hidden, weights, strict=True)
            ]
            for side, logits_tv in enumerate(logits):
                top, where = logits_tv.max(dim=-1)
                better = top > best[side][rows]
                best[side][rows] = torch.where(better, top, best[side][rows])
                best_id[side][rows] = torch.where(better, where + words.start, best_id[side][rows])
            difference = (logits[0] - logits[1]).abs()
            largest = _largest(largest, difference)
            largest_logit = _largest(largest_logit, logits[0].abs())
            total += float(difference.sum(dtype=torch.float64))
    same = (best_id[0] == best_id[1]).double().mean()
    return {
        "largest_difference": largest,
        "mean_difference": total / (tokens * vocab),
        "largest_logit": largest_logit,
        "same_next_token": float(same),
    }


def _largest(so_far: float, values: Tensor) -> float:
    # Python's max would pass over a NaN that does not come first.
    return _number(torch.maximum(values.new_tensor(so_far), values.max()))


def _number(value: Tensor) -> float:
    """A finite float; overflow would make proof.json unreadable to strict JSON readers."""
    number = float(value)
    if not torch.isfinite(value):
        raise DataError(
            f"A value in the proof is {number}: the model overflows on this text. "
            "Skip the proof, or mend the dense model."
        )
    return number


def _slices(length: int, item_bytes: int) -> list[slice]:
    """Cut `length` items into runs of at most `_SLICE_BYTES`."""
    step = max(1, _SLICE_BYTES // item_bytes)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _read_text(path: Path | None, *, characters: int) -> tuple[str, str]:
    """The text to run, cut to some characters, and a word on where it is from."""
    if path is None:
        return _standard_library(characters), "source of Python's standard library"
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters), str(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"Cannot read the proof's text {path}: {reason}.") from error


def _standard_library(characters: int) -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    text = ""
    for path in sorted(folder.glob("[a-z]*.py")):
        if len(text) >= characters:
            break
        text += path.read_text(encoding="utf-8", errors="replace")
    return text[:characters]


def _tokens_of(text: str, folder: Path, vocab_size: int) -> tuple[list[int], str]:
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        # The fast tokenizer itself: transformers' call warns of texts longer than the context.
        ids = load_tokenizer(folder).backend_tokenizer.encode(text).ids
        name = "the dense model's"
    else:
        ids = [byte % vocab_size for byte in text.encode()]
        name = "none: the text's bytes, modulo the vocabulary"
    if ids and max(ids) >= vocab_size:
        raise DataError(
            f"The tokenizer of {folder} gives token {max(ids)}, but the model knows {vocab_size}. "
            "It belongs to another model."
        )
    return ids, name


def _in_rows(ids: list[int], source: str) -> Tensor:
    if len(ids) < 2:
        raise DataError(f"The proof's text, {source}, has {len(ids)} tokens. It needs 2 or more.")
    num_rows = -(-len(ids) // _ROW_TOKENS)
    length = len(ids) // num_rows
    return torch.tensor(ids[: num_rows * length]).view(num_rows, length)
