"""The recipe of the demo model and its heads."""
