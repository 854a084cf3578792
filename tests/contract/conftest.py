"""Says at the top which versions the contract is tried on, so that a failure names what it failed on."""

from __future__ import annotations

from importlib import metadata

NAMES = ("torch", "triton", "transformers", "peft", "numpy", "safetensors", "accelerate")


def pytest_report_header() -> str:
    return "contract: " + ", ".join(f"{name} {metadata.version(name)}" for name in NAMES)
