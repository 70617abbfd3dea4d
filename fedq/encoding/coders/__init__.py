"""Coders: integer symbols ↔ bytes."""

from fedq.encoding.coders.ans import ANS
from fedq.encoding.coders.cabac import CABAC
from fedq.encoding.coders.coder import Coder
from fedq.encoding.coders.elias import Elias
from fedq.encoding.coders.fixed_width import FixedWidth
from fedq.encoding.coders.golomb import Golomb, SparseMask
from fedq.encoding.coders.huffman import Huffman
from fedq.encoding.coders.raw import Raw
from fedq.encoding.coders.shortest import Shortest
from fedq.encoding.coders.zero_runs import ZeroRuns
from fedq.encoding.coders.zstandard import Zstandard

__all__ = [
    "ANS",
    "CABAC",
    "Coder",
    "Elias",
    "FixedWidth",
    "Golomb",
    "Huffman",
    "Raw",
    "Shortest",
    "SparseMask",
    "ZeroRuns",
    "Zstandard",
]
