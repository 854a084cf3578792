"""AlignmentAdapter: 'position' is the released computation, 'time' does not see padding, sizes are the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, WhisperConfig

from soundwave_fast.model import SoundwaveConfig
from soundwave_fast.model.alignment_adapter import AlignmentAdapter
from soundwave_fast.model.shrinking_adapter import ShrinkingAdapter

D = 48


def config(**kwargs) -> SoundwaveConfig:
    text = LlamaConfig(hidden_size=D, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
    return SoundwaveConfig(WhisperConfig(d_model=32), text, **kwargs)


@pytest.mark.conformance
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_position_is_the_released_computation(mode):
    adapter = AlignmentAdapter(config(adapter_attention="position", adapter_dropout=0.0)).double()
    getattr(adapter, mode)()
    layer = nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, norm_first=True)  # not batch_first, as released
    released = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double()
    released.load_state_dict(adapter.asr_transformer_encoder.state_dict())
    getattr(released, mode)()
    frames = torch.randn(3, 20, 32, dtype=torch.float64)
    ours, lengths = adapter(frames, torch.tensor([20, 20, 20]))
    for b in range(3):  # one utterance at a time, [1, T, D]: attention over the axis of length 1
        x = adapter.mm_projector1(frames[b : b + 1].reshape(1, 10, 64))
        theirs = adapter.out_norm(released(x))
        torch.testing.assert_close(ours[b : b + 1], theirs, rtol=1e-12, atol=1e-12)
    assert lengths.tolist() == [10, 10, 10]


def test_position_keeps_frames_apart_and_time_mixes_them():
    frames = torch.randn(1, 20, 32)
    other = frames.clone()
    other[:, 10:12] += 1  # adapter frame 5
    for mode, changed in (("position", [5]), ("time", list(range(10)))):
        adapter = AlignmentAdapter(config(adapter_attention=mode)).eval()
        one, two = (adapter(x, torch.tensor([20]))[0] for x in (frames, other))
        assert (one != two).any(-1)[0].nonzero().flatten().tolist() == changed


@pytest.mark.conformance
@pytest.mark.parametrize("grad", [False, True])
def test_time_does_not_see_padding(grad):
    adapter = AlignmentAdapter(config(adapter_attention="time")).double().eval()
    lengths = torch.tensor([24, 10, 2, 1])
    frames = torch.randn(4, 24, 32, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        together, counts = adapter(frames, lengths)
        garbage = frames.clone()
        garbage[1, 10:], garbage[2, 2:] = 1e3, -1e3
        noisy, _ = adapter(garbage, lengths)
        assert counts.tolist() == [12, 5, 1, 0]
        assert together.isfinite().all(), "an utterance without one whole frame must not turn into NaN"
        for b in range(3):
            n = int(counts[b])
            alone, _ = adapter(frames[b : b + 1, : int(lengths[b])], lengths[b : b + 1])
            torch.testing.assert_close(together[b, :n], alone[0], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(noisy[b, :n], alone[0], rtol=1e-11, atol=1e-11)


def test_gradients_of_padding_are_zero():
    adapter = AlignmentAdapter(config(adapter_attention="time", adapter_dropout=0.0))
    frames = torch.randn(2, 12, 32, requires_grad=True)
    out, counts = adapter(frames, torch.tensor([12, 6]))
    (out[0].sum() + (out[1, :3] * torch.randn(3, D)).sum()).backward()
    assert (frames.grad[1, 6:] == 0).all() and (frames.grad[1, :6] != 0).any()


def test_an_odd_frame_is_left_out():
    adapter = AlignmentAdapter(config()).eval()
    frames = torch.randn(1, 9, 32)
    odd, lengths = adapter(frames, torch.tensor([9]))
    even, _ = adapter(frames[:, :8], torch.tensor([8]))
    assert odd.shape[1] == 4 and lengths.tolist() == [4] and torch.equal(odd, even)


def test_sizes_are_the_papers():
    """Llama-3.1-8B and Whisper large-v3: 144.8 M and 67.1 M parameters."""
    text = LlamaConfig(hidden_size=4096, num_attention_heads=32, vocab_size=128_256)
    full = SoundwaveConfig(WhisperConfig(d_model=1280), text)
    with torch.device("meta"):
        alignment, shrinking = AlignmentAdapter(full), ShrinkingAdapter(full)
    count = {type(m): sum(p.numel() for p in m.parameters()) for m in (alignment, shrinking)}
    assert round(count[AlignmentAdapter] / 1e6, 1) == 144.8
    assert round(count[ShrinkingAdapter] / 1e6, 1) == 67.1


def test_released_parameter_names():
    with torch.device("meta"):
        names = {name for name, _ in AlignmentAdapter(config()).named_parameters()}
    assert {"mm_projector1.weight", "out_norm.weight"} < names
    assert "asr_transformer_encoder.layers.0.self_attn.in_proj_weight" in names
