"""A model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import fresh_model
from safetensors.torch import save_file


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(fresh_model().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder
