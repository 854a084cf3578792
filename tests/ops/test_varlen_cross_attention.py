"""varlen_cross_attention on both backends against a loop over utterances and heads, empty sequences and all."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from soundwave_fast.ops import attention_backends, peak_gather, reference, varlen_cross_attention
from soundwave_fast.ops.backend import use_backend
from soundwave_fast.ops.pure_torch import varlen_cross_attention as pure_torch
from soundwave_fast.ops.varlen_cross_attention import _varlen_cross_attention, _varlen_cross_attention_backward
from tests.ops.backends import DEVICE, DTensor
from tests.ops.numerics import BACKWARD, FORWARD, assert_within_budget

RAGGED = ([3, 0, 17, 1, 5, 0], [7, 4, 65, 9, 0, 0])  # no queries, no keys, neither, one query
SHAPES = [  # lengths, H, G, d
    (RAGGED, 4, 4, 32),
    (RAGGED, 6, 2, 24),
    (([20, 33], [70, 1]), 2, 2, 80),
    (([9, 30], [64, 33]), 2, 1, 96),
    (([18, 40], [50, 90]), 1, 1, 128),
    (([1], [1]), 3, 1, 64),
    (([0, 0], [0, 0]), 2, 2, 32),
    (([130, 2], [40, 70]), 2, 2, 64),  # more queries than one program holds
    (([60, 9], [33, 20]), 6, 2, 32),  # likewise, through the heads that share a key head
]
SHARED_OR_NOT = pytest.mark.parametrize("G", [2, 4], ids=["two share a key head", "a key head each"])


def offsets(lengths) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(DEVICE)


def make(lengths, H=4, G=2, d=8, extra=2, dtype=torch.float32, seed=0, grads=(1, 1, 1)):
    """q, k and v with `extra` rows of no utterance."""
    generator = torch.Generator().manual_seed(seed)
    rows_q, rows_k = (sum(x) + extra for x in lengths)
    shapes = [(rows_q, H, d), (rows_k, G, d), (rows_k, G, d)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]
    return [x.requires_grad_(bool(need)) for x, need in zip(tensors, grads)]


def run(tensors, lengths, **kwargs):
    cu_q, cu_k = (offsets(x) for x in lengths)
    return varlen_cross_attention(*tensors, cu_q, cu_k, max(lengths[0]), max(lengths[1]) + 3, **kwargs)


def loop(tensors, lengths, **kwargs):
    return reference.varlen_cross_attention(*tensors, *(offsets(x).tolist() for x in lengths), **kwargs)


def gradients(out, tensors, weights):
    grads = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True) if out.requires_grad else [None] * 3
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors)]


def check_budget(tensors, lengths, **kwargs):
    """Output and gradients against float64, within so many times the error of the loop in the same dtype."""
    truth = [x.detach().double().requires_grad_() for x in tensors]
    weights = torch.randn(tensors[0].shape, dtype=torch.float64, device=DEVICE).to(tensors[0].dtype)
    results = []
    for f, x in ((run, tensors), (loop, tensors), (loop, truth)):
        out = f(x, lengths, **kwargs)
        results.append((out, *gradients(out, x, weights.to(x[0].dtype))))
    assert all(x.dtype == tensors[0].dtype for x in results[0])
    for i, columns in enumerate(zip(*results)):
        assert_within_budget(*columns, BACKWARD if i else FORWARD)


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    + [(shape, torch.float16) for shape in SHAPES[:5]],
    ids=str,
)
def test_error_budget(backend, poison, shape, dtype):
    lengths, H, G, d = shape
    check_budget(make(lengths, H, G, d, dtype=dtype), lengths)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_float64(poison, shape):
    lengths, H, G, d = shape
    tensors = make(lengths, H, G, d, dtype=torch.float64)
    out, want = run(tensors, lengths, softmax_scale=0.3), loop(tensors, lengths, softmax_scale=0.3)
    torch.testing.assert_close(out, want)
    weights = torch.randn_like(out)
    torch.testing.assert_close(gradients(out, tensors, weights), gradients(want, tensors, weights))
    with use_backend("triton"):  # there is no kernel for it: the torch path steps in
        assert torch.equal(run(tensors, lengths, softmax_scale=0.3), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [([4], [6000]), ([3, 20], [1500, 700]), ([1500], [9])], ids=str)
def test_long(backend, lengths, dtype):
    check_budget(make(lengths, 1, 1, 64, dtype=dtype), lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("G", "d"), [(1, 64), (2, 64), (2, 80)])
@pytest.mark.parametrize("seed", range(3))
def test_large_scores(backend, dtype, G, d, seed):
    """Scores in the thousands: one key takes all the weight, and exp of anything but differences overflows.

    dq and dk all but vanish then. What is left of dP - dO O^T is rounding, and is held to that.
    """
    lengths = ([5, 9], [40, 70])
    ours = [(30 * x.detach()).requires_grad_() for x in make(lengths, 2, G, d, dtype=dtype, seed=seed)]
    eager, truth = ([x.detach().to(t).requires_grad_() for x in ours] for t in (dtype, torch.float64))
    weights = torch.randn(ours[0].shape, device=DEVICE).to(dtype)
    outs = [run(ours, lengths), loop(eager, lengths), loop(truth, lengths)]
    assert_within_budget(*outs, FORWARD)
    grads = [gradients(o, x, weights.to(o.dtype)) for o, x in zip(outs, (ours, eager, truth))]
    assert_within_budget(*(g[2] for g in grads), BACKWARD)
    score_grads = (weights.abs().double().flatten(1).sum(1).max() * truth[2].abs().max()).item()
    for i, (other, queries) in enumerate([(truth[1], 1), (truth[0], 2 * max(lengths[0]))]):
        rounding = torch.finfo(dtype).eps * score_grads * d**-0.5 * other.abs().max() * queries
        errors = [(g[i].double() - grads[2][i]).abs().max() for g in grads[:2]]
        assert errors[0] <= BACKWARD * errors[1] + rounding


@pytest.mark.parametrize("G", [1, 2])
def test_far_negative_scores(backend, G):
    """Masked keys, whose score would be 0, must not stand out against real ones at -1800."""
    lengths = ([3], [37])
    q, k, v = make(lengths, 2, G, 64)
    q.data.mul_(0.1).sub_(15.0), k.data.mul_(0.1).add_(15.0)
    truth = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weights = torch.randn_like(q)
    out, want = run((q, k, v), lengths), loop(truth, lengths)
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-3)
    for got, e in zip(gradients(out, (q, k, v), weights), gradients(want, truth, weights)):
        torch.testing.assert_close(got.double(), e, rtol=1e-2, atol=1e-2)


@SHARED_OR_NOT
@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(backend, poison, scale, G):
    check_budget(make(RAGGED, 4, G, 24), RAGGED, softmax_scale=scale)


@pytest.mark.conformance
@SHARED_OR_NOT
def test_rows_without_a_partner_are_exactly_zero(backend, poison, G):
    lengths = ([2, 3, 0, 4], [5, 0, 6, 3])
    tensors = make(lengths, G=G, extra=40)
    for x, n in zip(tensors, (9, 14, 14)):
        x.data[n:] = float("nan")  # rows of no utterance are not read either
    out = run(tensors, lengths)
    dq, dk, dv = torch.autograd.grad(out.sum(), tensors)
    idle_q, idle_k = [*range(2, 5), *range(9, 49)], [*range(5, 11), *range(14, 54)]
    for x, idle in ((out, idle_q), (dq, idle_q), (dk, idle_k), (dv, idle_k)):
        assert x.isfinite().all()
        assert (x[idle] == 0).all()
        assert (x.flatten(1).abs().sum(1) > 0).sum() == x.shape[0] - len(idle)


@SHARED_OR_NOT
def test_nothing_to_attend_still_has_gradients(backend, poison, G):
    for lengths in (([2, 0], [0, 3]), ([0], [0]), ([], [])):
        tensors = make(lengths, G=G, extra=1)
        cu = [offsets(x) for x in lengths]
        out = varlen_cross_attention(*tensors, *cu, 2, 3)
        assert out.abs().sum() == 0
        for grad, x in zip(torch.autograd.grad(out.sum(), tensors), tensors):
            assert grad.shape == x.shape and grad.abs().sum() == 0
    empty = make(([0], [0]), G=G, extra=0)
    assert run(empty, ([0], [0])).shape == (0, 4, 8)


@pytest.mark.parametrize("grads", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)], ids=str)
@SHARED_OR_NOT
def test_gradients_only_where_asked(backend, grads, launches, monkeypatch, G):
    asked = []
    lengths = ([3, 0, 6], [7, 4, 40])
    module = attention_backends.module(backend)
    monkeypatch.setattr(module, "backward", lambda *a, f=module.backward: (asked.append(a[-2:]), f(*a))[1])
    want = make(lengths, G=G)
    want = torch.autograd.grad(run(want, lengths).sum(), want)
    tensors = make(lengths, G=G, grads=grads)
    asked.clear()
    launches.clear()
    out = run(tensors, lengths)
    assert out.requires_grad == any(grads)
    if any(grads):
        out.sum().backward()
        assert asked == [(bool(grads[0]), bool(grads[1] or grads[2]))]
    for x, need, grad in zip(tensors, grads, want):
        assert (x.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(x.grad, grad)
    if backend == "triton":
        assert launches == ["_forward_kernel"] + ["_stationary_kernel"] * any(grads)


def test_few_queries_take_one_backward_launch(launches):
    """More than a program can hold take two, or one where keys and values need no gradient."""
    with use_backend("triton"):
        for lengths, grads, kernels in [
            (([20, 128], [9, 30]), (1, 1, 1), ["_stationary_kernel"]),
            (([20, 129], [9, 30]), (1, 1, 1), ["_queries_kernel", "_keys_kernel"]),
            (([20, 129], [9, 30]), (1, 0, 0), ["_queries_kernel"]),
            (([20, 129], [9, 30]), (0, 0, 1), ["_queries_kernel", "_keys_kernel"]),
        ]:
            if DEVICE == "cuda":  # fewer on an A100
                lengths = ([20, 65 if "_queries_kernel" in kernels else 64], lengths[1])
            tensors = make(lengths, 1, 1, 128, dtype=torch.bfloat16, grads=grads)
            launches.clear()
            run(tensors, lengths).sum().backward()
            if not (DEVICE == "cuda" and lengths[0][1] == 65 and launches[1:] == ["_stationary_kernel"]):
                assert launches == ["_forward_kernel", *kernels]


@pytest.mark.parametrize("G", [1, 2])
def test_same_bits_every_time_and_in_any_company(backend, G):
    """Run to run, and for an utterance alone or in a batch."""
    lengths = ([3, 17], [70, 9])
    tensors = make(lengths, 2, G, 32)
    results = [torch.autograd.grad(run(tensors, lengths).square().sum(), tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    alone = [x.detach()[: n[0]] for x, n in zip(tensors, (lengths[0], lengths[1], lengths[1]))]
    assert torch.equal(run(alone, ([3], [70])), run(tensors, lengths)[:3])


@SHARED_OR_NOT
def test_layouts(backend, G):
    """Halves of a fused projection, heads before rows, elements apart or before rows, one row for all: values count."""
    lengths = ([6, 2], [9, 5])
    q, k, v = (x.detach() for x in make(lengths, 4, G, 16, extra=0))
    want = loop((q, k, v), lengths)
    torch.testing.assert_close(run((q, k, v), lengths), want)
    fused = torch.stack([k, v], 1)
    for tensors in [
        (q, *fused.unbind(1)),
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)],
        [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)],
        [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)],
        (q, k, v.transpose(0, 1).contiguous().transpose(0, 1)),
    ]:
        torch.testing.assert_close(run(tensors, lengths), want)
        leaves = [[x.detach().requires_grad_() for x in some] for some in (tensors, (q, k, v))]
        weights = torch.randn(16, 4, 8, device=DEVICE).permute(2, 1, 0)
        grads = [torch.autograd.grad(f(x, lengths), x, weights) for f, x in zip((run, loop), leaves)]
        torch.testing.assert_close(*grads)
    same = [x[:1].expand(x.shape) for x in (q, k, v)]
    torch.testing.assert_close(run(same, lengths), loop(same, lengths))
    cu = [offsets(x).long() for x in lengths]
    torch.testing.assert_close(varlen_cross_attention(q, k, v, *cu, 6, 9), want)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expanded = torch.autograd.grad(run(leaves, lengths).sum(), leaves)  # a gradient that is one number in memory
    other = run(leaves, lengths)
    torch.testing.assert_close(torch.autograd.grad(other, leaves, torch.ones_like(other)), expanded)


def test_rows_past_2_31_elements(backend):
    """Keys that lie further out than an int32 reaches (virtual memory alone: the rows before them are not touched)."""
    before, d = (1 << 31) // 64 + 3, 64
    k = torch.empty(before + 5, 1, d, dtype=torch.bfloat16, device=DEVICE)
    k[before:] = torch.randn(5, 1, d).to(k)
    q = torch.randn(2, 1, d).to(k)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 0, 2], [0, before, before + 5]))
    out = varlen_cross_attention(q, k, k, cu_q, cu_k, 2, before)
    torch.testing.assert_close(out, run((q, k[before:], k[before:]), ([2], [5])))


@pytest.mark.parametrize("G", [1, 2])
def test_gradcheck(G):
    lengths = ([2, 1, 0], [3, 0, 2])
    tensors = make(lengths, H=2, G=G, d=3, extra=1, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *x: run(x, lengths), tensors)


def test_torch_path_keeps_what_fits_and_computes_the_rest_again(monkeypatch):
    lengths = ([3, 5, 2, 4], [7, 20, 3, 11])
    tensors = make(lengths, 4, 2, 8, dtype=torch.float64)
    want = torch.autograd.grad(run(tensors, lengths).square().sum(), tensors)
    monkeypatch.setattr(pure_torch, "KEPT", 150)  # the first utterance, and the third
    monkeypatch.setattr(pure_torch, "_AT_ONCE", 60)  # one head at a time
    got = torch.autograd.grad(run(tensors, lengths).square().sum(), tensors)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("R", [1, 2])
def test_torch_path_of_other_devices(R):
    """The padded block that stands in where lengths are not on the host."""
    lengths = ([3, 0, 4, 1], [6, 2, 0, 5])
    q, k, v = (x.detach() for x in make(lengths, 2 * R, 2, 8, dtype=torch.float64))
    blocks = pure_torch._Padded(*(offsets(x) for x in lengths), 4, 6)
    queries, keys, values = blocks.queries(q, k), blocks.keys(k), blocks.keys(v)
    weights = blocks.weights(queries, keys, 8**-0.5)
    out = blocks.unpad_queries(weights @ values, torch.empty_like(q))
    torch.testing.assert_close(out, run((q, k, v), lengths, backend="torch"))
    assert torch.equal(blocks.unpad_keys(keys, torch.full_like(k, 9.0))[:-2], k[:-2])


# -- dropout -------------------------------------------------------------------------------------------------------


def dropout_factors(lengths, H, G, d, p, seed):
    """(Nq, H, longest key) weights after dropout over weights before, seen through values that pick one key each."""
    q, k, v = (x.detach() for x in make(lengths, H, G, d, extra=0))
    v.zero_()
    for start, n in zip(offsets(lengths[1]).tolist(), lengths[1]):
        v[start : start + n, :, :n] = torch.eye(n, device=DEVICE)[:, None]
    torch.manual_seed(seed)
    dropped = run((q, k, v), lengths, dropout_p=p)
    return dropped / run((q, k, v), lengths).clamp_min(1e-30)


@pytest.mark.parametrize("case", [([5, 30], [64, 40], 2, 2), ([40, 150], [60, 33], 2, 1)], ids=str)
def test_dropout_and_its_gradients(backend, case):
    """Every weight is 0 or grown by 1 / (1 - p), in the right share, and backward drops the same ones."""
    *lengths, H, G = case
    p, d = 0.25, 64
    factors = dropout_factors(lengths, H, G, d, p, seed=3)
    tensors = make(lengths, H, G, d, extra=0)
    torch.manual_seed(3)
    out = run(tensors, lengths, dropout_p=p)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), tensors)

    truth = [x.detach().double().requires_grad_() for x in tensors]
    want, kept, seen = [], 0, 0
    row = 0
    for b, (nq, nk) in enumerate(zip(*lengths)):
        keys = slice(offsets(lengths[1])[b], offsets(lengths[1])[b + 1])
        queries = truth[0][row : row + nq]
        k, v = (x[keys].repeat_interleave(H // G, 1) for x in truth[1:])
        attention = (torch.einsum("qhd,khd->hqk", queries, k) * d**-0.5).softmax(-1)
        factor = factors[row : row + nq, :, :nk].transpose(0, 1)
        assert ((factor == 0) | ((factor - 1 / (1 - p)).abs() < 1e-3)).all()
        kept, seen = kept + (factor > 0).sum(), seen + factor.numel()
        want.append(torch.einsum("hqk,khd->qhd", attention * (factor > 0) / (1 - p), v))
        row += nq
    assert abs(kept / seen - (1 - p)) < 4 * (p * (1 - p) / seen) ** 0.5
    torch.testing.assert_close(out.double(), torch.cat(want), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((torch.cat(want) * weights).sum(), truth)
    for got, e in zip(grads, expected):
        torch.testing.assert_close(got.double(), e, rtol=1e-3, atol=1e-4)


def test_dropout_masks_differ_everywhere_but_under_one_seed(backend):
    lengths = ([40, 40], [40, 40])
    masks = [dropout_factors(lengths, 2, 2, 40, 0.5, seed).sign() for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    pieces = [masks[0][rows, h] for rows in (slice(0, 40), slice(40, 80)) for h in (0, 1)] + [masks[2][:40, 0]]
    for i, a in enumerate(pieces):
        for b in (*pieces[:i], a.roll(1, 0), a.roll(1, 1), a.roll(4, 1)):
            agree = (a == b).float().mean()
            assert abs(agree - 0.5) < 5 * 0.5 / 40, agree  # 1600 fair coins: sigma is 0.5 / 40
    wide = dropout_factors(([20], [128]), 1, 1, 128, 0.5, seed=2).sign()[:, 0]
    blocks = [wide[:, n : n + 16] for n in range(0, 128, 16)]
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            assert abs((a == b).float().mean() - 0.5) < 5 * 0.5 / 320**0.5
    tensors = make(lengths, 2, 2, 40)
    first, second = (run(tensors, lengths, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


# -- as a torch op -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "G"), [(0.0, 2), (0.3, 2), (0.0, 4)])
def test_opcheck(backend, p, G):
    lengths = ([3, 0, 5], [7, 2, 9])
    tensors = make(lengths, 4, G, 8)
    seed = torch.tensor([7], device=DEVICE if backend == "triton" else "cpu") if p else None
    sizes = (*(offsets(x) for x in lengths), 5, 9, None, p, seed, backend)
    torch.library.opcheck(_varlen_cross_attention, (*tensors, *sizes, True))
    q, k, v = (x.detach() for x in tensors)
    out, saved = _varlen_cross_attention(q, k, v, *sizes, True)
    for need in ((True, True),) if p or G == 4 else ((True, False), (False, True)):
        torch.library.opcheck(
            _varlen_cross_attention_backward, (torch.randn_like(q), q, k, v, out, saved, *sizes, *need)
        )


@pytest.mark.parametrize(("p", "G"), [(0.0, 2), (0.3, 2), (0.0, 4)])
def test_compiles_whole_with_at_most_one_recompile(backend, p, G):
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, cu_q, cu_k, max_q, max_k):
        return varlen_cross_attention(q * 2, k, v, cu_q, cu_k, max_q, max_k, dropout_p=p) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for lengths in (([3, 5], [7, 9]), ([6, 9, 1, 5], [20, 1, 9, 3]), ([2, 2, 0], [0, 33, 4])):
        tensors = make(lengths, 4, G, 8)
        args = (*tensors, *(offsets(x) for x in lengths), max(lengths[0]), max(lengths[1]))
        outs = []
        for g in (compiled, f):
            torch.manual_seed(1)
            outs.append(g(*args))
        grads = [torch.autograd.grad(out.square().sum(), tensors) for out in outs]
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(grads[0], grads[1])
    assert counter.frame_count <= 2, f"{counter.frame_count - 1} recompiles"


@pytest.mark.slow
def test_inductor():
    lengths = ([3, 5], [7, 9])
    tensors = make(lengths)
    args = (*tensors, *(offsets(x) for x in lengths), 5, 9)
    out = torch.compile(varlen_cross_attention, fullgraph=True, dynamic=True)(*args)
    torch.testing.assert_close(out, varlen_cross_attention(*args))
    grads = torch.autograd.grad(out.square().sum(), tensors)
    torch.testing.assert_close(grads, torch.autograd.grad(run(tensors, lengths).square().sum(), tensors))


@pytest.mark.parametrize("chosen", ["torch", "triton"])
def test_compiles_with_a_backend_by_name(chosen):
    lengths = ([3, 5], [7, 9])
    tensors = make(lengths)
    args = (*tensors, *(offsets(x) for x in lengths), 5, 9)
    with use_backend(chosen):  # a CPU has "triton" in tests alone
        compiled = torch.compile(varlen_cross_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args, backend=chosen), varlen_cross_attention(*args))


@pytest.mark.gpu
def test_waits_for_nothing_and_runs_in_a_cuda_graph():
    lengths = ([3, 140, 0], [70, 9, 5])
    for p, dtype in ((0.0, torch.bfloat16), (0.2, torch.bfloat16), (0.0, torch.float64)):
        tensors, sizes = make(lengths, 4, 2, 64, dtype=dtype), [offsets(x) for x in lengths]

        def step(tensors=tensors, sizes=sizes, p=p):
            out = varlen_cross_attention(*tensors, *sizes, 140, 70, dropout_p=p)
            return out, *torch.autograd.grad(out.float().square().sum(), tensors)

        want = step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if dtype == torch.bfloat16 and not p:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = step()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_compiles_in_one_graph_with_peak_gather():
    """The number of queries is then known to nobody before the graph runs."""

    def f(x_BTD, tokens_BT, lengths):
        peaks = peak_gather(x_BTD, tokens_BT, lengths)
        kv = x_BTD.flatten(0, 1).unflatten(1, (2, -1))
        T = tokens_BT.shape[1]
        cu_k = torch.arange(tokens_BT.shape[0] + 1, dtype=torch.int32, device=x_BTD.device) * T
        q = peaks.data.unflatten(1, (2, -1))
        return varlen_cross_attention(q, kv, kv, peaks.cu_seqlens, cu_k, peaks.max_len, T)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in ((2, 9), (3, 14)):
        x = torch.randn(B, T, 16, device=DEVICE, requires_grad=True)
        args = (x, torch.randint(0, 3, (B, T), device=DEVICE), torch.full((B,), T, device=DEVICE))
        got, want = compiled(*args), f(*args)
        torch.testing.assert_close(got, want)
        (got,), (want,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
        torch.testing.assert_close(got, want)


# -- what is refused -----------------------------------------------------------------------------------------------


def good() -> dict:
    q, k, v = make(([3], [4]), extra=0)
    return dict(q=q, k=k, v=v, cu_seqlens_q=offsets([3]), cu_seqlens_k=offsets([4]), max_seqlen_q=3, max_seqlen_k=4)


def test_refuses():
    ok = good()
    q, k, v, cu_q = ok["q"], ok["k"], ok["v"], ok["cu_seqlens_q"]
    varlen_cross_attention(**ok)
    for error, name, change in [
        (ValueError, "q must", {"q": q[0]}),
        (TypeError, "k is", {"k": k.double()}),
        (TypeError, "q must", {"q": q.int()}),
        (TypeError, "v is a DTensor", {"v": v.detach().as_subclass(DTensor)}),
        (TypeError, "cu_seqlens_q is a DTensor", {"cu_seqlens_q": cu_q.as_subclass(DTensor)}),
        (TypeError, "cu_seqlens_k is a DTensor", {"cu_seqlens_k": ok["cu_seqlens_k"].as_subclass(DTensor)}),
        (ValueError, "k is on meta", {"k": k.to("meta")}),
        (ValueError, "cu_seqlens_k is on meta", {"cu_seqlens_k": cu_q.to("meta")}),
        (ValueError, "k and v", {"v": v[:2]}),
        (ValueError, "heads", {"k": k[:, :0], "v": v[:, :0]}),
        (ValueError, "heads", {"k": k[:, [0, 1, 1]], "v": v[:, [0, 1, 1]]}),
        (ValueError, "head width", {"q": q[..., :2]}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": offsets([1, 2])}),
        (TypeError, "cu_seqlens_q", {"cu_seqlens_q": cu_q.float()}),
        (ValueError, "dropout_p", {"dropout_p": 1.0}),
        (ValueError, "backend 'fast' is not one of auto, triton", {"backend": "fast"}),
    ]:
        with pytest.raises(error, match=name):
            varlen_cross_attention(**{**ok, **change})


BAD_VALUES = [
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 4]}),
    ("cu_seqlens_k", {"cu_seqlens_k": [1, 4]}),
    ("cu_seqlens_k", {"cu_seqlens_k": [0, 3, 2], "cu_seqlens_q": [0, 1, 1]}),
    ("max_seqlen_k", {"max_seqlen_k": 3}),
    ("max_seqlen_q", {"max_seqlen_q": 2}),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="offsets on a GPU are not read back")
@pytest.mark.parametrize("compiled", [False, True])
def test_refuses_values(backend, compiled):
    f = torch.compile(varlen_cross_attention, fullgraph=True, backend="eager") if compiled else varlen_cross_attention
    for name, change in BAD_VALUES:
        change = {key: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x for key, x in change.items()}
        with pytest.raises(ValueError, match=name):
            f(**{**good(), **change})


def test_bad_offsets_touch_nothing_outside():
    """On a GPU nobody checks them; the kernels clamp, so that rows in the tensors are all they can reach."""
    with use_backend("triton"):
        kernels = attention_backends.module("triton")
        q, k, v = (x.detach() for x in make(([6], [8]), 2, 2, 16, extra=0))
        arena = torch.full((1024, 2, 16), 7.0, device=DEVICE)  # q lies inside: what is written around it shows
        q = arena[500:506].copy_(q)
        for cu_q, cu_k in (([0, 900], [0, 8]), ([-50, 6], [-9, 800]), ([5, 2, 6], [8, 1, 3])):
            cu = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu_q, cu_k)]
            out, lse = kernels.forward(q, k, v, *cu, 6, 8, 0.25, 0.0, None, True)
            kernels.backward(q, q, k, v, out, lse, *cu, 6, 8, 0.25, 0.0, None, True, True)
            assert out.shape == q.shape and (arena[:500] == 7).all() and (arena[506:] == 7).all()
        want, _ = kernels.forward(q, k, v, offsets([6]), offsets([8]), 6, 8, 0.25, 0.0, None, True)
        cu = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([-3, 90], [-4, 900])]
        assert torch.equal(kernels.forward(q, k, v, *cu, 6, 8, 0.25, 0.0, None, True)[0], want)
