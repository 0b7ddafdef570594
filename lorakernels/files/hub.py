"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from lorakernels.files.peft import WEIGHTS_FILE
from lorakernels.files.reading import AdapterFileError
from lorakernels.files.update import CONFIG_FILE


def local_folder(folder: str | os.PathLike[str], hub: bool, revision: str | None) -> Path:
    """`folder` itself where it is one, otherwise the hub's copy of its two files, if the hub may be asked.

    Raises ImportError without huggingface_hub, ValueError for a revision of a local folder, and AdapterFileError
    when there is no such folder and the hub may not be asked, or cannot give the files.
    """
    path = Path(folder)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder, which has no revision {revision!r}; leave revision out")
        return path
    if not hub and revision is None:
        raise AdapterFileError(
            f"{folder} is not a folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}, or hub=True for a name on "
            "the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("loading from the hub needs huggingface_hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # its errors and those of its HTTP client have no common base
        raise AdapterFileError(f"{folder} cannot be had from the hub: {error}") from error
