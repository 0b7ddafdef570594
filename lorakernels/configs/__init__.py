"""Which configuration a kernel takes: plain data, no Triton."""
