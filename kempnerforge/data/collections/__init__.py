"""Data that are drawn here, or that package registries carry: one file each, registered under the name of its config."""
