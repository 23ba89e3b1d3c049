"""The command line: a table of names and functions."""
