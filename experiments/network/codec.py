"""Measures the codec speed of a client: the million parameters that it decodes and encodes in a second of one thread.

The tensors are those of the default model: the first broadcast, and client 0's update.

python -m experiments.network.codec --encoders float32,uint8,drive,frontier
"""

import argparse
from statistics import median
from time import thread_time

import torch
from hydra import compose, initialize_config_dir
from rich.table import Table

from experiments.tables import show
from fedq.config import build, build_protocol
from fedq.encoding import Key
from fedq.learning import FederatedAveraging
from fedq.learning.local_training import update_of
from fedq.train import CONF


def seconds_of(encoder: str, repeats: int) -> tuple[float, float, int]:
    """Returns the median seconds to decode a broadcast and to encode an update, and the number of parameters."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"encoder={encoder}"])
    dataset = build(cfg, "dataset")
    arguments = build_protocol(cfg, dataset, torch.device("cpu"))
    process = FederatedAveraging(**arguments, server=torch.optim.SGD)
    protocol, key = process.protocol, Key(0, client=0)
    broadcast, _ = process.downlink.open(process.initialize(), [0])
    received = protocol.receive(broadcast.messages)
    model = protocol.model
    protocol.training.train(model, received.weights, dataset.client(0).load(), key)
    update = update_of(model.state_dict(), received.weights)
    times = []
    for _ in range(repeats + 1):
        started = thread_time()
        protocol.receive(broadcast.messages)
        decoded = thread_time()
        protocol.weights.upload.encode(update, key, received.upload_params, loss=1.0)
        times.append((decoded - started, thread_time() - decoded))
    decode, encode = (median(column) for column in zip(*times[1:], strict=True))  # the first call compiles
    return decode, encode, sum(value.numel() for value in update.values())


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description="Measures how fast a client decodes a broadcast and encodes an update."
    )
    parser.add_argument("--encoders", default="float32,uint8,drive,frontier", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=11, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("encoder", "decode, ms", "encode, ms", "million parameters a second")
    for encoder in args.encoders.split(","):
        decode, encode, parameters = seconds_of(encoder, args.repeats)
        speed = 2 * parameters / (decode + encode) / 1e6
        table.add_row(encoder, f"{1e3 * decode:.2f}", f"{1e3 * encode:.2f}", f"{speed:.0f}")
    show(table)


if __name__ == "__main__":
    main()
