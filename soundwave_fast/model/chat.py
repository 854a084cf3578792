"""Conversations with audio in them: contents to text with placeholders, and audio items to waveforms."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from huggingface_hub import constants as hub

from soundwave_fast.audio import SAMPLE_RATE, as_mono_16k, load_audio

AUDIO_TOKEN = "<audio_patch>"  # the released tokenizer's name for the placeholder
_SOURCES = ("audio", "path", "url", "array")
_TIMEOUT = 30.0  # s

# The turns of the authors' inference script: a system message of theirs, one line break after each header, and the
# placeholder right before the user's text.
RELEASED_SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
RELEASED_TEMPLATE = (
    "<|begin_of_text|>{% if messages[0]['role'] != 'system' %}<|start_header_id|>system<|end_header_id|>\n"
    + RELEASED_SYSTEM
    + "<|eot_id|>{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)


def flatten(conversation: Sequence[Mapping], placeholder: str, separator: str) -> tuple[list[dict], list[Mapping]]:
    """Messages whose contents are text, and the audio items of the conversation in order.

    Args:
        conversation: messages with `role` and `content`: text, or a list of `{"type": "text", "text": ...}` and
            `{"type": "audio", ...}` items (see `read_item`).
        placeholder: text that stands for one audio; `separator` follows it where the message goes on.

    Raises:
        ValueError: a message or an item of another form, or text that holds the placeholder beside audio items.
    """
    messages, audios = [], []
    for message in conversation:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"conversation: a message has 'role' and 'content', got {_brief(message)}")
        content = message["content"]
        if isinstance(content, str):
            messages.append(dict(message))
            continue
        text = ""
        for number, item in enumerate(content, 1):
            kind = item.get("type") if isinstance(item, Mapping) else None
            if kind == "audio":
                audios.append(item)
                text += placeholder + (separator if number < len(content) else "")
            elif kind == "text" and isinstance(item.get("text"), str):
                if placeholder in item["text"]:
                    raise ValueError(f"conversation: {placeholder} in the text of a message with a list of contents")
                text += item["text"]
            else:
                raise ValueError(f"conversation: contents are of type 'text' or 'audio', got {_brief(item)}")
        messages.append({**message, "content": text})
    return messages, audios


def read_item(item: Mapping) -> np.ndarray:
    """Mono 16 kHz waveform (samples,) of `{"type": "audio"}` with one of

    - `path`: a file libsndfile reads; `url`: such a file on the web, or a `file` URL;
    - `audio` or `array`: a waveform (samples,) with `sampling_rate` in Hz (16 kHz if missing or None), or a
      tensor of one;
      `audio` may also be a path, a URL, or a mapping with any of these.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none or several of them, a URL that cannot be fetched (offline: none can), audio that is no good, a
            sampling rate of 0.
        TypeError: samples that are neither floats nor integers of 8, 16 or 32 bits.
    """
    given = [key for key in _SOURCES if item.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"audio: one of {', '.join(_SOURCES)} is needed, got {' and '.join(given) or _brief(item)}")
    value = item[given[0]]
    if isinstance(value, Mapping):
        return read_item({"sampling_rate": item.get("sampling_rate"), **value})
    if isinstance(value, str) and (given[0] == "url" or value.split(":", 1)[0] in ("http", "https", "file")):
        return _fetch(value)
    if hasattr(value, "shape") or isinstance(value, (list, tuple)):
        rate = item.get("sampling_rate")
        return as_mono_16k(np.asarray(value), SAMPLE_RATE if rate is None else rate)
    return load_audio(value)


def _fetch(url: str) -> np.ndarray:
    import soundfile

    parts = urlparse(url)
    if parts.scheme == "file":
        return load_audio(url2pathname(parts.path))
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"audio: {url} is no http, https or file URL")
    if hub.HF_HUB_OFFLINE:
        raise ValueError(f"audio: {url} cannot be fetched offline (HF_HUB_OFFLINE is set); pass a path or the samples")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            body = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"audio: {url} cannot be fetched ({error})") from None
    try:
        wave, rate = soundfile.read(io.BytesIO(body), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"audio: {url} cannot be read as audio ({error})") from None
    return as_mono_16k(wave.mean(1), rate, url)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
