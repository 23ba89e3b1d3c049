"""Many runs as one comparison: plan, run, tune, statistics, report."""
