"""A random multilingual Whisper: languages heard and told, log-probabilities, batches; and an English-only one."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from soundwave_fast.errors import UserError
from tests.model.tiny import make_wave
from train import curate
from train.curation.transcribers import BACKENDS, MAX_NEW_TOKENS, TransformersWhisper, identity, wanted_language

LANGUAGES = ("en", "de", "ja")
WORDS = 40
EOS, START, NO_TIMES = WORDS, WORDS + 1, WORDS + 7
IDS = {f"<|{name}|>": START + 1 + i for i, name in enumerate(LANGUAGES)}
SPECIAL = list(range(START, NO_TIMES + 1))  # a trained model does not say them
TASKS = {"transcribe": START + 4, "translate": START + 5}
CPU = torch.device("cpu")


def make(folder, multilingual: bool):
    """A Whisper of d 32 over 40 words, its special tokens laid out as the real ones are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(3)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64)
    config = WhisperConfig(
        d_model=32,
        num_mel_bins=80,
        vocab_size=NO_TIMES + 1,
        pad_token_id=EOS,
        bos_token_id=START,
        eos_token_id=EOS,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.4,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config)
    more = {"lang_to_id": IDS, "task_to_id": TASKS, "no_timestamps_token_id": NO_TIMES} if multilingual else {}
    for key, value in {"is_multilingual": multilingual, "max_length": 448, "suppress_tokens": SPECIAL, **more}.items():
        setattr(model.generation_config, key, value)  # its update() would drop what only Whisper knows
    model.generation_config._from_model_config = False  # or it is made anew from config.json when loaded
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    special = ["<|endoftext|>", "<|startoftranscript|>", *IDS, *(f"<|{name}|>" for name in TASKS), "<|notimestamps|>"]
    vocabulary = {word: i for i, word in enumerate([f"w{i}" for i in range(WORDS)] + special)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    return make(tmp_path_factory.mktemp("multilingual"), True)


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return make(tmp_path_factory.mktemp("english"), False)


WAVES = [make_wave(i, 0.5 + 0.3 * i) for i in range(3)]


def test_language_is_heard_in_the_encoder_output(multilingual):
    whisper = TransformersWhisper(multilingual, CPU)
    found = whisper(WAVES, ["", "", ""])
    features = whisper.features(WAVES, sampling_rate=16_000, return_tensors="pt").input_features
    wanted = whisper.model.detect_language(features).tolist()
    assert [IDS[f"<|{one.language}|>"] for one in found] == wanted
    assert all(1 / 3 <= one.probability <= 1 for one in found)


def test_language_and_task_reach_the_decoder(multilingual):
    heard = TransformersWhisper(multilingual, CPU)(WAVES, ["", "", ""])
    told = {name: TransformersWhisper(multilingual, CPU)(WAVES, [name] * 3) for name in LANGUAGES}
    for i, one in enumerate(heard):
        assert told[one.language][i] == one, "told what it hears, it writes what it wrote"
        assert all(told[name][i].language == one.language for name in LANGUAGES), "what is told is not what is heard"
    translated = TransformersWhisper(multilingual, CPU, task="translate")(WAVES, ["de"] * 3)
    assert len({tuple(one.text for one in found) for found in (*told.values(), translated)}) == 4


@pytest.mark.parametrize("kind", ["multilingual", "english"])
def test_log_probability_is_the_mean_over_the_tokens(kind, request):
    """Against a teacher-forced pass over the same tokens."""
    whisper = TransformersWhisper(request.getfixturevalue(kind), CPU)
    found = whisper(WAVES, ["de"] * 3)
    features = whisper.features(WAVES, sampling_rate=16_000, return_tensors="pt").input_features
    prompt = [START, IDS["<|de|>"], TASKS["transcribe"], NO_TIMES] if kind == "multilingual" else [START, NO_TIMES]
    for i, one in enumerate(found):
        tokens = [int(word[1:]) for word in one.text.split()]
        ended = len(tokens) < MAX_NEW_TOKENS
        tokens = tokens + [EOS] * ended
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits = whisper.model(input_features=features[i : i + 1], decoder_input_ids=ids[:, :-1]).logits[0]
        logits[:, SPECIAL] = float("-inf")
        values = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        assert one.logprob == pytest.approx(values.mean().item(), abs=2e-3)


def test_batch_equals_one_at_a_time(multilingual):
    whisper = TransformersWhisper(multilingual, CPU)
    assert whisper(WAVES, [""] * 3) == [whisper([wave], [""])[0] for wave in WAVES]


def test_english_only_hears_no_language_and_refuses_to_translate(english):
    found = TransformersWhisper(english, CPU)(WAVES, ["de", "", "en"])
    assert [(one.language, one.probability) for one in found] == [("", 0.0)] * 3
    with pytest.raises(UserError, match="knows English alone"):
        TransformersWhisper(english, CPU, task="translate")


def test_language_the_model_does_not_know_is_one_line(english, multilingual, tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "audio": "a.wav", "duration": 1.0}\n')
    assert curate.main(["prepare", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out")]) == 0
    for model, language in ((english, "German"), (multilingual, "fr")):
        capsys.readouterr()
        assert curate.main(["transcribe", str(tmp_path / "out"), "--model", model, "--language", language]) == 2
        assert f"--language {language}: not one that" in capsys.readouterr().err


def test_identity_is_what_a_folder_holds(multilingual, english, tmp_path):
    import shutil

    copy = tmp_path / "moved"
    shutil.copytree(multilingual, copy)
    assert identity(str(copy)) == identity(multilingual) != identity(english)
    assert identity("openai/whisper-medium") == "openai/whisper-medium"


def test_wanted_language():
    assert wanted_language({"language": "German"}, "") == "de" and wanted_language({"language": "German"}, "en") == "en"
    assert wanted_language({}, "") == ""


@pytest.mark.skipif(importlib.util.find_spec("faster_whisper") is not None, reason="faster-whisper is installed")
def test_faster_whisper_is_optional():
    with pytest.raises(UserError, match="pip install faster-whisper"):
        BACKENDS["faster-whisper"]("tiny", CPU)


def test_silence_of_one_sample(multilingual):
    (found,) = TransformersWhisper(multilingual, CPU)([np.zeros(1, dtype=np.float32)], [""])
    assert np.isfinite(found.logprob)
