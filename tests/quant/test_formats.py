"""Packed weights read, made and unpacked, bit for bit as each format's formula; what is wrong is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorakernels as lk
from lorakernels.nn.quantized import FORMATS, QuantizedLinear, pack
from lorakernels.quant import int4, layers, nf4, wide
from lorakernels.quant.packed import CODES, Form, PackedWeight

bnb = pytest.importorskip("bitsandbytes")
bnb_functional = pytest.importorskip("bitsandbytes.functional")

COLUMNS = (33, 64, 70, 96, 100, 192)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def by_formula(weight: PackedWeight) -> torch.Tensor:
    """[N, K] float32: a code of each number, times the scale of its place, for blocks of the flattened weight."""
    N, K = weight.shape
    nibbles = torch.stack([weight.data.flatten() >> 4, weight.data.flatten() & 15], 1).flatten()[: N * K]
    blocks = torch.arange(N * K) // weight.form.block
    return (torch.tensor(CODES[weight.form.kind])[nibbles.int()] * weight.scale[blocks]).view(N, K)


def special(N: int, K: int) -> torch.Tensor:
    """Random numbers, a row of zeros, and numbers of very different size."""
    weight = torch.randn(N, K) * 10 ** torch.randn(N, 1)
    weight[0] = 0
    return weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("K", COLUMNS)
def test_unpacking_is_the_formula(kind: str, K: int) -> None:
    for block in BLOCKS:
        packed = nf4.pack(special(7, K), kind, block)
        expected = by_formula(packed)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(packed.dense(dtype), expected.to(dtype))
        for rows, cols in ((slice(1, 6), slice(0, K)), (slice(0, 7), slice(3, K - 2)), (slice(2, 3), slice(32, 33))):
            part = expected[rows, cols]
            out = torch.full_like(part, torch.nan)
            packed.unpack(rows.start, rows.stop, cols.start, cols.stop, out)
            assert torch.equal(out, part)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_quantiser_is_bitsandbytes(kind: str) -> None:
    """Bytes and scales: partial blocks, odd sizes, zeros."""
    for seed in range(150):
        torch.manual_seed(seed)
        N, K = torch.randint(1, 40, (1,)).item(), torch.randint(1, 200, (1,)).item()
        weight, block = special(int(N), int(K)), BLOCKS[seed % len(BLOCKS)]
        data, state = bnb_functional.quantize_4bit(weight.clone(), quant_type=kind, blocksize=block)
        packed = nf4.pack(weight, kind, block)
        assert torch.equal(packed.data, data.flatten()) and torch.equal(packed.scale, state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_is_the_nearest(kind: str) -> None:
    """bitsandbytes' table and outer scales to the bit, and of each scale the nearest code; its own is it for most."""
    weight = special(160, 192)
    packed, flat = pack(weight, kind, 64, double_quant=True), pack(weight, kind, 64)
    state = bnb_functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)[1]
    assert torch.equal(packed.table, bnb_functional.create_dynamic_map())  # type: ignore[arg-type]
    assert torch.equal(packed.absmax, state.state2.absmax) and torch.equal(packed.offset, state.offset)  # type: ignore[arg-type]
    scaled = (flat.scale - packed.offset) / packed.absmax.repeat_interleave(256)[: flat.scale.numel()]  # type: ignore[union-attr,operator]
    off = (scaled[:, None] - packed.table).abs()  # type: ignore[operator]
    assert torch.equal(off.gather(1, packed.scale[:, None].long())[:, 0], off.amin(1))
    assert (packed.scale != state.absmax).float().mean() < 0.02
    assert packed.nbytes < 0.53 * weight.numel() + 4 * 256


def test_mxfp4_is_the_nearest_even() -> None:
    """Each number against all codes times the power of two; in the middle of two, the one whose last bit is 0."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    weight = torch.cat([torch.cat([middles, -middles, middles * 0.999, middles * 1.001])[None], special(9, 32)])
    packed = pack(weight, "mxfp4")
    power = 2.0 ** (packed.scale.double() - 127)
    largest = weight.double().abs().amax(1, keepdim=True)
    assert torch.equal(power[largest > 0], 2.0 ** (largest[largest > 0].log2().floor() - 2))
    codes = torch.tensor(CODES["mxfp4"][:8], dtype=torch.float64)
    off = (weight.double().abs()[:, :, None] / power[:, :, None] - codes).abs()
    ties = off + 1e-9 * (torch.arange(8) % 2)
    assert torch.equal(packed.dense(torch.float64), weight.sign() * codes[ties.argmin(2)] * power)
    odd = pack(torch.randn(3, 45), "mxfp4")
    assert odd.scale.shape == (3, 2) and (odd.dense()).isfinite().all()


def four_bits(weight: torch.Tensor, kind: str = "nf4", nested: bool = False, storage: Any = torch.uint8) -> Any:
    """bitsandbytes' layer around a weight [N, K], packed."""
    N, K = weight.shape
    layer = bnb.nn.Linear4bit(K, N, quant_type=kind, compress_statistics=nested, quant_storage=storage)
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )
    layer.weight = parameter._quantize("cpu")
    return layer


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_bitsandbytes_is_read(nested: bool, storage: torch.dtype) -> None:
    layer = four_bits(torch.randn(64, 128).bfloat16(), nested=nested, storage=storage)
    packed = layers.read(layer)
    expected = bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert packed.dtype is torch.bfloat16 and torch.equal(packed.dense(), expected)
    assert packed.data.data_ptr() == layer.weight.data_ptr()  # shared, not copied


