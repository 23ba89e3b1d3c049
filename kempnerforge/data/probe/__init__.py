"""Generators of the diagnostic source ``probe``: what is on a picture, what is asked of it, and how it is drawn."""

from kempnerforge.data.probe.combinations import Combinations
from kempnerforge.data.probe.draw import draw
from kempnerforge.data.probe.scene import COLOURS, SHAPES, Placed, Thing, place
from kempnerforge.data.probe.setting import Draft, Setting
from kempnerforge.data.probe.skills import SKILLS

__all__ = ["COLOURS", "SHAPES", "SKILLS", "Combinations", "Draft", "Placed", "Setting", "Thing", "draw", "place"]
