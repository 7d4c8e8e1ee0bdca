"""Heads fine-tuning: data, objective, trainer, evaluation, export."""
