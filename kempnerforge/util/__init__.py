"""Files, reading with limits, errors, processes: what knows nothing of this program."""
