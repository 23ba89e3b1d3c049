"""Processes, meshes and sharding. Nothing here knows an architecture."""
