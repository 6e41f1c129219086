"""Linear layers whose weights have 8 or 4 bits: a decoding step on a GPU takes the time of reading them.

8 bits, as floats (E4M3, from Hopper on) or integers: every row of a weight has a scale, and so has every row of the
activations, chosen as they come, so that an outlier channel of one token spoils no other token's. 4 bits: integers with
a scale for every group of inputs; activations stay as they are.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from typing import ClassVar, TypeGuard

import torch
from torch import Tensor, nn

FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FLOAT8: 448.0, INT8: 127.0}
FEWEST_ROWS = 32  # of activations, in those of 8-bit integers
GROUPS = (128, 64, 32)  # inputs that may share a scale of 4-bit weights: the first that divides them all
MOST_ROWS = 64  # of activations that the product with 4-bit weights is the quickest for


class RoundedLinear(nn.Module):
    """x [.., K] -> [.., N], in the place of a linear layer.

    Args:
        layer: whose place it takes, and whose bias. The values of `weight` and `scale` are to be filled in.
    """

    multiples: ClassVar[tuple[int, int]] = (16, 16)  # of inputs and outputs, which the GPU's products want
    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        for name, (shape, dtype) in self.parts(layer).items():
            value = torch.empty(shape, dtype=dtype, device=layer.weight.device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.bias = layer.bias

    @classmethod
    def takes(cls, layer: nn.Module) -> TypeGuard[nn.Linear]:
        """Whether it is a linear layer of a size that the GPU multiplies."""
        inputs, outputs = cls.multiples
        return isinstance(layer, nn.Linear) and not (layer.in_features % inputs or layer.out_features % outputs)

    @classmethod
    def parts(cls, layer: nn.Linear) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of `weight` and `scale`."""
        raise NotImplementedError

    def product(self, rows: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        product = self.product(x.flatten(0, -2))
        product = product if self.bias is None else product + self.bias
        return product.unflatten(0, x.shape[:-1])


class Linear8(RoundedLinear):
    """`weight` [N, K] of 8 bits, times `scale` [N, 1] float32."""

    dtype: ClassVar[torch.dtype]

    @classmethod
    def parts(cls, layer: nn.Linear) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        outputs, inputs = layer.weight.shape
        return {"weight": ((outputs, inputs), cls.dtype), "scale": ((outputs, 1), torch.float32)}


class Float8Linear(Linear8):
    """E4M3; where there is no such product, in float32."""

    dtype = FLOAT8

    def product(self, rows: Tensor) -> Tensor:
        values, scales = round_rows(rows, FLOAT8)
        if rows.is_cuda:
            transposed = self.weight.t(), scales, self.scale.t().contiguous()
            return torch._scaled_mm(values, *transposed, out_dtype=rows.dtype)
        return ((values.float() @ self.weight.float().t()) * scales * self.scale.t()).to(rows.dtype)


class Int8Linear(Linear8):
    """Integers, added up as such."""

    dtype = INT8

    def product(self, rows: Tensor) -> Tensor:
        values, scales = round_rows(rows, INT8)
        missing = max(0, FEWEST_ROWS - len(rows))
        sums = torch._int_mm(nn.functional.pad(values, (0, 0, 0, missing)), self.weight.t())[: len(rows)]
        return (sums * scales * self.scale.t()).to(rows.dtype)


class Int4Linear(RoundedLinear):
    """`weight` [N, K/2] uint8, two inputs a byte, the first in the upper half, 8 added; `scale` [N, G] bfloat16."""

    multiples = (GROUPS[-1], 16)

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        self._packed: tuple[Tensor, Tensor] | None = None  # weight and scale in the order of the product

    @classmethod
    def parts(cls, layer: nn.Linear) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        outputs, inputs = layer.weight.shape
        groups = inputs // group_of(inputs)
        return {"weight": ((outputs, inputs // 2), torch.uint8), "scale": ((outputs, groups), torch.bfloat16)}

    def product(self, rows: Tensor) -> Tensor:
        if len(rows) > MOST_ROWS:  # as a prefill has them
            scale = self.scale.to(rows.dtype).repeat_interleave(group_of(rows.shape[1]), 1)
            return rows @ ((unpack4(self.weight) - 8) * scale).t()
        self._packed = self._packed or self._pack(rows.dtype)
        multiply = torch._weight_int4pack_mm if rows.is_cuda else torch._weight_int4pack_mm_for_cpu
        weight, scale = self._packed
        return multiply(rows.contiguous(), weight, group_of(rows.shape[1]), scale)

    def _pack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What torch takes: tiles of the weight, and [G, N, 2] scales and offsets (0) of the type of the rows."""
        scale = self.scale.t().to(dtype)
        both = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
        tiles = 8 if 2 * self.weight.shape[1] % 128 == 0 else 2
        if self.weight.is_cuda:
            return torch._convert_weight_to_int4pack(self.weight, tiles), both
        return torch._convert_weight_to_int4pack_for_cpu(unpack4(self.weight), tiles), both


LAYERS: dict[str, type[RoundedLinear]] = {"fp8": Float8Linear, "int8": Int8Linear, "int4": Int4Linear}  # by precision


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [M, K] in 8 bits, and the scale [M, 1] float32 that each is to be multiplied with."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[dtype]
    values = x / scale
    return (values if dtype.is_floating_point else values.round_()).to(dtype), scale


def group_of(inputs: int) -> int:
    """How many inputs share a scale of 4-bit weights."""
    return next(group for group in GROUPS if inputs % group == 0)


def pack4(values: Tensor) -> Tensor:
    """[N, K] int8 from -8 to 7 -> [N, K/2] uint8."""
    shifted = (values + 8).to(torch.uint8)
    return shifted[:, 0::2] << 4 | shifted[:, 1::2]


def unpack4(packed: Tensor) -> Tensor:
    """[N, K/2] uint8 -> [N, K] int32 from 0 to 15."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten(1).int()


def replace_linears(module: nn.Module, precision: str) -> None:
    """Put rounded layers in the place of all linear ones of a module that can be."""
    kind = LAYERS[precision]
    for name, child in list(module.named_children()):
        if kind.takes(child):
            setattr(module, name, kind(child))
        else:
            replace_linears(child, precision)
