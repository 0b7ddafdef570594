"""Adapter and checkpoint files, without a model: PEFT, kohya and MLX; convert, merge, inspect."""
