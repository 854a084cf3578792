"""Conversations with audio: text with placeholders, audio from paths, URLs and samples, model inputs, clear errors."""

from __future__ import annotations

import functools
import http.server
import threading

import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub

from soundwave_fast.model.chat import RELEASED_SYSTEM, RELEASED_TEMPLATE
from soundwave_fast.model.processing import SoundwaveProcessor
from tests.model import tiny


@pytest.fixture(scope="module")
def processor(tiny_parts):
    return SoundwaveProcessor.from_parts(tiny_parts.whisper, tiny_parts.llm)


def ask(*contents, role="user"):
    return [{"role": role, "content": list(contents)}]


def text(value):
    return {"type": "text", "text": value}


def audio(**source):
    return {"type": "audio", **source}


def test_contents_become_placeholders(processor):
    path = audio(path="a.wav")
    one = processor.apply_chat_template(ask(path, text("Who speaks?")), add_generation_prompt=True)
    assert one == processor.prompt("Who speaks?") == "<s>user\n<audio_patch>\nWho speaks?</s><s>assistant\n"
    between = processor.apply_chat_template(ask(text("First "), path, text("then "), path))
    assert between == "<s>user\nFirst <audio_patch>\nthen <audio_patch></s>"
    turns = [*ask(path, text("Who?")), {"role": "assistant", "content": "Anna."}, {"role": "user", "content": "Sure?"}]
    want = "<s>user\n<audio_patch>\nWho?</s><s>assistant\nAnna.</s><s>user\nSure?</s>"
    assert processor.apply_chat_template(turns) == want
    assert processor.apply_chat_template([turns, turns]) == [want, want]


def test_the_models_inputs(processor, speech_dir):
    wave = tiny.make_wave(4, 1.3)
    first = ask(audio(path=str(speech_dir / "0.wav")), text("Why?"), audio(audio=wave, sampling_rate=16_000))
    second = [{"role": "user", "content": "No audio."}]
    inputs = processor.apply_chat_template(
        [first, second], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    prompts = ["<s>user\n<audio_patch>\nWhy?<audio_patch></s><s>assistant\n", "<s>user\nNo audio.</s><s>assistant\n"]
    want = processor(text=prompts, audio=[speech_dir / "0.wav", wave])
    assert inputs.keys() == want.keys() and all(torch.equal(inputs[key], want[key]) for key in want)
    ids = processor.apply_chat_template(second, tokenize=True)
    assert torch.equal(ids, processor(text="<s>user\nNo audio.</s>")["input_ids"])


def sources(speech_dir):
    import soundfile

    path = speech_dir / "3.wav"
    wave, rate = soundfile.read(path, dtype="float32")
    return {
        "path": audio(path=str(path)),
        "audio path": audio(audio=str(path)),
        "pathlib": audio(path=path),
        "file url": audio(url=path.as_uri()),
        "array": audio(array=wave, sampling_rate=rate),
        "audio": audio(audio=wave, sampling_rate=rate),
        "no rate": audio(audio=wave),
        "rate None": audio(audio=wave, sampling_rate=None),
        "tensor": audio(audio=torch.from_numpy(wave)),
        "list": audio(audio=wave.tolist()),
        "mapping": audio(audio={"array": wave, "sampling_rate": rate, "path": None}),
    }


KINDS = (
    "path",
    "audio path",
    "pathlib",
    "file url",
    "array",
    "audio",
    "no rate",
    "rate None",
    "tensor",
    "list",
    "mapping",
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_audio_from_every_source(processor, speech_dir, kind):
    make = functools.partial(processor.apply_chat_template, tokenize=True, return_dict=True)
    got = make(ask(sources(speech_dir)[kind], text("Why?")))
    assert torch.equal(got["input_features"], processor(audio=speech_dir / "3.wav")["input_features"])


def test_another_sampling_rate(processor):
    wave = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32)
    inputs = processor.apply_chat_template(
        ask(audio(audio=wave, sampling_rate=48_000)), tokenize=True, return_dict=True
    )
    assert inputs["feature_lengths"].item() == 100


@pytest.fixture
def server(speech_dir):
    """The speech folder over HTTP on this machine alone."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=speech_dir)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield "http://{}:{}".format(*httpd.server_address)
        httpd.shutdown()


def test_a_url_is_fetched_online_and_refused_offline(processor, speech_dir, server, monkeypatch):
    make = functools.partial(processor.apply_chat_template, tokenize=True, return_dict=True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for item in (audio(url=f"{server}/0.wav"), audio(audio=f"{server}/0.wav")):
        with pytest.raises(ValueError, match=r"audio: http://.*/0.wav cannot be fetched offline .*pass a path or"):
            make(ask(item))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    got = make(ask(audio(url=f"{server}/0.wav")))
    assert torch.equal(got["input_features"], processor(audio=speech_dir / "0.wav")["input_features"])
    with pytest.raises(ValueError, match="cannot be fetched .*404"):
        make(ask(audio(url=f"{server}/none.wav")))
    with pytest.raises(ValueError, match="train.jsonl cannot be read as audio"):
        make(ask(audio(url=f"{server}/train.jsonl")))


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (ask({"type": "image", "url": "x"}), "contents are of type 'text' or 'audio', got {'type': 'image'"),
        (ask({"type": "text"}), "contents are of type 'text' or 'audio'"),
        (ask(audio()), "audio: one of audio, path, url, array is needed"),
        (ask(audio(path="a.wav", url="http://b")), "is needed, got path and url"),
        (ask(audio(url="ftp://host/a.wav")), "ftp://host/a.wav is no http, https or file URL"),
        (ask(audio(path="nowhere.wav")), "nowhere.wav: no such audio file"),
        (ask(audio(audio=np.zeros(0, np.float32))), "holds no samples"),
        (ask(audio(audio=np.zeros(9, np.float32), sampling_rate=0)), "audio: sampling rate 0 Hz"),
        (ask(audio(audio={"array": np.zeros(9, np.float32), "sampling_rate": 0})), "audio: sampling rate 0 Hz"),
        (ask(audio(audio=[0, 1, 2])), "audio: samples are floats or integers of 8, 16 or 32 bits, got int64"),
        (ask(audio(path="a.wav"), text("a <audio_patch>")), "<audio_patch> in the text of a message"),
        (["hello"], "a message has 'role' and 'content', got 'hello'"),
        ([{"role": "user"}], "a message has 'role' and 'content'"),
    ],
)
def test_what_is_refused(processor, conversation, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        processor.apply_chat_template([conversation], tokenize=True, return_dict=True)
    assert message in str(error.value)


def test_the_authors_prompt(processor):
    turn = ask(audio(path="a.wav"), text("Who speaks?"))
    released = SoundwaveProcessor(
        processor.feature_extractor, processor.tokenizer, RELEASED_TEMPLATE, encoder_pad="30s", audio_separator=""
    )
    start, middle, end = "<|start_header_id|>", "<|end_header_id|>\n", "<|eot_id|>"
    user = f"{start}user{middle}<audio_patch>Who speaks?{end}{start}assistant{middle}"
    want = f"<|begin_of_text|>{start}system{middle}{RELEASED_SYSTEM}{end}{user}"
    assert released.apply_chat_template(turn, add_generation_prompt=True) == released.prompt("Who speaks?") == want
    own = [*ask(text("Be brief."), role="system"), *turn]
    assert released.apply_chat_template(own, add_generation_prompt=True) == want.replace(RELEASED_SYSTEM, "Be brief.")
