"""Serving many adapters on one base model."""
