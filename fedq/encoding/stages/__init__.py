"""Stages: one file a family."""

from fedq.encoding.stages.cast import Cast
from fedq.encoding.stages.clipping import AdaptiveQuantileClip, ClipByNorm, ClipByValue, ZeroOutliers
from fedq.encoding.stages.codebook import KMeans, LloydMax, Logarithmic, NormalFloat
from fedq.encoding.stages.eden import Eden
from fedq.encoding.stages.kashin import KashinRepresentation
from fedq.encoding.stages.low_rank import PowerSGD, RandomSubspace
from fedq.encoding.stages.natural import NaturalCompression
from fedq.encoding.stages.product import ProductQuantization
from fedq.encoding.stages.qsgd import QSGD
from fedq.encoding.stages.rotation import CosineRotation, HadamardRotation
from fedq.encoding.stages.sign import OneBitTwoMeans, ScaledSign
from fedq.encoding.stages.singular import SingularVectors
from fedq.encoding.stages.sparsification import RandomMask, Threshold, TopK
from fedq.encoding.stages.step import StepQuantization
from fedq.encoding.stages.ternary import TernGrad, ThreeLevel
from fedq.encoding.stages.trellis import TrellisQuantization
from fedq.encoding.stages.uniform import UniformQuantization

__all__ = [
    "QSGD",
    "AdaptiveQuantileClip",
    "Cast",
    "ClipByNorm",
    "ClipByValue",
    "CosineRotation",
    "Eden",
    "HadamardRotation",
    "KMeans",
    "KashinRepresentation",
    "LloydMax",
    "Logarithmic",
    "NaturalCompression",
    "NormalFloat",
    "OneBitTwoMeans",
    "PowerSGD",
    "ProductQuantization",
    "RandomMask",
    "RandomSubspace",
    "ScaledSign",
    "SingularVectors",
    "StepQuantization",
    "TernGrad",
    "ThreeLevel",
    "Threshold",
    "TopK",
    "TrellisQuantization",
    "UniformQuantization",
    "ZeroOutliers",
]
