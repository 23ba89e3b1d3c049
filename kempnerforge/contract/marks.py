"""Which archs and masks a check runs on, as marks of pytest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from kempnerforge.config import registry
from kempnerforge.contract.cases import CHOSEN, FOREIGN, accepted_masks, tiny_job
from kempnerforge.vlm.build import arch_class

ARCHS: list[str | None] = [*CHOSEN] or [None, *registry.archs]
MASKED = [(arch, mask) for arch in ARCHS for mask in accepted_masks(arch)]
FIRST_MASKED = [(arch, accepted_masks(arch)[0]) for arch in ARCHS]

SHARING = [arch for arch in ARCHS if arch_class(tiny_job(arch)).shares_rows]
"""Those whose rows ranks can share."""


def _between(arch: str | None, mask: str) -> bool:
    """Whether ``mask`` is neither the first nor the last of ``arch``, and no user checks this arch."""
    masks = accepted_masks(arch)
    return not CHOSEN and mask not in (masks[0], masks[-1])


def masked(*further: Any) -> list[Any]:
    """A case for each arch and mask, and each of ``further``; what is neither the first nor the last mask of
    an arch is slow, unless a user checks that arch.
    """
    return [
        pytest.param(arch, mask, *more, marks=pytest.mark.slow if _between(arch, mask) else [], id="-".join(map(str, (arch, mask, *more))))
        for arch, mask in MASKED
        for more in ([(one,) for one in further] or [()])
    ]


each_arch = pytest.mark.parametrize("arch", ARCHS, ids=str)
most_archs = pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[] if CHOSEN or a in ARCHS[1:4] else pytest.mark.slow) for a in ARCHS], ids=str
)
"""Three archs, and slow further ones, unless a user checks one. For checks that train."""
each_mask = pytest.mark.parametrize(("arch", "mask"), MASKED, ids=[f"{arch}-{mask}" for arch, mask in MASKED])
most_masks = pytest.mark.parametrize(("arch", "mask"), masked())
"""The first and the last mask of each arch, and slow ones between them. For what does not depend on the mask
alone.
"""
ours = pytest.mark.parametrize("arch", [a for a in ARCHS if a not in FOREIGN], ids=str)
"""The archs with our text backbone. A model of transformers has other names and initial weights."""
with_images = pytest.mark.parametrize("arch", [a for a in ARCHS if arch_class(tiny_job(a)).has_images], ids=str)


def ranked(archs: Iterable[tuple[str | None, str]], *hows: str) -> pytest.MarkDecorator:
    """A case for each arch and mask, run in each of the ways ``hows``; its name holds the name of the arch."""
    cases = [(f"{arch or ''}:{mask}:{how}", f"{arch}-{mask}{how and '-'}{how}") for arch, mask in archs for how in hows]
    return pytest.mark.parametrize("ranked", [case for case, _ in cases], ids=[name for _, name in cases])
