"""What tests share: the environment (before others import), seeds, tiny random parts, speech, the command line."""

from __future__ import annotations

import os

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

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported

from bench.interpreter import interpreter_error
from tests import deprecations
from tests.interpreted import round_products_once, use_other_sizes

deprecations.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tuned", action="store_true", help="kernels run with other sizes than their defaults")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ["TRITON_INTERPRET"] == "1":
        if error := interpreter_error():
            raise pytest.UsageError(error)  # once, not test by test
        round_products_once()
    if config.getoption("--tuned"):
        use_other_sizes()


# Files of few tests that take minutes. They come first: at the end one process would wait for the other.
LONGEST = ("bench/test_gpu_suite.py", "bench/test_smoke.py", "gpu/test_rehearsal.py", "bench/test_aot.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
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


# -- the command line (tests/test_cli*.py) -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stage(tiny_parts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stage directory of a tiny model with LoRA."""
    from soundwave_fast.model import checkpoint
    from tests.model import tiny

    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(1)  # the same random adapters, hence the same transcripts, whichever tests ran before
    model, processor = tiny.make_model(tiny_parts)
    checkpoint.save_stage_directory(tiny.add_lora(model), folder, processor)
    return str(folder)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One second as 16 kHz wav, 8 kHz stereo wav and flac; one of 35 s; one that is no audio."""
    import soundfile

    from tests.model import tiny

    folder = tmp_path_factory.mktemp("sounds")
    wave = tiny.make_wave(0, 1.0)
    soundfile.write(folder / "a.wav", wave, 16_000)
    soundfile.write(folder / "stereo.wav", np.stack([wave[::2], wave[::2]], 1), 8_000)
    soundfile.write(folder / "a.flac", wave, 16_000)
    soundfile.write(folder / "long.wav", tiny.make_wave(1, 35.0), 16_000)
    (folder / "broken.wav").write_text("this is no audio")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def soundwave(stage, capsys: pytest.CaptureFixture):
    """Run the command; (exit code, lines on stdout, lines on stderr)."""
    from soundwave_fast import cli

    def run(command: str, *arguments: str, model: str = stage):
        capsys.readouterr()
        code = cli.main([command, *arguments, "--model", model, "--max-new-tokens", "6"])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    """The ratios of the benchmarks' smoke run, which says that they work and not how fast anything is."""
    reports = terminalreporter.getreports("passed")
    lines = [line for report in reports for name, line in report.user_properties if name == "times faster"]
    if lines:
        terminalreporter.section("benchmarks, two rounds beside other tests: times faster than the baseline")
        terminalreporter.write("\n".join([*lines, ""]))