def test_bitsandbytes_own_fault() -> None:
    """Its CPU kernel is wrong where K is a multiple of 16 and a row no whole number of blocks; ours is the formula."""
    weight = torch.randn(96, 96)
    data, _ = bnb_functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    packed = nf4.pack(weight)
    assert torch.equal(packed.data, data.flatten())
    assert torch.equal(packed.dense(), by_formula(packed))
    assert (packed.dense() - weight).norm() <= 0.1 * weight.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format_for_cpu": True}, "packed again by bitsandbytes"),
        ({"quant_type": "int3"}, "int3 in blocks of 64"),
        ({"blocksize": 48}, "in blocks of 48"),
        ({"absmax": torch.ones(3)}, r"scales \[3\]"),
        ({"absmax": torch.ones(2, 64)}, r"scales \[2, 64\].*packed again in evaluation"),
        ({"shape": torch.Size([64, 64])}, "expected 2048"),
        ({"shape": torch.Size([2, 64, 64])}, r"of torch.float32 \[2, 64, 64\]; expected"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_state_is_refused(change: dict[str, Any], message: str) -> None:
    layer = four_bits(torch.randn(64, 128))
    for name, value in change.items():
        setattr(layer.weight.quant_state, name, value)
    with pytest.raises(ValueError, match=message):
        layers.read(layer)


def test_a_layer_that_is_not_packed_yet_is_refused() -> None:
    with pytest.raises(ValueError, match="not quantised yet"):
        layers.read(bnb.nn.Linear4bit(8, 8, quant_type="nf4"))


class HQQLinear(torch.nn.Module):
    """As HQQ's layer of 4 bits with axis=1 holds a weight [N, K]: a row a group, half of them in the high nibbles."""

    __module__ = "hqq.core.quantize"

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> None:
        super().__init__()
        rows = codes.view(-1, group)
        half = len(rows) // 2
        self.W_q = torch.nn.Parameter(rows[:half] << 4 | rows[half:], requires_grad=False)
        self.meta = {"nbits": 4, "axis": 1, "packing": "4bit_u8", "shape": codes.shape, "group_size": group}
        self.meta |= {"scale": scale.view(-1, 1), "zero": zero.view(-1, 1), "quant_scale": False, "quant_zero": False}
        self.compute_dtype, self.bias = scale.dtype, None


@pytest.mark.parametrize("N", [32, 7])  # where N is odd, the halves meet inside a row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hqq_is_read(dtype: torch.dtype, N: int) -> None:
    codes, group = torch.randint(16, (N, 128), dtype=torch.uint8), 64
    scale, zero = torch.rand(N, 2, dtype=dtype), 15 * torch.rand(N, 2, dtype=dtype)
    layer = HQQLinear(codes, scale, zero, group)
    packed = layers.read(layer)
    assert packed.form == Form("int4", N, 128, 1, group, dtype, halves=True)
    each = [values.float().repeat_interleave(group, 1) for values in (zero, scale)]
    expected = (codes.float() - each[0]) * each[1]
    assert torch.equal(packed.dense(torch.float32), expected)
    out = torch.empty(N - 2, 40)
    packed.unpack(1, N - 1, 30, 70, out)
    assert torch.equal(out, expected[1:-1, 30:70])
    layer.meta["nbits"] = 8
    with pytest.raises(ValueError, match="HQQ's with"):
        layers.read(layer)


class Int8Tensor(torch.Tensor):
    """torchao's, whose package the tests do not install: its layout."""

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, *rest: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor, act_quant_kwargs: Any = None) -> None:
        self.qdata, self.scale, self.act_quant_kwargs = qdata, scale, act_quant_kwargs
        self.zero_point, self.block_size = torch.zeros_like(scale, dtype=torch.int8), [1, qdata.shape[1]]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default, f"{func} would unpack the whole weight"
        return args[0]


Int8Tensor.__module__ = "torchao.quantization"


def test_torchao_is_read() -> None:
    qdata, scale = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.rand(48, 1)
    layer = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(Int8Tensor(qdata, scale), requires_grad=False)
    assert layers.kind_of(layer) == "torchao"
    adapted = lk.LoRALinear.from_linear(layer, r=4)
    assert torch.equal(adapted.weight.dense(torch.float32), qdata.float() * scale)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x, adapted.weight.dense(), layer.bias)
    assert torch.equal(adapted(x), expected)
    layer.weight = torch.nn.Parameter(Int8Tensor(qdata, scale, "dynamic"), requires_grad=False)
    with pytest.raises(ValueError, match="rounds the activations, and gives them no gradient"):
        lk.LoRALinear.from_linear(layer, r=4)


