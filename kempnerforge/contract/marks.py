"""Which archs and masks a check runs on, as marks of pytest."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kempnerforge.config import registry
from kempnerforge.contract.cases import CHOSEN, FOREIGN, accepted_masks, tiny_job
from kempnerforge.vlm.build import arch_class

ARCHS: list[str | None] = [*CHOSEN] or [None, *registry.archs]
MASKED = [(arch, mask) for arch in ARCHS for mask in accepted_masks(arch)]
FIRST_MASKED = [(arch, accepted_masks(arch)[0]) for arch in ARCHS]

each_arch = pytest.mark.parametrize("arch", ARCHS, ids=str)
each_mask = pytest.mark.parametrize(("arch", "mask"), MASKED, ids=[f"{arch}-{mask}" for arch, mask in MASKED])
ours = pytest.mark.parametrize("arch", [a for a in ARCHS if a not in FOREIGN], ids=str)
"""The archs with our text backbone. A model of transformers has other names and initial weights."""
with_images = pytest.mark.parametrize("arch", [a for a in ARCHS if arch_class(tiny_job(a)).has_images], ids=str)


def ranked(archs: Iterable[tuple[str | None, str]], *hows: str) -> pytest.MarkDecorator:
    """A case for each arch and mask, run in each of the ways ``hows``; its name holds the name of the arch."""
    cases = [(f"{arch or ''}:{mask}:{how}", f"{arch}-{mask}{how and '-'}{how}") for arch, mask in archs for how in hows]
    return pytest.mark.parametrize("ranked", [case for case, _ in cases], ids=[name for _, name in cases])
