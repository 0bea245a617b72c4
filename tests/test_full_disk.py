"""A disk that is full at any write of a job leaves what stood there before, whole."""

from __future__ import annotations

import torch

from moesaic.model.build import build_model, init_weights, load_model, save_model
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.spec import ModelSpec
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle
from tests.faults import failure_of, fault

SPEC = ModelSpec(
    family="llama",
    vocab_size=32,
    hidden_dim=8,
    ffn_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_positions=32,
)


def survives_every_write(attempt, out) -> int:
    """Fail each write in turn; the number of writes that failed."""
    ids = torch.arange(8)[None]
    before = load_model(out)(ids)
    number = 1
    while True:
        with fault(number) as faults:
            failure = failure_of(attempt)
        if not faults.has_struck:
            assert failure is None
            return number - 1
        # The flush after the rename may fail too: then the new folder stands, as whole.
        assert load_model(out)(ids).shape == before.shape
        leftovers = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
        assert leftovers == []
        number += 1


def dense_folder(tmp_path):
    model = build_model(SPEC, dtype=torch.float32)
    init_weights(model, seed=1)
    return save_model(model, tmp_path / "dense")


@torch.no_grad()
def test_upcycling_on_a_full_disk_keeps_the_folder_that_stood_there(tmp_path):
    config = UpcycleConfig(
        dense=dense_folder(tmp_path), out=tmp_path / "out" / "moe", experts=2, overwrite=True
    )
    upcycle(config)
    assert survives_every_write(lambda: upcycle(config), config.out) > 10


@torch.no_grad()
def test_quantising_on_a_full_disk_keeps_the_folder_that_stood_there(tmp_path):
    config = QuantizeConfig(
        model=dense_folder(tmp_path), out=tmp_path / "out" / "fp8", overwrite=True
    )
    quantize(config)
    assert survives_every_write(lambda: quantize(config), config.out) > 10
