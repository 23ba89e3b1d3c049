"""Trackers: services that get the numbers of `metrics.jsonl`, one file each; see `docs/extend/tracker.md`."""
