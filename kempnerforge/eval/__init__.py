"""Generation and scores of generated answers."""
