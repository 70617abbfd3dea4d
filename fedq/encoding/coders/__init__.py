"""Coders: integer symbols ↔ bytes."""

from fedq.encoding.coders.coder import Coder
from fedq.encoding.coders.fixed_width import FixedWidth
from fedq.encoding.coders.raw import Raw

__all__ = ["Coder", "FixedWidth", "Raw"]
