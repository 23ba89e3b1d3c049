"""Images: decoded, cut into views, changed at random, kept."""
