"""Held-out loss and expert similarity against plain loops."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError, DataError, FolderError
from moesaic.evaluation import similarity
from moesaic.evaluation.config import EvaluateConfig
from moesaic.evaluation.evaluate import evaluate
from moesaic.evaluation.heldout import HeldoutLoss, SequenceLoss, heldout_loss
from moesaic.evaluation.similarity import expert_similarity, folder_similarity
from moesaic.model.build import load_model, save_model
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from tests.tiny import LLAMA, TINY, tiny_folder, tiny_model
from tests.tiny_run import tiny_tokens

MOE_FAMILIES = [name for name, spec in TINY.items() if spec.moe]


def experts_by_loop(*weights: torch.Tensor) -> float:
    """Mean cosine of flattened experts over pairs, one pair at a time."""
    flat = [
        torch.cat([weight[expert].detach().flatten() for weight in weights]).double()
        for expert in range(len(weights[0]))
    ]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(flat, 2)]
    return sum(cosines) / len(cosines)


def random_experts(num_experts: int = 4, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_experts, *shape, generator=generator) + 0.3
        for shape in ((6, 10), (6, 10), (10, 6))
    ]


def test_similarity_is_the_mean_cosine_over_pairs_of_experts() -> None:
    weights = random_experts()
    assert expert_similarity(*weights) == pytest.approx(experts_by_loop(*weights), abs=1e-12)


def test_similarity_does_not_depend_on_the_slices_it_is_summed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = random_experts()
    whole = expert_similarity(*weights)
    monkeypatch.setattr(similarity, "SLICE_VALUES", 7)
    assert expert_similarity(*weights) == pytest.approx(whole, abs=1e-12)


def test_copies_have_similarity_one_and_opposites_minus_one() -> None:
    expert = random_experts(1)
    copies = [weight.expand(5, -1, -1) for weight in expert]
    assert expert_similarity(*copies) == pytest.approx(1, abs=1e-14)
    assert expert_similarity(*(torch.cat([w, -w]) for w in expert)) == pytest.approx(-1, abs=1e-14)


def test_a_small_departure_from_a_copy_shows_in_float32() -> None:
    weights = [weight.expand(4, -1, -1).clone() for weight in random_experts(1)]
    weights[0][2, 0, 0] += 1e-4
    found = 1 - expert_similarity(*weights)
    assert 0 < found < 1e-8
    assert found == pytest.approx(1 - experts_by_loop(*weights), rel=1e-3)


def test_independent_random_experts_have_similarity_near_zero() -> None:
    weights = torch.randn(8, 200, 200, generator=torch.Generator().manual_seed(0))
    # The mean of 28 cosines of standard deviation 1 / 200 each.
    assert abs(expert_similarity(weights)) < 5 / (200 * math.sqrt(28))


def test_length_does_not_matter_and_zeros_count_as_unlike() -> None:
    (weights, *_) = random_experts(2)
    scaled = weights * torch.tensor([1.0, 32.0])[:, None, None]
    assert expert_similarity(scaled) == pytest.approx(expert_similarity(weights), abs=1e-12)
    assert expert_similarity(torch.zeros(3, 4, 4)) == 0


def test_a_single_expert_is_like_itself() -> None:
    assert expert_similarity(*random_experts(1)) == 1


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_similarity_streamed_from_a_folder_is_that_of_the_live_model(
    family: str, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model", TINY[family], tokenizer=False)
    model = load_model(folder)
    live = {
        layer: experts_by_loop(mlp.experts.w1, mlp.experts.w3, mlp.experts.w2)
        for layer, block in enumerate(model.model.layers.values())
        if (mlp := block.block_sparse_moe) is not None
    }
    assert folder_similarity(folder) == pytest.approx(live, abs=1e-12)


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_similarity_of_fp8_experts_is_that_of_what_they_stand_for(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "SLICE_VALUES", 100)
    wide = tiny_folder(tmp_path / "wide", TINY["mixtral"], tokenizer=False, dtype=torch.bfloat16)
    quantize(QuantizeConfig(model=wide, out=tmp_path / "fp8", scheme=scheme))
    save_model(load_model(tmp_path / "fp8"), tmp_path / "widened", dtype=torch.float32)
    # load_model rounds value times scale to float32, the stream multiplies in float64.
    assert folder_similarity(tmp_path / "fp8") == pytest.approx(
        folder_similarity(tmp_path / "widened"), abs=1e-6
    )


def test_similarity_of_a_dense_folder_is_empty(tmp_path: Path) -> None:
    assert folder_similarity(tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)) == {}


@torch.no_grad()
def loss_by_loop(model: torch.nn.Module, folder: TokenFolder) -> dict[str, tuple[float, int]]:
    """Nats and targets of each source, one token at a time."""
    sums = {}
    for source in folder.sources:
        nats, tokens = 0.0, 0
        for i in range(folder.num_sequences("heldout", source)):
            row = folder.row("heldout", source, i)
            documents_1S = torch.tensor(row.documents_S)[None]
            logits_SV = model(torch.tensor(row.input_S)[None], documents_BS=documents_1S)[0]
            for logits_V, target in zip(logits_SV.double(), row.target_S, strict=True):
                if target >= 0:
                    nats -= float(logits_V.log_softmax(0)[target])
                    tokens += 1
        sums[source] = nats, tokens
    return sums


@pytest.mark.parametrize("family", ["llama", "skywork moe"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_heldout_loss_is_that_of_a_plain_loop_over_tokens(
    family: str, batch_size: int, tmp_path: Path
) -> None:
    folder = TokenFolder(tiny_tokens(tmp_path / "tokens", sources=("a", "b")))
    model = tiny_model(TINY[family])
    expected = loss_by_loop(model, folder)
    found = heldout_loss(model, folder, batch_size=batch_size)
    nats, tokens = (sum(part) for part in zip(*expected.values(), strict=True))
    assert found.tokens == tokens
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    for source, (nats, tokens) in expected.items():
        assert found.sources[source].loss == pytest.approx(nats / tokens, rel=1e-5)


def test_fewer_sequences_are_spread_over_the_whole_split(tmp_path: Path) -> None:
    folder = TokenFolder(tiny_tokens(tmp_path / "tokens", sources=("a", "b")))
    model = tiny_model(LLAMA)
    some = heldout_loss(model, folder, max_sequences=6).sequences
    assert [item.source for item in some] == ["a"] * 3 + ["b"] * 3
    assert len({item.document for item in some[:3]}) == 3
    assert len(heldout_loss(model, folder, max_sequences=10**6).sequences) == (
        folder.num_sequences("heldout")
    )


def sequences(*losses: float, per_document: int = 1) -> HeldoutLoss:
    return HeldoutLoss(
        tuple(SequenceLoss("a", i // per_document, 8 * loss, 8) for i, loss in enumerate(losses))
    )


def test_the_standard_error_takes_a_document_as_one_draw() -> None:
    alone = torch.tensor([1.0, 2.0, 4.0, 5.0])
    expected = float(alone.std() / math.sqrt(4))
    assert sequences(*alone.tolist()).standard_error == pytest.approx(expected)
    twice = alone.repeat_interleave(2).tolist()
    assert sequences(*twice, per_document=2).standard_error == pytest.approx(expected)
    assert sequences(1.0, 3.0, per_document=2).standard_error is None


def test_a_difference_leaves_out_what_is_hard_for_both_models() -> None:
    first = sequences(1.0, 2.0, 4.0, 5.0)
    second = sequences(0.9, 1.9, 3.9, 4.9)
    difference, error = second.minus(first)
    assert difference == pytest.approx(-0.1)
    assert error == pytest.approx(0, abs=1e-12)
    assert first.standard_error is not None
    assert first.standard_error > 0.9


def test_evaluate_compares_every_model_with_the_first_and_writes_json(tmp_path: Path) -> None:
    tokens = tiny_tokens(tmp_path / "tokens")
    folders = tuple(
        tiny_folder(tmp_path / f"model-{seed}", LLAMA, seed=seed, tokenizer=False)
        for seed in (0, 1)
    )
    config = EvaluateConfig(
        models=(*folders, folders[0]),
        labels=("one", "two", "one again"),
        data=tokens,
        dtype="float32",
        out=tmp_path / "evaluation.json",
    )
    result = evaluate(config)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    one, two, again = result["models"]
    assert [one["label"], two["label"], again["label"]] == ["one", "two", "one again"]
    assert one["difference"] is None
    assert two["difference"] == pytest.approx(two["loss"] - one["loss"], abs=1e-9)
    assert two["difference_standard_error"] > 0
    assert (again["difference"], again["difference_standard_error"]) == (0, 0)
    direct = heldout_loss(load_model(folders[1]), TokenFolder(tokens))
    assert two["loss"] == pytest.approx(direct.loss, rel=1e-6)


def test_a_model_that_does_not_know_all_tokens_is_refused(tmp_path: Path) -> None:
    folder = TokenFolder(tiny_tokens(tmp_path / "tokens"))
    with pytest.raises(DataError, match=r"vocabulary of 300, but the model knows 64 tokens"):
        heldout_loss(tiny_model(LLAMA.replace(vocab_size=64)), folder)


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    model = tiny_model(LLAMA)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
    folder = save_model(model, tmp_path / "model", dtype=torch.float32)
    config = EvaluateConfig(
        models=(folder,),
        data=tiny_tokens(tmp_path / "tokens"),
        dtype="float32",
        out=tmp_path / "evaluation.json",
    )
    with pytest.raises(FolderError, match="its weights are damaged or overflow"):
        evaluate(config)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "No model to evaluate"),
        ({"labels": ("a", "b")}, "2 labels for 1 models"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**{"models": (Path("m"),), "data": Path("t"), **changes})  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = EvaluateConfig(models=(tmp_path,), data=tmp_path, device="abacus")
    with pytest.raises(ConfigError, match="The device 'abacus' cannot be used here"):
        evaluate(config)
