"""Hub names: a checkpoint that is no local directory is found in huggingface_hub's cache, or downloaded into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_OTHER_WEIGHTS = ["*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth"]


def local_directory(name: str | Path, options: dict[str, Any] | None = None, weights: bool = True) -> Path:
    """The directory `name` is, or the snapshot of the Hub's repository of that name.

    HF_HUB_OFFLINE and HF_HUB_CACHE hold as everywhere.

    Args:
        options: keyword arguments of a `from_pretrained`. `cache_dir`, `force_download`, `local_files_only`,
            `revision`, `subfolder` and `token` are taken out of it and heeded; so is `proxies`, but for nothing:
            huggingface_hub goes by the environment.
        weights: False downloads all but the weights.

    Raises:
        OSError: neither a directory nor a repository that is cached or can be reached; one line, naming it.
    """
    options = {} if options is None else options
    given = {key: value for key in _OPTIONS if (value := options.pop(key, None)) is not None}
    options.pop("proxies", None)
    inside = options.pop("subfolder", None) or ""
    path = Path(name)
    if not path.is_dir():
        if constants.HF_HUB_OFFLINE:
            given["local_files_only"] = True  # huggingface_hub 1 asks the Hub about a commit hash even so, and fails
        unwanted = _OTHER_WEIGHTS if weights else [*_OTHER_WEIGHTS, "*.safetensors"]
        try:
            path = Path(snapshot_download(str(name), ignore_patterns=unwanted, **given))
        except HFValidationError:
            raise FileNotFoundError(f"{name}: no such directory") from None
        except OSError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if constants.HF_HUB_OFFLINE:
                reason = f"HF_HUB_OFFLINE is set; {reason}"
            where = f"{name} (revision {given['revision']})" if "revision" in given else str(name)
            raise OSError(f"{where}: no such directory, nor a repository to be had from the Hub: {reason}") from error
    if not (path / inside).is_dir():
        raise FileNotFoundError(f"{name}: has no folder {inside}")
    return path / inside
