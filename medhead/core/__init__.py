"""The decode step and its parts: trees, acceptance, sampling, stopping, the loop."""
