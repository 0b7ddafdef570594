"""Adapters of whole models: putting them in, taking them out, reading and writing their files."""
