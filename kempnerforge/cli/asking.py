"""What commands that ask a model share: how its tokens are chosen, and what a terminal is shown of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kempnerforge.cli.numbers import real, whole
from kempnerforge.util.errors import InputError

if TYPE_CHECKING:
    from kempnerforge.eval.generate import Sampling


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of an answer."""
    parser.add_argument(
        "--max-new-tokens", type=whole(0), metavar="N", help="tokens of an answer at most (default: 64, or what the model has room for)"
    )
    parser.add_argument("--temperature", type=real(0), default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=whole(0), default=0, metavar="K", help="draw from the K most likely tokens alone (default: all)")
    parser.add_argument(
        "--top-p",
        type=real(0, 1),
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens that hold a share P of the mass (default: 1)",
    )
    parser.add_argument(
        "--beams", type=whole(1), default=1, metavar="W", help="follow W texts at once, the best is the answer (default: 1)"
    )
    parser.add_argument("--seed", type=whole(-(2**63), 2**63 - 1), default=0, help="of the draws (default: 0)")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What those options say.

    Raises:
        ValueError: one is out of its range, or is not read, as nothing is drawn.
    """
    from kempnerforge.eval.generate import Sampling

    found = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.beams)
    if args.temperature == 0 and found != Sampling(beams=args.beams):
        raise InputError("--top-k, --top-p and --seed are only read with a --temperature above 0")
    return found
