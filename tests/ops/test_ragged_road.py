"""Peaks, gather and splice in a row: compiled as one graph, without waiting for the device, and in a CUDA graph."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from soundwave_fast.ops import ctc_peaks, peak_gather, peak_times, splice

BATCHES = ((2, 20, 7), (3, 31, 9), (4, 12, 5), (3, 40, 11), (2, 17, 8), (5, 25, 6))  # (B, T, L)
D = 8


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    """Graphs are kept, and counted against a limit, by the function they were made from: `forward`, in most tests."""
    torch._dynamo.reset()


def batch(B: int, T: int, L: int, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    """One utterance a prompt, its placeholder third; the first is empty and the second whole."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    lengths[0], lengths[1] = 0, T
    placeholders = torch.zeros(B, L, dtype=torch.bool)
    placeholders[:, 2] = True
    tensors = {
        "features": torch.randn(B, T, D, generator=generator),
        "tokens": torch.randint(0, 4, (B, T), generator=generator),
        "lengths": lengths,
        "scores": torch.randn(B, T, generator=generator),
        "text": torch.randn(B, L, D, generator=generator),
        "placeholders": placeholders,
        "attention_mask": torch.ones(B, L, dtype=torch.long),
        "labels": torch.randint(0, 9, (B, L), generator=generator),
    }
    tensors = {name: x.to(device) for name, x in tensors.items()}
    for name in ("features", "text"):
        tensors[name].requires_grad_()
    return tensors


def road(x: dict[str, torch.Tensor], capacity: int | None, max_length: int | None, layout: str = "right"):
    tokens, scores = x["tokens"], x["scores"]
    audio = peak_gather(x["features"], tokens, x["lengths"], 0, True, select="peak", scores=scores, capacity=capacity)
    times = peak_times(audio.index, tokens, scores)
    audio = audio.with_data(audio.data * 2)
    out = splice(x["text"], audio, x["placeholders"], x["attention_mask"], x["labels"], layout, max_length)
    grads = torch.autograd.grad(out.inputs_embeds.square().sum(), (x["features"], x["text"]))
    mask = () if layout == "packed" else (out.attention_mask,)
    return out.inputs_embeds, out.position_ids, out.labels, out.cu_seqlens, audio.cu_seqlens, *mask, *times, *grads


def forward(x, capacity, max_length, layout="right", select="first"):
    """What road computes before its backward, as a function that compiles."""
    ruled = {"select": select, "scores": x["scores"], "capacity": capacity}
    audio = peak_gather(x["features"], x["tokens"], x["lengths"], 0, True, **ruled)
    times = peak_times(audio.index, x["tokens"], x["scores"])
    audio = audio.with_data(audio.data * 2)
    out = splice(x["text"], audio, x["placeholders"], x["attention_mask"], x["labels"], layout, max_length)
    mask = () if layout == "packed" else (out.attention_mask,)
    longest = torch.zeros(out.max_len, 1)
    return out.inputs_embeds, *mask, longest, out.labels, out.position_ids, out.cu_seqlens, *times


