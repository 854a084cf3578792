"""From encoder frames to spliced embeddings under torch.compile: whole graphs, few recompiles, eager's values."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tests.model import tiny

SHAPES = [(3, 61), (2, 40), (4, 77), (3, 90), (5, 33), (2, 64), (3, 50), (4, 41), (2, 88), (6, 52)]


def batch(seed: int, B: int, T: int, placeholder: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    S, L = 7 + seed % 4, 9 + seed
    frames = torch.randn(B, T, 32, generator=generator)
    lengths = torch.randint(T // 2, T + 1, (B,), generator=generator)
    targets = torch.randint(5, 150, (B, S), generator=generator)
    ids = torch.randint(5, 150, (B, L), generator=generator)
    ids[:, 3] = placeholder
    return frames, lengths, targets, torch.full((B,), S), ids, torch.ones_like(ids), ids.clone()


@pytest.mark.slow
@pytest.mark.parametrize("ctc_head", ["free", "tied"])
def test_adapters_compile_whole(tiny_parts, ctc_head):
    model, _ = tiny.make_model(tiny_parts, ctc_head=ctc_head)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def road(frames, lengths, targets, target_lengths, ids, mask, labels):
        heard = model.hear(frames, lengths, targets, target_lengths)
        spliced = model._splice(ids, mask, labels, model.shrink(heard), "right")
        return heard.ctc[0], spliced.inputs_embeds, spliced.labels

    def results(function, inputs):
        ctc, embeds, labels = function(*inputs)
        (ctc + embeds.square().sum()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return ctc.detach(), embeds.detach(), labels, *grads

    torch._dynamo.reset()
    compiled = torch.compile(road, fullgraph=True, dynamic=True, backend=counting)
    compiled_once = 0
    for seed, (B, T) in enumerate(SHAPES):
        inputs = batch(seed, B, T, model.config.audio_token_id)
        ours, eager = results(compiled, inputs), results(road, inputs)
        compiled_once = compiled_once or len(graphs)
        assert len(ours) == len(eager) > 20
        for x, y in zip(ours, eager):
            # eager leaves padding out, the graph computes it: other sizes, other orders of summation
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max() if y.numel() else 0) + 1e-6)
    assert len(graphs) - compiled_once <= 1, "more than one recompile over ten ragged batches"


@pytest.mark.slow
@pytest.mark.parametrize(("semantics", "ctc_head"), [("paper", "tied"), ("released", "free")])
def test_compile_adapters_in_place(tiny_parts, semantics, ctc_head):
    """What generation runs: encoder frames to audio tokens, the three adapters compiled in place, no grad."""
    model, _ = tiny.make_model(tiny_parts, semantics=semantics, ctc_head=ctc_head)
    names, batches = list(model.state_dict()), [batch(seed, B, T, 0)[:2] for seed, (B, T) in enumerate(SHAPES[:4])]
    eager = [model.get_audio_features(encoder_frames=f, frame_lengths=n) for f, n in batches]
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    assert model.compile_adapters(backend=counting, fullgraph=True) is model
    assert list(model.state_dict()) == names
    with torch.no_grad():
        for (frames, lengths), want in zip(batches, eager):
            audio = model.get_audio_features(encoder_frames=frames, frame_lengths=lengths)
            rows = int(want.cu_seqlens[-1])
            assert torch.equal(audio.cu_seqlens, want.cu_seqlens)
            torch.testing.assert_close(audio.data[:rows], want.data[:rows], rtol=1e-4, atol=1e-4)
    assert 3 <= len(graphs) <= 6, "three adapters, each compiled once or, with its sizes no longer fixed, twice"
