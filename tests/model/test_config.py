"""SoundwaveConfig: the two semantics, single overrides, errors that name the key, JSON round trip."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, WhisperConfig

from soundwave_fast.model import SoundwaveConfig
from soundwave_fast.model.config import SEMANTICS


def make(**kwargs) -> SoundwaveConfig:
    text = LlamaConfig(hidden_size=48, num_attention_heads=4, vocab_size=200)
    return SoundwaveConfig(WhisperConfig(d_model=32), text, **kwargs)


@pytest.mark.parametrize("semantics", ["released", "paper"])
def test_semantics_set_all_six_points(semantics):
    config = make(semantics=semantics)
    assert {key: getattr(config, key) for key in SEMANTICS[semantics]} == SEMANTICS[semantics]


def test_one_point_alone():
    config = make(semantics="released", drop_blank=True)
    assert config.drop_blank is True and config.adapter_attention == "position"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("semantics", "papers", "semantics: 'papers' is not one of released, paper"),
        ("adapter_attention", "space", "adapter_attention: 'space' is not one of time, position"),
        ("look_back_keys", "all", "look_back_keys: 'all' is not one of frames, kept"),
        ("drop_blank", "yes", "drop_blank: 'yes' is not one of True, False"),
        ("mask_frames", None, "mask_frames: None is not one of True, False"),
        ("peak_select", "last", "peak_select: 'last' is not one of first, peak"),
        ("encoder_pad", "60s", "encoder_pad: '60s' is not one of longest, 30s"),
        (
            "attention_backend",
            "flash",
            "attention_backend: 'flash' is not one of auto, triton, torch, varlen_attn, flash_attn, xformers",
        ),
        ("ctc_head", "bound", "ctc_head: 'bound' is not one of tied, free"),
        ("ctc_blank_id", 7, "ctc_blank_id: with ctc_head='tied' it is the one extra row, id 200, got 7"),
    ],
)
def test_a_wrong_choice_is_named(key, value, message):
    with pytest.raises(ValueError) as error:
        make(**{key: value})
    assert str(error.value) == message


def test_ids_default_to_the_row_past_the_vocabulary():
    config = make()
    assert (config.audio_token_id, config.ctc_blank_id, config.ctc_vocab_size) == (200, 200, 201)
    free = make(ctc_head="free", ctc_blank_id=17)
    assert free.ctc_vocab_size == 200


def test_json_round_trip(tmp_path):
    config = make(semantics="released", look_back=False, ctc_weight=0.7, audio_tower="w", language_model="l")
    config.save_pretrained(tmp_path)
    loaded = SoundwaveConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.audio_config.d_model, loaded.text_config.vocab_size) == (32, 200)
