"""FP8 numbers, and folders of them read back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.errors import FolderError, SpecError
from moesaic.quantization.compressed import (
    Quantization,
    compressed_tensors_config,
    quantization_of,
)
from moesaic.quantization.fp8 import (
    FP8_MAX,
    dequantize,
    quantize_per_channel,
    quantize_per_tensor,
)
from moesaic.quantization.reader import WideReader


def e4m3_numbers() -> list[float]:
    """Every finite e4m3 number from its definition: 4 bits of exponent, bias 7, 3 of mantissa."""
    numbers = [mantissa * 2.0**-9 for mantissa in range(8)]
    for exponent in range(1, 16):
        # All ones is NaN, so the largest number is 1.75 * 2^8.
        mantissas = range(7) if exponent == 15 else range(8)
        numbers += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for mantissa in mantissas]
    return sorted({sign * number for number in numbers for sign in (1, -1)})


def nearest(value: float, numbers: list[float]) -> list[float]:
    """The nearest numbers: one, or two in a tie."""
    distance = min(abs(value - number) for number in numbers)
    return [number for number in numbers if abs(value - number) == distance]


def test_rounding_takes_the_nearest_e4m3_number():
    numbers = e4m3_numbers()
    assert max(numbers) == FP8_MAX
    # A largest magnitude of 448 makes the scale 1, so the numbers are rounded as they are.
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 40
    values[0] = FP8_MAX
    rounded, scale = quantize_per_tensor(values.clamp(-FP8_MAX, FP8_MAX)[None])
    assert float(scale) == 1
    for value, result in zip(values[1:].tolist(), rounded.float()[0, 1:].tolist(), strict=True):
        assert result in nearest(value, numbers), f"{value=}, {result=}"


def test_a_channel_scale_is_its_row_s_largest_magnitude_over_448():
    weight = torch.randn(5, 7) * torch.tensor([1e-3, 1, 10, 1e3, 1])[:, None]
    rounded, scale = quantize_per_channel(weight)
    assert rounded.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 1)
    for row in range(5):
        assert float(scale[row]) == pytest.approx(float(weight[row].abs().max()) / 448)
        assert float(rounded[row].float().abs().max()) == 448


def test_a_weight_read_back_is_off_by_at_most_half_a_mantissa_step():
    weight = torch.randn(64, 128)
    largest = weight.abs().amax(dim=1, keepdim=True)
    back = dequantize(*quantize_per_channel(weight))
    # 3 bits of mantissa: 1/16 of the number; below the smallest normal, half a step of 2^-9.
    allowed = torch.maximum(weight.abs() / 16, largest / 448 * 2**-10) * (1 + 1e-6)
    assert bool(((back - weight).abs() <= allowed).all())


def test_the_sign_of_the_largest_and_the_largest_itself_survive():
    weight = torch.tensor([[0.1, -3.0], [2.0, 0.3]])
    back = dequantize(*quantize_per_channel(weight))
    assert torch.allclose(back[0, 1], torch.tensor(-3.0))
    assert torch.allclose(back[1, 0], torch.tensor(2.0))


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 3e38], ids=["zero", "smallest", "largest"])
def test_rows_at_the_edges_of_the_range_stay_finite(magnitude):
    weight = torch.full((2, 4), magnitude)
    for rounded, scale in (quantize_per_channel(weight), quantize_per_tensor(weight)):
        assert bool(rounded.float().isfinite().all())
        torch.testing.assert_close(dequantize(rounded, scale), weight, rtol=1e-2, atol=1e-38)


def test_weights_that_share_a_scale_share_the_largest_magnitude():
    small, large = torch.tensor([[1.0]]), torch.tensor([[4.0]])
    _, alone = quantize_per_tensor(small)
    _, shared = quantize_per_tensor(small, largest=large.abs().amax())
    assert float(shared) == 4 * float(alone)


@pytest.mark.parametrize(
    ("format", "scheme"), [("float8", "channel"), ("float8", "tensor"), ("int8", "channel")]
)
def test_the_config_says_format_and_scheme(format, scheme):
    config = {"quantization_config": compressed_tensors_config(scheme, ["lm_head"], format=format)}
    assert quantization_of(config) == Quantization(format, scheme)
    assert quantization_of({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "fp8"}, "quantised as fp8"),
        ({"format": "pack-quantized"}, "pack-quantized"),
        ({"config_groups": {}}, "no rule"),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "block"}}}}, "block"),
        (
            {
                "config_groups": {
                    "g": {"weights": {"num_bits": 8, "type": "int", "strategy": "tensor"}}
                }
            },
            "8-bit floats",
        ),
    ],
)
def test_another_quantisation_is_refused(change, message):
    config = {"quantization_config": compressed_tensors_config("channel", []) | change}
    with pytest.raises(SpecError, match=message):
        quantization_of(config)


def write_folder(path: Path, tensors: dict[str, torch.Tensor], *, scheme: str = "channel") -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"quantization_config": compressed_tensors_config(scheme, [])}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_reader_hides_scales_and_multiplies_them_out(tmp_path):
    weight = torch.randn(4, 6)
    rounded, scale = quantize_per_channel(weight)
    bias = torch.randn(4).bfloat16()
    folder = write_folder(
        tmp_path / "m",
        {
            "a.weight": rounded,
            "a.weight_scale": scale,
            "a.input_scale": torch.ones(1),
            "a.bias": bias,
        },
    )
    with WideReader(folder) as reader:
        assert sorted(reader.entries) == ["a.bias", "a.weight"]
        assert reader.entries["a.weight"].dtype == torch.float32
        assert torch.equal(reader.read("a.weight"), rounded.float() * scale)
        assert torch.equal(reader.read("a.bias"), bias)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "a.weight_scale is missing"),
        (torch.ones(3, 1), "has shape"),
        (torch.ones(6), "has shape"),
    ],
    ids=["none", "of other rows", "of columns"],
)
def test_an_fp8_weight_without_its_scale_is_refused(tmp_path, scale, message):
    rounded, _ = quantize_per_channel(torch.randn(4, 6))
    tensors = {"a.weight": rounded} | ({} if scale is None else {"a.weight_scale": scale})
    with pytest.raises(FolderError, match=message):
        WideReader(write_folder(tmp_path / "m", tensors))


def test_a_folder_that_is_not_quantised_is_read_as_it_is(tmp_path):
    weight = torch.randn(4, 6)
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with WideReader(folder) as reader:
        assert reader.quantization is None
        assert torch.equal(reader.read("a.weight"), weight)
