"""Benchmarks: `medhead bench speed`, `step`, `tasks` and `budget`. They share `harness` (options, output) and `measure`."""
