"""The diagnostic source ``probe``: what is on a picture, what is asked about it, and how it is drawn."""

from kempnerforge.data.collections.probe.source import Probe, ProbeConfig

__all__ = ["Probe", "ProbeConfig"]
