"""encode_frames: the same as Whisper's own encoder on a full window, and the same in a batch as alone."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from soundwave_fast.model.whisper import encode_frames


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def encoder(request) -> WhisperEncoder:
    torch.manual_seed(0)
    config = WhisperConfig(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=80)
    config._attn_implementation = request.param
    return WhisperEncoder(config).eval()


def scale_of(x: torch.Tensor) -> float:
    return float(x.abs().max())


@pytest.mark.conformance
@torch.no_grad()
def test_full_window_is_whisper(encoder):
    mels = torch.randn(2, 80, 3000)
    ours = encode_frames(encoder, mels, torch.tensor([3000, 3000]))
    whisper = encoder(mels).last_hidden_state
    truth = encoder.double()(mels.double()).last_hidden_state
    encoder.float()
    eager = scale_of(whisper - truth)
    assert scale_of(ours - truth) <= 2 * eager + 1e-6 * scale_of(truth)


@torch.no_grad()
def test_a_full_window_without_lengths_is_whisper_bit_for_bit(encoder):
    mels = torch.randn(2, 80, 3000)
    assert torch.equal(encode_frames(encoder, mels, None), encoder(mels).last_hidden_state)


def test_an_attention_without_masks_is_refused_where_there_is_padding():
    config = WhisperConfig(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64)
    encoder = WhisperEncoder(config)
    encoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 takes no padding mask.*'audio_config': 'sdpa'"):
        encode_frames(encoder, torch.zeros(1, 80, 100), torch.tensor([80]))


@pytest.mark.conformance
@torch.no_grad()
def test_alone_is_as_in_a_batch(encoder):
    lengths = [400, 96, 4, 252]
    mels = torch.zeros(4, 80, 400)
    for row, n in zip(mels, lengths):
        row[:, :n] = torch.randn(80, n)
    batched = encode_frames(encoder, mels, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        alone = encode_frames(encoder, mels[b : b + 1, :, :n], torch.tensor([n]))[0]
        assert alone.shape == (n // 2, 32)
        assert scale_of(batched[b, : n // 2] - alone) <= 1e-5 * scale_of(alone)


@torch.no_grad()
def test_what_lies_past_the_end_is_not_heard(encoder):
    mels = torch.randn(1, 80, 200)
    mels[:, :, 121:] = 0  # conv1 reaches one mel frame past the end, where padding is zero
    longer = mels.clone()
    longer[:, :, 121:] = torch.randn(80, 79)
    one, other = (encode_frames(encoder, x, torch.tensor([120]))[:, :60] for x in (mels, longer))
    assert torch.equal(one, other)


def test_more_than_30_s_is_refused(encoder):
    with pytest.raises(ValueError, match="3002 mel frames, the encoder takes at most 3000"):
        encode_frames(encoder, torch.zeros(1, 80, 3002), torch.tensor([3002]))
