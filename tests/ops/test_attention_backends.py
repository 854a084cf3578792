"""Peers behind varlen_cross_attention: our rules around them, tested with stand-ins, and the real ones on a GPU.

A stand-in computes what its library would, takes only what its library takes, and leaves NaN wherever the library
leaves memory as it was: in rows without a partner, in rows of no utterance, and in their gradients.
"""

import importlib.util
import types

import pytest
import torch

from soundwave_fast.ops import attention_backends, reference, varlen_cross_attention
from soundwave_fast.ops.backend import use_backend
from tests.ops.backends import DEVICE
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget
from tests.ops.test_varlen_cross_attention import good, gradients, loop, make, offsets, run

LENGTHS = ([3, 0, 4, 1], [6, 2, 0, 5])


class Leaving(torch.autograd.Function):
    """NaN in some rows, forward or backward."""

    @staticmethod
    def forward(ctx, x, rows, where):
        ctx.rows, ctx.where = rows, where
        return x.index_fill(0, rows, float("nan")) if where == "forward" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad.index_fill(0, ctx.rows, float("nan")) if ctx.where == "backward" else grad), None, None


def attend(q, k, v, cu_q, cu_k, scale):
    cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
    idle = []
    for x, ends, other in ((q, cu_q, cu_k), (k, cu_k, cu_q)):
        rows = [i for b, j in enumerate(ends[1:]) for i in range(ends[b], j) if other[b] == other[b + 1]]
        idle.append(torch.tensor(rows + [*range(ends[-1], x.shape[0])], dtype=torch.long))
    q, k, v = (Leaving.apply(x, idle[i > 0], "backward") for i, x in enumerate((q, k, v)))
    return Leaving.apply(reference.varlen_cross_attention(q, k, v, cu_q, cu_k, scale), idle[0], "forward")


def varlen_attn_211(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert q.shape[1] == k.shape[1] and cu_seq_q.dtype == torch.int32
    return attend(q, k, v, cu_seq_q, cu_seq_k, q.shape[2] ** -0.5)


def varlen_attn_213(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, enable_gqa=False):
    assert (q.shape[1] == k.shape[1]) != enable_gqa
    return attend(q, k, v, cu_seq_q, cu_seq_k, scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, deterministic
):
    assert max_seqlen_q > 1 and deterministic and not dropout_p
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


def memory_efficient_attention(query, key, value, attn_bias, p, scale):
    cu_q, cu_k = (offsets(x) for x in attn_bias)
    assert query.shape[:2] == (1, cu_q[-1]) and key.shape[:3] == (1, cu_k[-1], query.shape[2]) and not p
    return attend(query[0], key[0], value[0], cu_q, cu_k, scale)[None]


class BlockDiagonalMask:
    @staticmethod
    def from_seqlens(q_seqlen, kv_seqlen):
        return q_seqlen, kv_seqlen


STAND_INS = {
    "varlen_attn 2.11": types.SimpleNamespace(varlen_attn=varlen_attn_211),
    "varlen_attn 2.13": types.SimpleNamespace(varlen_attn=varlen_attn_213),
    "flash_attn": types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func),
    "xformers": types.SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention,
        fmha=types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)),
    ),
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("name", STAND_INS)
def test_our_rules_hold_around_a_peer(name, heads, monkeypatch):
    real = attention_backends.module
    monkeypatch.setattr(attention_backends, "module", lambda x: STAND_INS[name] if name.startswith(x) else real(x))
    tensors = [x.cpu().detach().requires_grad_() for x in make(LENGTHS, *heads, dtype=torch.float64)]
    cu = [offsets(x).cpu() for x in LENGTHS]
    for scale in (None, 0.3):
        out = attention_backends.call_peer(name.split()[0], *tensors, *cu, 4, 6, scale, 0.0)
        want = varlen_cross_attention(*tensors, *cu, 4, 6, scale, backend="torch")
        torch.testing.assert_close(out, want)
        grads, wanted = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, want))
        torch.testing.assert_close(grads, wanted)
    for lengths in (([0], [0]), ([2, 0], [0, 3]), ([1, 0], [2, 3])):
        tensors = [x.cpu().detach().requires_grad_() for x in make(lengths, *heads, extra=0, dtype=torch.float64)]
        cu = [offsets(x).cpu() for x in lengths]
        out = attention_backends.call_peer(name.split()[0], *tensors, *cu, max(lengths[0]), 3, None, 0.0)
        want = varlen_cross_attention(*tensors, *cu, max(lengths[0]), 3, backend="torch")
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), tensors) for x in (out, want)))


