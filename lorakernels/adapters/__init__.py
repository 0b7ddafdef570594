"""Whole models: put adapters in, load, save, switch, merge, combine, swap and take them out."""
