"""Coders: integer symbols ↔ bytes."""

from fedq.encoding.coders.coder import AdaptiveCoder, Coder
from fedq.encoding.coders.fixed_width import FixedWidth
from fedq.encoding.coders.raw import Raw

__all__ = ["AdaptiveCoder", "Coder", "FixedWidth", "Raw"]