@pytest.mark.parametrize("sizes", ["bounds", "exact"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_whole_with_at_most_one_recompile(sizes, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, fullgraph=True, dynamic=dynamic, backend=counter)
    for seed, (B, T, L) in enumerate(BATCHES):
        x = batch(B, T, L, seed=seed)
        bounds = (B * T, T + L) if sizes == "bounds" else (None, None)
        got, want = compiled(x, *bounds), forward(x, *bounds)
        leaves = (x["features"], x["text"])
        got += torch.autograd.grad(got[0].square().sum(), leaves)
        want += torch.autograd.grad(want[0].square().sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count <= 2, f"{counter.frame_count - 1} recompiles"


@pytest.mark.parametrize("sizes", ["bounds", "exact"])
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_other_layouts_and_peaks_compile_whole(sizes, layout):
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, (B, T, L) in enumerate(BATCHES[:3]):
        x = batch(B, T, L, seed=seed)
        length = B * (T + L) if layout == "packed" else T + L
        bounds = (B * T, length) if sizes == "bounds" else (None, None)
        got, want = (f(x, *bounds, layout, "peak") for f in (compiled, forward))
        leaves = (x["features"], x["text"])
        got, want = ((*y, *torch.autograd.grad(y[0].square().sum(), leaves)) for y in (got, want))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("select", ["first", "peak"])
def test_peaks_alone_compile_whole(select):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ctc_peaks, fullgraph=True, dynamic=True, backend=counter)
    for seed, (B, T, L) in enumerate(BATCHES):
        x = batch(B, T, L, seed=seed)
        scores = x["scores"] if select == "peak" else None
        for lengths in (x["lengths"], None):
            if lengths is None and seed:  # None is another graph
                continue
            got, want = (f(x["tokens"], lengths, 0, True, select, scores) for f in (compiled, ctc_peaks))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count <= 3, f"{counter.frame_count - 2} recompiles"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["bounds", "exact"])
def test_compiles_with_inductor(sizes):
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for seed, (B, T, L) in enumerate(BATCHES[:2]):
        x = batch(B, T, L, seed=seed)
        bounds = (B * T, T + L) if sizes == "bounds" else (None, None)
        got, want = compiled(x, *bounds), forward(x, *bounds)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_values_raise_when_compiled():
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    peaks = torch.compile(ctc_peaks, fullgraph=True, dynamic=True, backend="aot_eager")
    x = batch(3, 20, 6)
    compiled(x, 60, 26)
    with pytest.raises(ValueError, match="max_length is 3, but"):
        compiled(x, 60, 3)
    with pytest.raises(ValueError, match="capacity is 2, but"):
        compiled(x, 2, 26)
    with pytest.raises(ValueError, match="row 1 that attention_mask calls padding"):
        attention_mask = x["attention_mask"].clone()
        attention_mask[1, 2] = 0
        compiled({**x, "attention_mask": attention_mask}, 60, 26)
    with pytest.raises(ValueError, match="3 placeholders, but audio holds 2 segments|row 2 has 0"):
        placeholders = x["placeholders"].clone()
        placeholders[2] = False
        compiled({**x, "placeholders": placeholders}, 60, 26)
    for lengths in (torch.tensor([0, 21, 5]), torch.tensor([0, -1, 5])):
        with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.20"):
            peaks(x["tokens"], lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_nothing_waits_for_the_gpu(layout):
    x = batch(4, 30, 9, "cuda")
    length = 4 * 39 if layout == "packed" else 39
    want = road(x, 120, length, layout)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = road(x, 120, length, layout)
        host = peak_gather(x["features"], x["tokens"], [0, 30, 5, 2], capacity=128)  # lengths from the host
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert host.lengths.tolist()[0] == 0


@pytest.mark.gpu
def test_one_copy_to_the_host_each_where_sizes_are_asked_for():
    x = batch(4, 30, 9, "cuda")
    road(x, None, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            road(x, None, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 2  # peak_gather's and splice's


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x = batch(4, 30, 9, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        road(x, 120, 39)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = road(x, 120, 39)
    for seed in (1, 2):
        fresh = batch(4, 30, 9, "cuda", seed=seed)
        with torch.no_grad():
            for name in x:
                x[name].copy_(fresh[name])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, road(fresh, 120, 39)))


@pytest.mark.gpu
def test_gpu_says_what_the_cpu_says():
    for seed, (B, T, L) in enumerate(BATCHES):
        for layout in ("right", "left", "packed"):
            ours = road(batch(B, T, L, "cuda", seed), None, None, layout)
            assert all(
                torch.equal(a.cpu(), b) for a, b in zip(ours, road(batch(B, T, L, seed=seed), None, None, layout))
            )


def test_road_on_the_cpu_in_every_layout():
    """The road that the GPU tests take, against its parts: nothing is lost on the way, whatever the layout."""
    x = batch(*BATCHES[1])
    audio = peak_gather(x["features"], x["tokens"], x["lengths"], 0, True, select="peak", scores=x["scores"])
    for layout in ("right", "left", "packed"):
        embeds, positions, labels, cu_seqlens, *_ = road(x, None, None, layout)
        assert cu_seqlens.diff().tolist() == [n + 8 for n in audio.lengths.tolist()]
        taken = labels.ne(-100).sum()  # packed, no prompt's first is
        assert taken == (3 * 7 if layout == "packed" else 3 * 8) and positions.max() == audio.max_len + 7
        whole = embeds.double().sum()
        kept = x["text"][~x["placeholders"]].double().sum() + 2 * audio.data.double().sum()
        torch.testing.assert_close(whole, kept, rtol=1e-9, atol=1e-9)
