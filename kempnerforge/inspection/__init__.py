"""``check``, ``inspect`` and ``data check``: what a job would do, before it does it."""
