"""Which configuration a kernel takes, and the tools that find and check it."""
