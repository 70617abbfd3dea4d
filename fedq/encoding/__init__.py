"""Tensors ↔ bytes. Needs torch and numpy; imports nothing of rounds, datasets or configuration."""

from fedq.encoding import coders, stages
from fedq.encoding.adaptive import StateUpdate
from fedq.encoding.codec import Codec, Decoded, Encoded, EncodeError
from fedq.encoding.coders import *  # noqa: F403  # its __all__ is the one list of names
from fedq.encoding.encoder import Encoder
from fedq.encoding.message import MessageError
from fedq.encoding.rate_control import BitBudget, FollowLoss
from fedq.encoding.schema import TensorSpec, schema_of
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.encoding.stages import *  # noqa: F403  # its __all__ is the one list of names
from fedq.encoding.state_dict import StateDictEncoder
from fedq.keys import BROADCAST, Key

__all__ = [
    "BROADCAST",
    "AdaptiveEncodingStage",
    "BitBudget",
    "Codec",
    "Decoded",
    "EncodeError",
    "Encoded",
    "Encoder",
    "EncodingStage",
    "FollowLoss",
    "Key",
    "MessageError",
    "StateDictEncoder",
    "StateUpdate",
    "TensorSpec",
    "schema_of",
]
__all__ += coders.__all__
__all__ += stages.__all__
