"""What every architecture must keep, as checks that any of them can be put to:
``kempnerforge contract my_arch.py``.
"""
