"""Which precision a device is fast in."""

from functools import cache

import torch


@cache
def fast_precision(device: torch.device) -> str:
    """`run.precision` for a device: bf16 where it has instructions for it.

    Without them torch computes in bf16 ten to forty times more slowly than in float32.
    """
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16") else "fp32"
    return "bf16" if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
