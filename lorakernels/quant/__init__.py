"""Frozen weights in fewer bits: a file for each format, which reads, packs and refuses."""
