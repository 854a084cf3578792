"""Matrix products for ops that work in chunks: the fastest library torch reaches, accumulating in float32 or better."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _prefers_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN shall multiply what torch.mm hands to MKL: float32 on AVX-512.

    MKL keeps to AVX2 on AMD's cores, where oneDNN is twice as fast; on Intel's they are alike. The operator is the one
    that inductor calls for a linear layer.
    """
    return (
        a.device.type == "cpu" and a.dtype == torch.float32 and a.numel() > 0 and b.numel() > 0
        and torch.backends.mkldnn.enabled and _has_onednn()
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    return x if 1 in x.stride() else x.contiguous()


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in their dtype: in `out`, or in fresh memory where the library cannot write to a given place."""
    if _prefers_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b.t()), None, "none", [], "")
    return torch.mm(a, b, out=out)


def add_mm(out: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, overwrite: bool = False) -> None:
    """out += scale * (a @ b), or out = ... with overwrite; scale broadcasts against out.

    out is as wide as a and b or wider. On CUDA a product of halves is never rounded to half; on the CPU, where no
    library offers that, it is, once a call.
    """
    widen = {"out_dtype": out.dtype} if a.is_cuda and out.dtype != a.dtype else {}
    if scale is None and (widen or out.dtype == a.dtype) and not _prefers_onednn(a, b):
        if overwrite:
            torch.mm(a, b, out=out, **widen)
        else:
            torch.addmm(out, a, b, out=out, **widen)
        return
    product = torch.mm(a, b, **widen) if widen else mm(a, b)
    if scale is not None:
        product = product.to(out.dtype).mul_(scale)
    if overwrite:
        out.copy_(product)
    else:
        out.add_(product)
