"""Find what decodes fastest on this machine: `python -m medhead.tune`."""
