"""The contract suite of the package, on every registered arch: ours, those of ``recipes/``, and a model of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

import tests.vlm.tiny  # noqa: F401  registers archs before the checks list them
from kempnerforge.contract.generation_checks import *  # noqa: F403
from kempnerforge.contract.grid_checks import *  # noqa: F403
from kempnerforge.contract.marks import ranked
from kempnerforge.contract.model_checks import *  # noqa: F403
from kempnerforge.contract.ranks import AUX, COMPILED, FROZEN, KEPT, LAYERS, PIECES, RECOMPUTED, TRACED
from kempnerforge.contract.training_checks import *  # noqa: F403
from kempnerforge.contract.training_checks import same_as_one_process


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
@ranked([(None, "causal")], f"{AUX}+{COMPILED}", f"{AUX}+{PIECES}+{RECOMPUTED}+{KEPT}+{COMPILED}")
def test_two_ranks_compiled(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """With machine code, of the model that has the fewest graphs: what it does with losses does not depend on the arch."""
    same_as_one_process(ranked, ranks(ranked))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
@ranked([("joint_decoder", "causal")], f"{LAYERS}+{FROZEN}+{RECOMPUTED}+{TRACED}")
def test_two_ranks_share_layers_with_the_graphs_of_the_compiler(ranked: str, ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    same_as_one_process(ranked, ranks(ranked))
