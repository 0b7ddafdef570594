"""Plain torch, forward and backward: the oracle of every kernel, and the path of a CPU."""
