"""Linear layers whose weights are 8-bit floats (E4M3), for decoding on GPUs from Hopper on: half the bytes of bf16.

Every row of a weight has a scale, and so has every row of the activations, chosen as they come: an outlier channel of
one token spoils no other token's.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

import torch
from torch import Tensor, nn

TYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of the type
STEP = 16  # the GPU's products want inputs and outputs in multiples of it


class Float8Linear(nn.Module):
    """x [.., K] -> [.., N]; `weight` [N, K] times `scale` [N, 1] is about the weight of the layer it is made of."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight, scale = round_rows(layer.weight)
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in (weight, scale))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        values, scales = round_rows(x.flatten(0, -2))
        product = multiply(values, scales, self.weight, self.scale, x.dtype)
        product = product if self.bias is None else product + self.bias
        return product.unflatten(0, x.shape[:-1])


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, K] as 8-bit floats, and the scale [M, 1] float32 that each is to be multiplied with."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(TYPE), scale


def multiply(values: Tensor, scales: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, K] and [N, K] with their scales -> [M, N] in `dtype`; where there is no such instruction in float32."""
    if values.is_cuda:
        return torch._scaled_mm(values, weight.t(), scales, scale.t().contiguous(), out_dtype=dtype)
    return ((values.float() @ weight.float().t()) * scales * scale.t()).to(dtype)


def takes(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of a size that the GPU multiplies."""
    return isinstance(layer, nn.Linear) and not (layer.in_features % STEP or layer.out_features % STEP)


def replace_linears(module: nn.Module) -> None:
    """Put 8-bit layers in the place of all linear ones of a module that can be."""
    for name, child in list(module.named_children()):
        if takes(child):
            assert isinstance(child, nn.Linear)
            setattr(module, name, Float8Linear(child))
        else:
            replace_linears(child)
