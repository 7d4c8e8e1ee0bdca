"""What the commands share. The names move here from `medhead.generate`."""

from medhead.generate import Parser, add_model_options, guarded, make_decoder

__all__ = ["Parser", "add_model_options", "guarded", "make_decoder"]
