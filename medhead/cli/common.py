"""What commands share."""

from medhead.generate import Parser, add_model_options, guarded

__all__ = ["Parser", "add_model_options", "guarded"]
