"""Federated algorithms, one in each file."""

from fedq.learning.algorithm import FedAvg
from fedq.learning.algorithms.fedbuff import FedBuff
from fedq.learning.algorithms.fednova import FedNova
from fedq.learning.algorithms.flex_lora import FlexLoRA
from fedq.learning.algorithms.ro_lora import RoLoRA
from fedq.learning.algorithms.scaffold import Scaffold

__all__ = ["FedAvg", "FedBuff", "FedNova", "FlexLoRA", "RoLoRA", "Scaffold"]
