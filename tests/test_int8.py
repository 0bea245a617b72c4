"""8-bit integers, and folders of them read back."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moesaic.errors import FolderError, SpecError
from moesaic.quantization.compressed import compressed_tensors_config, quantization_of
from moesaic.quantization.fp8 import dequantize
from moesaic.quantization.int8 import quantize_per_channel
from moesaic.quantization.reader import WideReader


def test_rounding_takes_the_nearest_whole_number_of_steps():
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    rounded, scale = quantize_per_channel(weight)
    assert rounded.dtype == torch.int8
    assert scale.shape == (16, 1)
    for row in range(16):
        step = max(abs(value) for value in weight[row].tolist()) / 127
        assert float(scale[row]) == pytest.approx(step, rel=1e-6)
        for value, whole in zip(weight[row].tolist(), rounded[row].tolist(), strict=True):
            assert abs(value / step - whole) <= 0.5 + 1e-5


def test_a_row_s_largest_survives_and_minus_128_is_not_used():
    weight = torch.tensor([[0.5, -3.0], [2.0, 0.3]])
    rounded, scale = quantize_per_channel(weight)
    assert rounded.tolist()[0][1] == -127
    torch.testing.assert_close(dequantize(rounded, scale)[:, 1][0], torch.tensor(-3.0))


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 3e38], ids=["zero", "smallest", "largest"])
def test_rows_at_the_edges_of_the_range_stay_finite(magnitude):
    weight = torch.full((2, 4), magnitude)
    back = dequantize(*quantize_per_channel(weight))
    torch.testing.assert_close(back, weight, rtol=1e-2, atol=1e-38)


def write_folder(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"quantization_config": compressed_tensors_config("channel", [], format="int8")}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_reader_multiplies_scales_out_and_gives_both_as_they_are_stored(tmp_path):
    rounded, scale = quantize_per_channel(torch.randn(4, 6))
    tensors = {"a.weight": rounded, "a.weight_scale": scale, "a.bias": torch.randn(4)}
    with WideReader(write_folder(tmp_path / "m", tensors)) as reader:
        assert sorted(reader.entries) == ["a.bias", "a.weight"]
        assert reader.entries["a.weight"].dtype == torch.float32
        assert torch.equal(reader.read("a.weight"), rounded.float() * scale)
        stored, its_scale = reader.read_stored("a.weight")
        assert torch.equal(stored, rounded)
        assert torch.equal(its_scale, scale)
        assert reader.read_stored("a.bias")[1] is None


def test_a_weight_without_its_scale_is_refused(tmp_path):
    rounded, _ = quantize_per_channel(torch.randn(4, 6))
    folder = write_folder(tmp_path / "m", {"a.weight": rounded})
    with pytest.raises(FolderError, match=r"int8, but a\.weight_scale is missing"):
        WideReader(folder)


@pytest.mark.parametrize(
    "change",
    [{"strategy": "group"}, {"symmetric": False}, {"num_bits": 4}],
    ids=["groups", "offsets", "4 bits"],
)
def test_another_quantisation_is_refused(change):
    config = compressed_tensors_config("channel", [], format="int8")
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(SpecError, match="symmetric 8-bit integers"):
        quantization_of({"quantization_config": config})
