"""Stages: one file a family."""

from fedq.encoding.stages.uniform import UniformQuantization

__all__ = ["UniformQuantization"]
