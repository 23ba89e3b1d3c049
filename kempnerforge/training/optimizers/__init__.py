"""Optimizers that torch does not have. State is made at a parameter's first step; one without a gradient is left alone."""
