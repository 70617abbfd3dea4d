"""Tensors ↔ bytes. Knows nothing of clients, servers, rounds, datasets or configuration; needs torch and numpy."""

from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.coders import AdaptiveCoder, Coder, FixedWidth, Raw
from fedq.encoding.encoder import Encoder
from fedq.encoding.message import MessageError
from fedq.encoding.spec import TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.encoding.stages import UniformQuantization
from fedq.encoding.state_dict import EncodeError, StateDictEncoder, schema_of
from fedq.keys import BROADCAST, Key

__all__ = [
    "BROADCAST",
    "AdaptiveCoder",
    "AdaptiveEncodingStage",
    "Coder",
    "EncodeError",
    "Encoder",
    "EncodingStage",
    "FixedWidth",
    "Key",
    "MessageError",
    "Raw",
    "StateDictEncoder",
    "StateUpdate",
    "TensorSpec",
    "UniformQuantization",
    "schema_of",
]
