"""A procedural diagnostic: what a model sees, skill by skill, with exact answers and knobs for how hard it
is. Needs no files.

The skills and their questions are listed in ``data/collections/probe/skills.py``. In each block of as many
samples as there are skills every skill has its turn, in an order of the block's own. Sample k is a pure
function of (seed, split, k): nothing is stored, and all processes draw the same pictures.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kempnerforge.config import registry
from kempnerforge.data.collections.probe.combinations import Combinations
from kempnerforge.data.collections.probe.config import QUESTIONS, ProbeConfig
from kempnerforge.data.collections.probe.draw import draw_scene
from kempnerforge.data.collections.probe.scene import arrange
from kempnerforge.data.collections.probe.setting import Draft, Setting
from kempnerforge.data.collections.probe.skills import SKILLS
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.source import Source


@registry.register_source("probe")
class Probe(Source):
    """Samples ``probe/SKILL/SPLIT/INDEX``, whose texts are of the kind SKILL. "test" is held out, from the
    same combinations as training or from others, as ``eval_on`` says.
    """

    cfg: ProbeConfig

    def __init__(self, cfg: ProbeConfig, split: str) -> None:
        super().__init__(cfg, split)
        self.unseen = split == "test" and cfg.eval_on == "heldout"
        self._skills = [name for name in cfg.skills if split == "train" or name in QUESTIONS] or cfg.skills
        self._known = Combinations(cfg.palette, cfg.shapes, cfg.max_count, cfg.held_out_every, cfg.seed)

    def __len__(self) -> int:
        return self.cfg.samples if self.split == "train" else self.cfg.eval_samples

    def skill(self, index: int) -> str:
        """What sample ``index`` is about."""
        block, position = divmod(range(len(self))[index], len(self._skills))
        return Random(f"{self.cfg.seed}/{self.split}/skills/{block}").sample(self._skills, len(self._skills))[position]

    def draft(self, index: int) -> tuple[Draft, Random]:
        """Sample ``index`` before it is drawn, and the random numbers to draw it with."""
        rng = Random(f"{self.cfg.seed}/{self.split}/{self.unseen}/{index}")  # a string is hashed the same way everywhere
        setting = Setting(self.cfg, self._known, rng, self.unseen)
        made = SKILLS[self.skill(index)](setting)
        return replace(made, texts=tuple(replace(text, kind=self.skill(index)) for text in made.texts)), rng

    def texts(self, index: int) -> tuple[Text, ...]:
        return self.draft(index)[0].texts

    def num_images(self, index: int) -> int:
        return self.cfg.compared_images if self.skill(index) == "comparison" else 1

    def __getitem__(self, index: int) -> Sample:
        cfg, (made, rng) = self.cfg, self.draft(index)
        placed = [arrange(scene, rng, cfg.min_size, cfg.max_size) for scene in made.scenes]
        images = tuple(draw_scene(things, cfg.picture_size, rng, cfg.background, cfg.noise) for things in placed)
        return Sample(f"probe/{self.skill(index)}/{self.split}/{index}", images, made.texts)
