"""Other people's libraries, made to run on this one. Each file imports its library inside the call."""
