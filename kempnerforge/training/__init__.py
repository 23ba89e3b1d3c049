"""When and how often: stages, steps, hooks. Nothing here names an architecture."""