def test_choice(monkeypatch):
    q = torch.zeros(2, 2, 8)
    assert attention_backends.choose("auto", q, 0.0) == attention_backends.choose("torch", q, 0.0) == "torch"
    for backend in ("triton", "varlen_attn", "flash_attn", "xformers"):
        with pytest.raises(ValueError, match=f"backend '{backend}' needs a GPU, q is on cpu"):
            attention_backends.choose(backend, q, 0.0)
    gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 2, 64), device="cuda")

    def like(**change):
        return types.SimpleNamespace(**{**vars(gpu), **change})

    def missing(backend):
        raise ImportError(f"No module named {backend}")

    monkeypatch.setattr(attention_backends, "module", lambda backend: None)
    assert attention_backends.choose("auto", gpu, 0.1) == "triton"
    assert attention_backends.choose("auto", like(dtype=torch.float64), 0.1) == "torch"
    assert attention_backends.choose("auto", like(shape=(2, 2, 256)), 0.1) == "torch"
    assert attention_backends.choose("flash_attn", gpu, 0.1) == "flash_attn"
    for backend, x, p, message in [
        ("triton", like(dtype=torch.float64), 0.0, "backend 'triton' does not take torch.float64"),
        ("triton", like(shape=(2, 2, 136)), 0.0, "backend 'triton' takes heads up to 128 wide, got 136"),
        ("varlen_attn", gpu, 0.1, "backend 'varlen_attn' has no dropout"),
        ("flash_attn", like(dtype=torch.float32), 0.0, "backend 'flash_attn' does not take torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_backends.choose(backend, x, p)
    monkeypatch.setattr(attention_backends, "module", missing)
    with pytest.raises(ValueError, match="backend 'xformers' is not available: No module named xformers"):
        attention_backends.choose("xformers", gpu, 0.0)


def test_auto_reads_the_table(monkeypatch):
    """A backend that was measured to be the fastest is what "auto" stands for, where it is there and takes the call."""
    from csrc_triton import tuning

    gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 2, 96), device="cuda")
    installed = {"triton", "varlen_attn", "flash_attn"}

    def module(backend):
        if backend not in installed:
            raise ImportError(backend)

    def chosen(entry, dropout_p=0.0, **change):
        like = types.SimpleNamespace(**{**vars(gpu), **change})
        with tuning.use_table({"attention": {"bytes 2, d 128": entry, "bytes 2, d 64": {"backend": "varlen_attn"}}}):
            return attention_backends.choose("auto", like, dropout_p)

    monkeypatch.setattr(attention_backends, "module", module)
    assert chosen({"backend": "flash_attn"}) == "flash_attn"
    assert chosen({"backend": "flash_attn"}, shape=(2, 2, 64)) == "varlen_attn"
    assert chosen({"backend": "flash_attn"}, dtype=torch.float32) == "triton"  # another class: no entry
    assert chosen({"backend": "flash_attn"}, shape=(2, 2, 256)) == "torch"  # wider than the kernels
    assert chosen({"backend": "xformers"}) == "triton"  # not installed
    assert chosen({"backend": "quick"}) == "triton" and chosen({"BLOCK_M": 3}) == "triton"
    assert chosen({"backend": "varlen_attn"}) == "varlen_attn"
    assert chosen({"backend": "varlen_attn"}, dropout_p=0.1) == "triton"  # it has none
    with tuning.use_table({"attention": {"bytes 4, d 128": {"backend": "flash_attn"}}}):
        assert attention_backends.choose("auto", gpu, 0.0) == "triton"
        like = types.SimpleNamespace(**{**vars(gpu), "dtype": torch.float32})
        assert attention_backends.choose("auto", like, 0.0) == "triton"  # half precision alone
    assert attention_backends.choose("auto", torch.zeros(2, 2, 8), 0.0) == "torch"


def test_auto_with_a_table_compiles_whole():
    """The table is read while the graph is traced, not in it; a named peer that needs a GPU gives way to ours."""
    from csrc_triton import tuning

    args = good()
    with use_backend("triton"), tuning.use_table({"attention": {"bytes 4, d 64": {"backend": "xformers"}}}):
        compiled = torch.compile(varlen_cross_attention, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**args), varlen_cross_attention(**args))


@pytest.mark.parametrize("backend", ["varlen_attn", "flash_attn", "xformers"])
def test_peer_is_named_where_it_cannot_run(backend):
    if DEVICE == "cuda":
        pytest.skip("peers run on a GPU")
    with pytest.raises(ValueError, match=f"backend '{backend}' needs a GPU"):
        varlen_cross_attention(**good(), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "varlen_attn", "flash_attn", "xformers"])
@pytest.mark.parametrize("shape", [(LENGTHS, 4, 2, 64), (([40, 0, 130], [200, 3, 5]), 2, 2, 128)], ids=str)
def test_real_peers(backend, shape):
    """The same budget, and zeros in the same places, for every backend."""
    package = {"triton": "triton", "varlen_attn": "torch.nn.attention.varlen"}.get(backend, backend)
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    lengths, H, G, d = shape
    ours = make(lengths, H, G, d, dtype=torch.bfloat16)
    eager, truth = ([x.detach().to(t).requires_grad_() for x in ours] for t in (torch.bfloat16, torch.float64))
    weights = torch.randn_like(ours[0])
    outs = [run(ours, lengths, backend=backend), loop(eager, lengths), loop(truth, lengths)]
    assert_within_budget(*outs, FORWARD)
    grads = [gradients(o, x, weights.to(o.dtype)) for o, x in zip(outs, (ours, eager, truth))]
    for columns in zip(*grads):
        assert_within_budget(*columns, BACKWARD)
    for x, e in zip((outs[2], *grads[2]), (outs[0], *grads[0])):
        assert (e[(x == 0).flatten(1).all(1)] == 0).all()
