"""Every stage of the `released` preset against a restatement of the authors' forward, from waveform to tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import WhisperFeatureExtractor, WhisperModel

from soundwave_fast.model import SoundwaveProcessor
from soundwave_fast.model.released import read_released
from soundwave_fast.model.released_names import to_released
from tests.model import tiny
from tests.parity import authors

TOLERANCE = 1e-4
SECONDS = (0.6, 2.4, 7.3)
PROMPTS = ("Stop.", "What is the time now?", "Open the red door.")
LAYOUT = {"adapters": "model.", "audio_tower": None}


def pair(parts: tiny.Parts, folder):
    """(theirs, ours, processor), ours read from the directory theirs was saved to."""
    theirs, config, tokenizer = authors.make(parts)
    config["soundwave_fast"] = {"adapter_dropout": 0.0}  # for the training steps below
    authors.save(folder, theirs.state_dict(), config, tokenizer)
    return theirs, read_released(folder), SoundwaveProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def both(tiny_parts, tmp_path_factory):
    return pair(tiny_parts, tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def both_short(tiny_parts, tmp_path_factory):
    """As `both`, round a Whisper that listens to 2 s instead of 30."""
    whisper = WhisperModel.from_pretrained(tiny_parts.whisper)
    weights = whisper.state_dict()
    weights["encoder.embed_positions.weight"] = weights["encoder.embed_positions.weight"][:100]
    whisper.config.max_source_positions = 100
    folder = tmp_path_factory.mktemp("short")
    WhisperModel(whisper.config).save_pretrained(folder / "whisper", state_dict=weights)
    WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(folder / "whisper")
    return pair(tiny.Parts(str(folder / "whisper"), tiny_parts.llm), folder / "released")


@pytest.fixture(scope="module")
def mels(both):
    return [both[2].log_mel(tiny.make_wave(i, seconds)) for i, seconds in enumerate(SECONDS)]


def ours_of(model, mels):
    batch = torch.stack(mels)
    return model.hear(*model.encode(batch, torch.full((len(mels),), 100)))


def ids_of(processor, i):
    return torch.tensor(processor.tokenizer(processor.prompt(PROMPTS[i]), add_special_tokens=False).input_ids)


def largest(x, y):
    assert x.shape == y.shape
    return float((x - y).abs().max())


def test_log_mel_is_whispers_own(both, tiny_parts, mels):
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_parts.whisper)
    for i, seconds in enumerate(SECONDS):
        want = extractor(tiny.make_wave(i, seconds), sampling_rate=tiny.RATE, return_tensors="pt").input_features[0]
        assert want.shape == (80, 3000) and torch.equal(mels[i], want)


@torch.no_grad()
def test_frames_and_ctc_logits(both, mels):
    theirs, ours, _ = both
    frames, lengths = ours.encode(torch.stack(mels), torch.tensor([60, 240, 730]))
    heard = ours.hear(frames, lengths)
    assert heard.lengths.tolist() == [750] * 3
    for i, mel in enumerate(mels):
        want = theirs.frames(mel)
        assert largest(frames[i], want) <= TOLERANCE
        features = theirs.align(want)
        assert largest(heard.hidden_BTD[i], features) <= TOLERANCE
        ctc = theirs.ctc_logits(features)
        assert largest(F.linear(heard.hidden_BTD[i], ours.ctc_head.audio_feature_head.weight), ctc) <= TOLERANCE
        assert torch.equal(heard.tokens_BT[i], ctc.argmax(-1))


@torch.no_grad()
def test_kept_frames_and_audio_tokens(both, mels):
    theirs, ours, _ = both
    audio = ours.shrink(ours_of(ours, mels))
    bounds = audio.cu_seqlens.tolist()
    for i, mel in enumerate(mels):
        features = theirs.align(theirs.frames(mel))
        kept = theirs.kept(theirs.ctc_logits(features))
        assert 10 < kept.sum() < 700, "runs of more than one frame, and more than one run"
        mine = slice(bounds[i], bounds[i + 1])
        assert torch.equal(audio.index[mine] - 750 * i, kept.nonzero()[:, 0])
        assert largest(audio.data[mine], theirs.shrink(features, kept)) <= TOLERANCE


@torch.no_grad()
def test_a_blank_run_is_kept_as_one_frame(both, mels):
    theirs, ours, processor = both
    tokens = ours_of(ours, mels).tokens_BT.clone()
    tokens[:, 100:600] = processor.audio_token_id
    heard = ours_of(ours, mels)
    heard.tokens_BT = tokens
    audio = ours.shrink(heard)
    features = theirs.align(theirs.frames(mels[1]))
    logits = F.one_hot(tokens[1], len(theirs.lm_head.weight)).float()
    kept = theirs.kept(logits)
    assert kept[100] and not kept[101:600].any()
    mine = slice(*audio.cu_seqlens[1:3].tolist())
    assert largest(audio.data[mine], theirs.shrink(features, kept)) <= TOLERANCE


@torch.no_grad()
def test_spliced_embeddings_and_logits(both, mels):
    theirs, ours, processor = both
    for i, mel in enumerate(mels):
        ids = ids_of(processor, i)
        want = theirs.splice(ids, theirs.hear(mel)[0])
        mask = torch.ones_like(ids)[None]
        spliced = ours._splice(ids[None], mask, None, ours.shrink(ours_of(ours, [mel])), "right")
        assert largest(spliced.inputs_embeds[0], want) <= TOLERANCE
        inputs = {"input_ids": ids[None], "attention_mask": mask, "input_features": mel[None]}
        got = ours(**inputs, feature_lengths=torch.tensor([100])).logits[0]
        assert largest(got, theirs.logits(want)) <= TOLERANCE


def test_greedy_tokens_of_a_batch_are_theirs_one_by_one(both, mels):
    theirs, ours, processor = both
    waves = [tiny.make_wave(i, seconds) for i, seconds in enumerate(SECONDS)]
    inputs = processor(text=[processor.prompt(p) for p in PROMPTS], audio=waves)
    got = ours.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    want = [theirs.greedy(ids_of(processor, i), mels[i], 12) for i in range(3)]
    assert got.tolist() == want
    assert len({tuple(row) for row in want}) == 3, "three prompts, three answers"


@pytest.mark.parametrize("window", ["30 s", "2 s"])
def test_loss_and_adapter_gradients(window, request, mels):
    """Over 2 s as the authors train, in float32 throughout; over 30 s with their CTC's recursion in float64, since
    torch's float32 gradient strays too far from the truth by then (docs/numerics.md).
    """
    theirs, ours, processor = request.getfixturevalue("both" if window == "30 s" else "both_short")
    recursion = torch.float64 if window == "30 s" else torch.float32
    if window == "2 s":
        mels = [processor.log_mel(tiny.make_wave(i, seconds)) for i, seconds in enumerate((0.6, 1.2, 1.9))]
        assert all(mel.shape == (80, 200) for mel in mels)
    answers = [processor.answer_ids(tiny.SENTENCES[i]) for i in range(3)]
    targets = [processor.ctc_ids(tiny.SENTENCES[i]) for i in range(3)]
    prompts = [ids_of(processor, i) for i in range(3)]
    ids = [torch.cat([p, torch.tensor(a)]) for p, a in zip(prompts, answers)]
    labels = [torch.cat([torch.full_like(p, -100), torch.tensor(a)]) for p, a in zip(prompts, answers)]
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(ids, batch_first=True, padding_value=1),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "input_features": torch.stack(mels),
        "feature_lengths": torch.tensor([100] * 3),
        "ctc_targets": pad([torch.tensor(t) for t in targets], batch_first=True),
        "ctc_target_lengths": torch.tensor([len(t) for t in targets]),
    }
    out = ours.train()(**batch)
    want = theirs.loss(ids, labels, mels, targets, recursion)
    assert abs(out.loss.item() - want.item()) <= TOLERANCE * want.item()
    out.loss.backward()
    want.backward()
    trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    truth = {to_released(n, LAYOUT): n for n in trained}
    wanted = {n: p.grad for n, p in theirs.named_parameters() if n in truth}
    assert len(trained) == len(wanted) == 23
    overall = max(float(g.abs().max()) for g in wanted.values())
    for name, grad in wanted.items():
        mine = trained[truth[name]]
        assert mine is not None and grad.isfinite().all(), name
        # a key's bias has no gradient but noise: the softmax does not see it
        scale = max(float(grad.abs().max()), 1e-3 * overall)
        assert largest(mine, grad) <= TOLERANCE * scale, name
    ours.eval().zero_grad()
    theirs.zero_grad()
