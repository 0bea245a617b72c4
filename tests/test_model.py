"""What the decoder promises apart from its parity with other implementations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moesaic.errors import ConfigError
from moesaic.model import loss as loss_module
from moesaic.model.attention import attention_mask
from moesaic.model.build import build_model, init_weights
from moesaic.model.cache import KVCache
from moesaic.model.loss import linear_cross_entropy
from moesaic.model.transformer import Transformer
from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import RoutingStep
from moesaic.spec import ModelSpec, MoESpec

DENSE = ModelSpec(
    family="llama",
    vocab_size=61,
    hidden_dim=24,
    ffn_dim=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
)
MOE = DENSE.replace(
    family="skywork", moe=MoESpec(num_experts=4, top_k=2, expert_dim=16), moe_layers=(0, 1, 2)
)
SLIDING = DENSE.replace(family="mistral", sliding_window=5, sliding_layers=(0, 1, 2))
SPECS = {"dense": DENSE, "moe": MOE, "sliding": SLIDING}


def tiny(spec: ModelSpec, dtype: torch.dtype = torch.float64) -> Transformer:
    model = build_model(spec, dtype=dtype)
    init_weights(model, seed=1, std=0.3)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, DENSE.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("first", [1, 7], ids=["token by token", "prefill of 7"])
@torch.no_grad()
def test_cached_decoding_equals_reading_everything_at_once(spec, first):
    model = tiny(spec)
    ids = tokens(2, 12)
    cache = KVCache(spec, 2, 12, dtype=torch.float64)
    pieces = [model(ids[:, :first], cache=cache)]
    pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(first, 12)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_chunk_after_a_prefix_equals_reading_everything_at_once():
    model = tiny(SLIDING)
    ids = tokens(1, 12)
    cache = KVCache(SLIDING, 1, 12, dtype=torch.float64)
    model(ids[:, :5], cache=cache)
    torch.testing.assert_close(
        model(ids[:, 5:], cache=cache), model(ids)[:, 5:], rtol=0, atol=1e-10
    )


def test_a_full_cache_is_refused_with_its_numbers():
    cache = KVCache(DENSE, 1, 4, dtype=torch.float32)
    with pytest.raises(ConfigError, match="holds 4 positions and has 0; 5 more"):
        tiny(DENSE)(tokens(1, 5), cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("spec", [DENSE, SLIDING], ids=["dense", "sliding"])
@torch.no_grad()
def test_documents_packed_together_compute_what_each_computes_alone(spec):
    model = tiny(spec)
    first, second = tokens(1, 5, seed=2), tokens(1, 8, seed=3)
    documents = torch.tensor([[0] * 5 + [1] * 8])
    packed = model(torch.cat((first, second), dim=1), documents_BS=documents)
    torch.testing.assert_close(packed[:, :5], model(first), rtol=0, atol=1e-10)
    # Rope is relative, so the second document may start at any position, up to the float32
    # rounding of its angles.
    torch.testing.assert_close(packed[:, 5:], model(second), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]]])
def test_the_mask_is_what_a_plain_loop_says(window, documents):
    documents_BS = None if documents is None else torch.tensor(documents)
    mask = attention_mask(torch.arange(6), 6, window=window, documents_BS=documents_BS)
    for batch in range(2):
        for query in range(6):
            for key in range(6):
                sees = key <= query
                sees &= window is None or query - key < window
                sees &= documents is None or documents[batch][query] == documents[batch][key]
                if mask is None:
                    assert sees == (key <= query)
                else:
                    assert bool(mask.expand(2, 1, 6, 6)[batch, 0, query, key]) == sees


@pytest.mark.parametrize("tokens_in_chunk", [1, 3, 100])
def test_chunked_loss_and_its_gradients_equal_cross_entropy(monkeypatch, tokens_in_chunk):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", tokens_in_chunk)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 10, 7, -100, 2])
    ours = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(2.5 * ours, (hidden, weight))
    reference = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    expected = torch.autograd.grad(2.5 * reference, (hidden, weight))
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(grads, expected)


def test_a_loss_without_targets_is_zero_and_moves_nothing():
    hidden = torch.randn(4, 5, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(11, 5), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_float32_weights_receive_float32_gradients_under_bfloat16_activations():
    model = tiny(MOE, torch.float32)
    model.compute_dtype = torch.bfloat16
    hidden, _ = model.hidden(tokens(2, 9))
    linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens(2, 9).flatten()).backward()
    assert hidden.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_recomputing_layers_changes_no_gradient():
    gradients = []
    choices = [
        {},
        {0: "full", 2: "full"},
        dict.fromkeys(range(3), "full"),
        {0: "attention", 1: "moe_activations"},
    ]
    for recompute in choices:
        model = tiny(MOE)
        step = RoutingStep(RoutingConfig(), torch.tensor(0.01))
        steps = dict.fromkeys(MOE.moe_layers, step)
        hidden, statistics = model.hidden(tokens(2, 9), routing=steps, recompute=recompute)
        hidden.square().sum().backward()
        assert len(statistics) == 3
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for again in gradients[1:]:
        torch.testing.assert_close(again, gradients[0], rtol=0, atol=0)


def test_weights_drawn_from_a_seed_do_not_depend_on_other_layers():
    deeper = tiny(dataclasses.replace(DENSE, num_layers=5)).state_dict()
    for name, tensor in tiny(DENSE).state_dict().items():
        assert torch.equal(tensor, deeper[name]), name
