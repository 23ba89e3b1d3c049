"""Where numbers go besides `metrics.jsonl`, one file each; `docs/extend/tracker.md` says how to write one."""
