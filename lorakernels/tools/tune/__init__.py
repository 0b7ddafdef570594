"""`lorakernels tune`: finds the fastest config of every launch on the GPU at hand."""
