"""Metrics, one file each; ``docs/extend/task.md`` says how to write one."""
