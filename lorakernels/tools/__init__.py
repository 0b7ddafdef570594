"""What the command line runs. Nothing below imports it."""
