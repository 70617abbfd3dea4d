"""Damaged records through the mod and the wrapper of fedq on Flower: refused in one sentence, or harmless."""

import argparse
import logging
import re
from collections.abc import Iterable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from typing_extensions import override

from experiments.flower.nodes import Nodes, Seen, app_of, array_of, first_weights
from fedq.encoding import BitBudget, Encoder, FixedWidth, StateDictEncoder, UniformQuantization, schema_of
from fedq.encoding import message as frame
from fedq.integrations.flower import Compressed, compression
from fedq.learning.error_feedback import Direction, ErrorFeedback

UINT8 = StateDictEncoder(Encoder([UniformQuantization(bits=8)], FixedWidth()))
SCHEMES: dict[str, tuple[Direction, Direction]] = {
    "uint8": (UINT8, UINT8),
    "reference=last, error feedback": (StateDictEncoder(UINT8.encoder, reference="last"), ErrorFeedback(UINT8)),
    "bit budget": (UINT8, StateDictEncoder(UINT8.encoder, common_scale=True, rate_control=BitBudget(8.0))),
}


class Watched(FedAvg):
    """FedAvg that notes why replies are left out."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.reasons: list[str] = []

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        self.reasons = [reply.error.reason or "" for reply in replies if reply.has_error()]
        return super().aggregate_train(server_round, replies)


def damage(draw: np.random.Generator, record: ArrayRecord) -> None:
    """Damages a record of messages in one of nine ways."""
    name = str(draw.choice(list(record)))
    array = record[name]
    data, kind = bytearray(array.data), int(draw.integers(9))
    if kind == 0:  # a bit
        data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    elif kind == 1:
        del data[draw.integers(len(data)) :]
    elif kind == 2:
        data += draw.bytes(int(draw.integers(1, 50)))
    elif kind == 3:
        data = bytearray(draw.bytes(int(draw.integers(0, 200))))
    elif kind == 4:  # a forged body with a right checksum
        body = bytearray(data[44:-4])
        for _ in range(draw.integers(1, 4)):
            body[draw.integers(len(body))] = int(draw.integers(256))
        data = bytearray(frame.pack([bytes(body)], *frame.peek(bytes(data))))
    elif kind == 5:
        del record[name]
        return
    elif kind == 6:
        record[str(draw.choice(["x", "fedq.message", "fedq.contact", "fedq.reference"]))] = record.pop(name)
        return
    elif kind == 7:
        dtype, stype = draw.choice(["float32", "uint8"]), draw.choice(["numpy.ndarray", "fedq.message"])
        shape = tuple(map(int, draw.integers(-5, 2**31, draw.integers(0, 3))))
        record[name] = Array(str(dtype), shape, str(stype), bytes(data))
        return
    else:  # a number in a JSON text, with a right checksum; a body of anything else is forged
        body = bytearray(data[44:-4])
        digits = [place for place, byte in enumerate(body[:5000]) if chr(byte).isdigit()] or [0]
        body[draw.choice(digits)] = ord(str(draw.integers(10)))
        data = bytearray(frame.pack([bytes(body)], *frame.peek(bytes(data))))
    record[name] = array_of(bytes(data))


def fuzz(seed: int, count: int, broadcast: Direction, upload: Direction) -> dict[str, int]:
    """Sends `count` damaged records to a node, and as many to the server. A second node is left alone.

    Returns how many the mod and the wrapper refused, and how many were harmless. Raises AssertionError unless each
    record is refused in one sentence, or gives finite weights of the schema, and each round has a result.
    """
    draw, counts = np.random.default_rng(seed), {"mod": 0, "wrapper": 0, "harmless": 0}
    schema, target = schema_of(first_weights().to_torch_state_dict()), 1000
    seen: Seen = []

    def network(message: Message) -> Message:
        ends = (message.metadata.src_node_id, message.metadata.dst_node_id)
        if message.has_content() and ends == ((1, 1000) if target == 1000 else (1000, 1)):
            damage(draw, message.content.array_records["arrays"])
        return message

    grid = Nodes([app_of(0.01, [compression()], seen), app_of(0.02, [compression()])], network)
    strategy = Watched()
    compressed, arrays = Compressed(strategy, broadcast, upload), first_weights()
    for step in range(2 * count):
        target = 1 if step % 2 else 1000
        messages = compressed.configure_train(step + 1, arrays, ConfigRecord(), grid)
        aggregated, _ = compressed.aggregate_train(step + 1, grid.send_and_receive(messages))
        assert aggregated is not None, "the other node's reply is lost"
        for weights in (*seen, aggregated.to_torch_state_dict()):
            assert schema_of(weights) == schema, "weights of another schema"
            assert all(bool(torch.isfinite(value).all()) for value in weights.values()), "weights are not finite"
        for reason in strategy.reasons:
            assert re.fullmatch("fedq: .+", reason), reason
        assert len(strategy.reasons) <= 1, "the other node failed"
        refused_by = "mod" if target == 1000 else "wrapper"
        counts[refused_by if strategy.reasons else "harmless"] += 1
        seen.clear()
    return counts


def main() -> None:
    """Prints how many damaged records were refused, by scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000, help="damaged records, over all schemes and both sides")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    count = parser.parse_args().records // (2 * len(SCHEMES)) + 1
    for name, (broadcast, upload) in SCHEMES.items():
        print(f"{name}: {2 * count} damaged records: {fuzz(0, count, broadcast, upload)}")


if __name__ == "__main__":
    main()
