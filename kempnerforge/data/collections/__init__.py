"""Data that are drawn here or come from package registries: one file each, registered under the name of its
config.
"""
