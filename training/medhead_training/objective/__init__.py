"""What heads are trained on: unrolled heads, losses, the module that computes them."""
