"""The text backbone, vision encoders and adapters. Nothing here knows an architecture."""
