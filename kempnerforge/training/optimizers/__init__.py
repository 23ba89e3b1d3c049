"""One file per optimizer. State is made at a parameter's first step; one without a gradient is skipped."""
