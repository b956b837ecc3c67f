"""Speed and quality, measured: each module is a command that prints its table and writes JSON."""
