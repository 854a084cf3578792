"""linear_argmax on both backends against log_softmax and max in float64: classes, log-probabilities, contract."""

import importlib

import pytest
import torch

from soundwave_fast.ops import linear_argmax, linear_ctc_loss
from soundwave_fast.ops.backend import use_backend
from tests.ops.backends import DEVICE, DTensor
from tests.ops.linear_ctc_cases import INPUT_LENGTHS, TARGET_LENGTHS, B, D, T, V, make, padded, shrink_chunks
from tests.ops.numerics import FORWARD, assert_within_budget

op = importlib.import_module("soundwave_fast.ops.linear_argmax")  # the package exports the function of this name


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    shrink_chunks(monkeypatch)


def truth(hidden, weight, lengths, blank, blank_row=None):
    rows = weight if blank_row is None else torch.cat([weight, blank_row[None]])
    best, arg = (hidden.double() @ rows.double().t()).log_softmax(-1).max(-1)
    past = torch.arange(hidden.shape[1], device=DEVICE) >= torch.tensor(lengths, device=DEVICE)[:, None]
    return arg.masked_fill(past, blank), best.masked_fill(past, 0.0)


@pytest.mark.conformance
@pytest.mark.parametrize("lengths", [None, INPUT_LENGTHS])
@pytest.mark.parametrize("with_blank_row", [False, True])
def test_is_max_of_log_softmax(backend, poison, lengths_known, lengths, with_blank_row):
    hidden, weight, row = make()
    row, blank = (row, V) if with_blank_row else (None, 3)
    want = truth(hidden, weight, lengths or [T] * B, blank, row)
    for given in (lengths, None if lengths is None else torch.tensor(lengths)):
        tokens, log_probs = linear_argmax(hidden, weight, given, blank, blank_row=row)
        assert torch.equal(tokens, want[0]) and tokens.dtype == torch.int64
        torch.testing.assert_close(log_probs, want[1], rtol=1e-12, atol=1e-12)


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_within_the_budget_of_eager(backend, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 20, 96, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    weight = (scale / 10 * torch.randn(97, 96, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)
    want = truth(hidden, weight, [20] * 2, 0)[1]
    rows = weight.t().float() if dtype == torch.float16 and DEVICE == "cpu" else weight.t()
    best, _ = (hidden.to(rows.dtype) @ rows).float().log_softmax(-1).max(-1)
    tokens, log_probs = linear_argmax(hidden, weight)
    assert log_probs.dtype == torch.float32
    assert_within_budget(log_probs, best, want, FORWARD)
    assert (log_probs <= 0).all()
    # Classes may differ where rounding decides, and there alone.
    chosen = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    slack = 16 * torch.finfo(dtype).eps * float((hidden.double() @ weight.double().t()).abs().max())
    assert (chosen >= want - slack).all()


@pytest.mark.parametrize("at", [3, 40])
def test_a_sure_frame_keeps_its_digits(backend, at):
    """log_softmax of logits around 1000: what is left of 1 is far below their last digit."""
    hidden = torch.tensor([[[1000.0, 1.0]]], device=DEVICE)
    weight = torch.zeros(V, 2, device=DEVICE)
    weight[:, 0], weight[:, 1] = 0.9, torch.linspace(0, 1, V, device=DEVICE)
    weight[at] = torch.tensor([0.9, 15.0], device=DEVICE)
    want = (hidden.double() @ weight.double().t()).log_softmax(-1).max(-1)[0]
    assert -1e-4 < want < -1e-6
    tokens, log_probs = linear_argmax(hidden, weight)
    assert tokens.item() == at
    torch.testing.assert_close(log_probs.double(), want, rtol=2e-2, atol=0)


def test_weight_of_another_dtype(backend):
    hidden, weight, row = make(torch.float32)
    want = linear_argmax(hidden, weight.bfloat16().float(), None, V, blank_row=row.bfloat16().float())
    got = linear_argmax(hidden, weight.bfloat16(), None, V, blank_row=row.bfloat16())
    for ours, expected in zip(got, want, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("with_blank_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_are_those_of_the_loss(backend, lengths_known, dtype, with_blank_row):
    hidden, weight, row = make(dtype)
    row, blank = (row, V) if with_blank_row else (None, 0)
    args = (padded(), INPUT_LENGTHS, TARGET_LENGTHS, blank)
    _, want = linear_ctc_loss(hidden, weight, *args, "none", return_argmax=True, blank_row=row)
    assert torch.equal(linear_argmax(hidden, weight, INPUT_LENGTHS, blank, blank_row=row)[0], want)


def test_the_lowest_among_equals(backend, lengths_known):
    hidden, weight, row = torch.ones(1, 3, 2, device=DEVICE), torch.zeros(V, 2, device=DEVICE), torch.ones(2)
    weight[[9, 12, 20, 40]] = 1.0  # equal maxima, two in one chunk and two in others
    assert linear_argmax(hidden, weight, [2], 5)[0].tolist() == [[9, 9, 5]]
    row = row.to(DEVICE)
    assert linear_argmax(hidden, weight, [2], V, blank_row=row)[0].tolist() == [[9, 9, V]]
    assert linear_argmax(hidden, weight, [2], V, blank_row=2 * row)[0].tolist() == [[V, V, V]]


def test_garbage_past_the_length_stays_there(backend, lengths_known):
    hidden, weight, _ = make(torch.float32)
    want = linear_argmax(hidden, weight, INPUT_LENGTHS, 7)
    for b, n in enumerate(INPUT_LENGTHS):
        hidden[b, n:] = torch.nan
    for got, expected in zip(linear_argmax(hidden, weight, INPUT_LENGTHS, 7), want, strict=True):
        assert torch.equal(got, expected)


def test_a_frame_of_nan_spoils_itself_alone(backend):
    hidden, weight, _ = make(torch.float32)
    want_tokens, want = linear_argmax(hidden, weight)
    hidden[1, 2] = torch.nan
    tokens, log_probs = linear_argmax(hidden, weight)
    assert log_probs[1, 2].isnan() and 0 <= tokens[1, 2] < V
    assert log_probs.isnan().sum() == 1
    kept = ~log_probs.isnan()
    assert torch.equal(tokens[kept], want_tokens[kept]) and torch.equal(log_probs[kept], want[kept])


@pytest.mark.parametrize("shape", [(0, 4, D), (3, 0, D), (1, 1, D), (2, 5, 0)])
def test_empty_and_single(backend, shape):
    hidden = torch.randn(shape, device=DEVICE)
    tokens, log_probs = linear_argmax(hidden, torch.randn(V, shape[2], device=DEVICE))
    assert tokens.shape == log_probs.shape == shape[:2]
    if shape[2] == 0:  # all classes alike
        assert (tokens == 0).all()
        torch.testing.assert_close(log_probs.exp(), torch.full_like(log_probs, 1 / V))


def test_strides_do_not_matter(backend):
    hidden, weight, _ = make(torch.float32)
    want = linear_argmax(hidden, weight)
    for h, w in ((hidden.mT.contiguous().mT, weight), (hidden, weight.t().contiguous().t())):
        for got, expected in zip(linear_argmax(h, w), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_results_need_no_gradient_and_autocast_is_followed(backend):
    hidden, weight, row = make(torch.float32)
    tokens, log_probs = linear_argmax(hidden.requires_grad_(), weight.requires_grad_(), blank_row=row, blank=V)
    assert not log_probs.requires_grad and not tokens.requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        halved = linear_argmax(hidden, weight.detach().bfloat16(), blank_row=row, blank=V)
    with torch.no_grad():
        want = linear_argmax(hidden.bfloat16(), weight.bfloat16(), blank_row=row, blank=V)
    for got, expected in zip(halved, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_opcheck(with_lengths):
    hidden, weight, row = make(torch.float32)
    lengths = torch.tensor(INPUT_LENGTHS) if with_lengths else None
    for given, blank in ((None, 0), (row, V)):
        torch.library.opcheck(op._best, (hidden, weight, given, lengths, blank))


def test_compiles_whole_and_seldom():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(linear_argmax, fullgraph=True, backend=count)
    _, weight, row = make(torch.float32)
    for batch, frames in ((3, 9), (4, 12), (2, 10), (8, 15)):
        hidden = torch.randn(batch, frames, D, device=DEVICE)
        lengths = torch.randint(0, frames + 1, (batch,))
        got = compiled(hidden, weight, lengths, V, blank_row=row)
        torch.testing.assert_close(got, linear_argmax(hidden, weight, lengths, V, blank_row=row))
    assert len(graphs) <= 2


def test_backends_agree():
    hidden, weight, _ = make(torch.float32, scale=3.0)
    results = []
    for name in ("torch", "triton"):
        with use_backend(name):
            results.append(linear_argmax(hidden, weight, INPUT_LENGTHS))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"weight": torch.zeros(9, 3).long()}, TypeError, "weight"),
        ({"hidden": torch.zeros(1, 4, 3).long()}, TypeError, "hidden"),
        ({"hidden": torch.zeros(4, 3)}, ValueError, "hidden"),
        ({"weight": torch.zeros(9, 2)}, ValueError, "weight"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "weight"),
        ({"weight": torch.zeros(9, 3).as_subclass(DTensor)}, TypeError, "weight is a DTensor"),
        ({"input_lengths": [5]}, ValueError, "input_lengths"),
        ({"input_lengths": [4, 4]}, ValueError, "input_lengths"),
        ({"input_lengths": torch.tensor([2.0])}, TypeError, "input_lengths"),
        ({"blank": 9}, ValueError, "blank"),
        ({"blank": 8, "blank_row": torch.zeros(3)}, ValueError, "blank"),
        ({"blank": 9, "blank_row": torch.zeros(2)}, ValueError, "blank_row"),
    ],
)
def test_refuses(change, error, name):
    good = {"hidden": torch.zeros(1, 4, 3), "weight": torch.zeros(9, 3), "input_lengths": [4]}
    linear_argmax(**good)
    with pytest.raises(error, match=name):
        linear_argmax(**{**good, **change})


@pytest.mark.gpu
def test_waits_for_nothing_on_a_gpu():
    hidden, weight, row = make(torch.bfloat16)
    for lengths in (None, INPUT_LENGTHS, torch.tensor(INPUT_LENGTHS, device=DEVICE)):
        want = linear_argmax(hidden, weight, lengths, V, blank_row=row)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = linear_argmax(hidden, weight, lengths, V, blank_row=row)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