def test_int8_of_bitsandbytes_on_request() -> None:
    layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(48, 64).half(), requires_grad=False, has_fp16_weights=False)
    layer.weight = layer.weight._quantize("cpu")
    model = torch.nn.Sequential(layer)
    with pytest.raises(TypeError, match=r'lorakernels\.quantize\(model, "int8"\)'):
        lk.inject(model, lk.LoRAConfig(target_modules=["0"]))
    bias, data, scale = layer.bias, layer.weight.data, layer.weight.SCB
    lk.quantize(model, "int8")
    packed = model[0].packed
    assert packed.data.data_ptr() == data.data_ptr() and model[0].bias.data_ptr() == bias.data_ptr()
    assert torch.equal(packed.dense(torch.float32), data.float() * (scale / 127)[:, None])


@pytest.mark.parametrize("block", [(128, 128), None], ids=["blocks", "whole"])
def test_float8_of_transformers_on_request(block: Any) -> None:
    """DeepSeek's blocks."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(300, 200, block_size=block)
    weight, scale = torch.randn(200, 300).to(wide.FP8), torch.rand(layer.weight_scale_inv.shape)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    model = lk.quantize(torch.nn.Sequential(layer), "fp8")
    of_each = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300] if block else scale
    expected = weight.float() * of_each
    packed = model[0].packed
    assert torch.equal(packed.dense(torch.float32), expected)
    out = torch.empty(50, 101)
    packed.unpack(120, 170, 99, 200, out)
    assert torch.equal(out, expected[120:170, 99:200])
    layer.weight_scale_inv = torch.nn.Parameter(torch.rand(7, 7), requires_grad=False)
    with pytest.raises(ValueError, match=r"expected torch\.float8_e4m3fn and scales"):
        wide.read_transformers(layer)


# A step over √12: of int4 a 15th of some 5 deviations, of int8 a 127th of 3; fp8 has 3 bits of mantissa.
@pytest.mark.parametrize(
    ("kind", "most"), [("nf4", 0.1), ("fp4", 0.13), ("mxfp4", 0.13), ("int4", 0.1), ("int8", 0.01), ("fp8", 0.03)]
)
def test_packing_is_near(kind: str, most: float) -> None:
    weight = torch.randn(48, 128)
    packed = pack(weight, kind)
    assert (packed.dense() - weight).norm() <= most * weight.norm()
    assert packed.nbytes <= weight.numel() * (1.1 if packed.form.bits == 8 else 0.64)


def test_int4_is_within_half_a_step() -> None:
    weight = special(9, 70)
    packed = int4.pack(weight, 35)
    steps = packed.scale.repeat_interleave(35, 1)
    assert ((packed.dense() - weight).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_form_is_a_text_and_back(kind: str) -> None:
    form = pack(torch.randn(8, 64, dtype=torch.bfloat16), kind).form
    assert Form.read(str(form)) == form
    assert Form.read(str(form._replace(halves=True))) == form._replace(halves=True)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48; expected a divisor"):
        pack(torch.randn(4, 64), "int4", 48)
    with pytest.raises(ValueError, match="nf4 in blocks of 48"):
        pack(torch.randn(4, 64), "nf4", 48)
    with pytest.raises(ValueError, match="mxfp4 in blocks of 64; its specification has 32"):
        pack(torch.randn(4, 64), "mxfp4", 64)
    with pytest.raises(ValueError, match="double_quant is for nf4 and fp4"):
        pack(torch.randn(4, 64), "int8", double_quant=True)
    with pytest.raises(ValueError, match="the format is 'int3'"):
        pack(torch.randn(4, 64), "int3")
    gptq = type("QuantLinear", (torch.nn.Module,), {"__module__": "auto_gptq.nn_modules.qlinear"})()
    assert layers.kind_of(gptq) == "" and "GPTQ" in layers.why_refused(gptq)
    assert "activations" in layers.why_refused(bnb.nn.Linear8bitLt(8, 8))
    assert layers.why_refused(torch.nn.Linear(2, 2)) == ""


def test_a_layer_has_plain_tensors() -> None:
    """They move, save, load and are copied as any others, on the meta device too."""
    layer = QuantizedLinear(nf4.pack(torch.randn(8, 64)), torch.randn(8))
    x = torch.randn(3, 64)
    other = QuantizedLinear(nf4.pack(torch.randn(8, 64)), torch.zeros(8))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert {type(tensor) for tensor in layer.state_dict().values()} == {torch.Tensor}
    assert layer.to("meta")(x.to("meta")).shape == (3, 8)
