"""What every test shares: the environment (before torch is imported), seeds, tiny random parts and synthetic speech."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("SOUNDWAVE_REHEARSE") == "1":  # see tests/gpu/conftest.py
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, torch sees none"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory):
    """Folders of a random Whisper (d 32) and a random Llama (d 48, 200 tokens), as from_pretrained finds them."""
    from tests.model import tiny

    return tiny.make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def speech_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short sounds with their manifests: train.jsonl (12), valid.jsonl (3 of them), broken.jsonl (2 + 3 bad)."""
    from tests.model import tiny

    return tiny.make_speech(tmp_path_factory.mktemp("speech"))
