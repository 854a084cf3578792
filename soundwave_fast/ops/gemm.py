"""Matrix products for ops that work in chunks: the fastest library torch reaches, accumulating in float32 or better."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from soundwave_fast.ops.backend import shortcut


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, values and gradients: x (..., D), weight (O, D), bias (O,) -> (..., O).

    On a CPU where oneDNN is the faster library its three products (forward, and two of backward) go there.
    """
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _run(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


@torch.library.custom_op("soundwave_fast::linear", mutates_args=())
def _linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    if not _prefers_onednn(x_ND, weight_OD):
        return F.linear(x_ND, weight_OD, bias_O)
    return torch.ops.mkldnn._linear_pointwise(_dense(x_ND), _dense(weight_OD), bias_O, "none", [], "")


@_linear.register_fake
def _(x_ND, weight_OD, bias_O):
    return x_ND.new_empty(x_ND.shape[0], weight_OD.shape[0])


@torch.library.custom_op("soundwave_fast::linear_backward", mutates_args=())
def _linear_backward(
    grad_NO: Tensor, x_ND: Tensor, weight_OD: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; what is not needed has no elements."""
    empty = x_ND.new_empty(0)
    return (
        mm(grad_NO, weight_OD) if need_x else empty,
        mm(grad_NO.t(), x_ND) if need_weight else empty.clone(),
    )


@_linear_backward.register_fake
def _(grad_NO, x_ND, weight_OD, need_x, need_weight):
    return x_ND.new_empty(x_ND.shape if need_x else 0), x_ND.new_empty(weight_OD.shape if need_weight else 0)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad_NO):
    need_x, need_weight, need_bias = ctx.needs_input_grad
    dx, dweight = _run_backward(grad_NO, *ctx.saved_tensors, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None, grad_NO.sum(0) if need_bias else None


_linear.register_autograd(_backward, setup_context=_save)
_run = shortcut(_linear, _save, _backward)
_run_backward = shortcut(_linear_backward)
