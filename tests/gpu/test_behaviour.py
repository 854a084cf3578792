"""What holds beside the values: bitwise repetition, CUDA graphs, no waiting, compilation, more than 2^31 elements."""

import pytest
import torch
from transformers import LlamaConfig, WhisperConfig

from soundwave_fast.model import SoundwaveConfig
from soundwave_fast.model.alignment_adapter import AlignmentAdapter
from soundwave_fast.ops import ctc_loss, peak_gather
from tests.gpu import calls
from tests.gpu.calls import ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
HALF = torch.bfloat16
every_call = pytest.mark.parametrize("name", calls.CALLS)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@every_call
def test_bitwise_the_same_over_20_runs(device, shape, name):
    call = calls.CALLS[name](calls.Inputs(device, HALF), shape)
    first = call()
    assert not any(x.isnan().any() for x in first if x.is_floating_point())
    for _ in range(19 if ON_GPU else 1):
        assert same(call(), first)


def alignment_adapter(inputs: calls.Inputs, shape: dict[str, int]) -> calls.Call:
    D, heads = shape["D"], shape["H"]
    text = LlamaConfig(hidden_size=D, num_attention_heads=heads, num_hidden_layers=1, vocab_size=50)
    config = SoundwaveConfig(WhisperConfig(d_model=D // 4), text, adapter_dropout=0.0)
    torch.manual_seed(0)
    adapter = AlignmentAdapter(config).to(inputs.device, inputs.dtype)
    frames = inputs.normal(shape["B"], 2 * shape["T"], D // 4).requires_grad_()
    lengths = inputs.ints(shape["T"], 2 * shape["T"] + 1, shape["B"])

    grad = inputs.normal(shape["B"], shape["T"], D)
    return calls.Call(lambda: adapter(frames, lengths), (frames, *adapter.parameters()), grad)


STATIC = {**calls.CALLS, "alignment adapter": alignment_adapter}


@pytest.mark.parametrize("name", [name for name in STATIC if "dropout" not in name])
def test_cuda_graph(device, shape, name):
    """Captured once and replayed twice, the second time over memory that other work has used in between."""
    call = STATIC[name](calls.Inputs(device, HALF), shape)
    truth = call()
    if not ON_GPU:
        assert same(call(), truth)
        return
    out = replayed(call)[0]
    if name in calls.CALLS:
        assert same(out, truth)
    else:  # torch's own attention, which promises no bits
        for x, y in zip(out, truth, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def replayed(call: calls.Call) -> tuple[list[torch.Tensor], torch.cuda.CUDAGraph]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        for x in out:
            x.fill_(-7)
        graph.replay()
    torch.cuda.synchronize()
    return out, graph


def test_graph_of_adapters_follows_its_tokens(device, shape):
    """The number of kept frames may change from replay to replay."""
    inputs = calls.Inputs(device, HALF)
    call, tokens = calls.adapters(inputs, shape)
    out, graph = replayed(call) if ON_GPU else (None, None)
    for _ in range(3):
        tokens.copy_(inputs.runs(*tokens.shape))
        if ON_GPU:
            graph.replay()
            torch.cuda.synchronize()
        else:
            out = call()
        assert same(out, call())


@every_call
def test_nothing_waits_for_the_gpu(device, shape, name):
    call = calls.CALLS[name](calls.Inputs(device, HALF), shape)
    call()
    if not ON_GPU:
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["linear_ctc_loss trainable", "ctc_loss", "attention, few queries", "adapters"])
def test_compiles_whole(device, shape, name):
    """fullgraph, forward and backward; inductor on a GPU, where graph capture in a rehearsal is enough."""
    shape = {**shape, "V": min(shape["V"], 8193)}
    call = calls.CALLS[name](calls.Inputs(device, HALF), shape)
    torch._dynamo.reset()
    compiled = torch.compile(call.forward, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for ours, truth in zip(call.run(compiled), call.run(call.forward), strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=2e-2)


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_ctc_loss_past_31_bits(device, shape):
    """The last of so many utterances gets what it gets alone."""
    T, B, C, S = (750, 23, 128257, 100) if ON_GPU else (9, 4, 40, 3)
    if ON_GPU:
        assert T * B * C > 2**31
        if free_bytes() < 30 << 30:
            pytest.skip("needs 30 GiB of free GPU memory")
    inputs = calls.Inputs(device, HALF)
    log_probs = inputs.normal(T, B, C)
    for b in range(B):
        log_probs[:, b] = log_probs[:, b].log_softmax(-1)
    log_probs.requires_grad_()
    targets = inputs.ints(1, C, B, S)
    ctc_loss(log_probs, targets, [T] * B, [S] * B, reduction="sum").backward()
    for b in (0, B - 1):
        alone = log_probs.detach()[:, b : b + 1].clone().requires_grad_()
        ctc_loss(alone, targets[b : b + 1], [T], [S], reduction="sum").backward()
        assert torch.equal(log_probs.grad[:, b : b + 1], alone.grad)


def test_peak_gather_past_31_bits(device):
    B, T, D = (64, 8200, 4096) if ON_GPU else (3, 20, 24)
    if ON_GPU:
        assert B * T * D > 2**31
        if free_bytes() < 30 << 30:
            pytest.skip("needs 30 GiB of free GPU memory")
    inputs = calls.Inputs(device, HALF)
    features, tokens = inputs.normal(B, T, D).requires_grad_(), inputs.runs(B, T)
    tokens[-1, -1] = 99  # the very last frame is kept
    packed = peak_gather(features, tokens)
    assert packed.index[-1] == B * T - 1
    assert torch.equal(packed.data[-1], features.detach()[-1, -1])
    packed.data.backward(packed.data.detach())
    assert torch.equal(features.grad[-1, -1], features.detach()[-1, -1])
    keep = torch.zeros(B * T, dtype=torch.bool, device=device)
    keep[packed.index] = True
    b = B - 1
    rows = keep.view(B, T)[b]
    assert torch.equal(features.grad[b], features.detach()[b] * rows[:, None])
