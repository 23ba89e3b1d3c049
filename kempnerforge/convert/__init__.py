"""Models between their files and ours, compared on the spot."""
