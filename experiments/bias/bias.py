"""Measures the error of the mean of many lossy messages, without and with error feedback.

python -m experiments.bias.bias [--tensors outputs/tensors.npz]

The upload of each encoder encodes one real update (round15). 32 clients with different keys send the update, and one
client sends it in 32 rounds, without and with error feedback. The columns:

one       NMSE of one message
mean      NMSE of the mean over clients: falls as 1/32, by 15 dB, if the chain is unbiased; a bias remains
rounds    NMSE of the mean over rounds
feedback  the same with error feedback: falls as 1/32², by 30 dB, if the last residual is no larger than one error
"""

import argparse
import math
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from experiments.tensors.tensors import TENSORS, load
from fedq.config import build_encoder
from fedq.encoding import Key, StateDictEncoder, schema_of
from fedq.learning import ErrorFeedback
from fedq.train import CONF

CHOICES = "uniform eden drive qsgd random_mask step trellis sign top_k frontier"
N = 32
Tensors = dict[str, torch.Tensor]


def decibels(total: Tensors, truth: Tensors, count: int) -> float:
    """Returns the NMSE in decibels, over all tensors, of a sum of `count` updates."""
    error = sum(float((total[name] / count - x).double().square().sum()) for name, x in truth.items())
    return 10 * math.log10(max(error, 1e-300) / sum(float(x.double().square().sum()) for x in truth.values()))


def summed(encoder: StateDictEncoder, update: Tensors, keys: list[Key], feedback: bool) -> tuple[Tensors, float]:
    """Returns the sum of the decoded messages, one a key, and the NMSE of the first in decibels."""
    codec = encoder.bind(schema_of(update))
    params = codec.adaptation.params(codec.adaptation.initial_state())
    total = {name: torch.zeros_like(x) for name, x in update.items()}
    residual, first = {name: torch.zeros_like(x) for name, x in update.items()}, 0.0
    for key in keys:
        to_send = {name: x + residual[name] for name, x in update.items()}
        decoded, _ = codec.decode(codec.encode(to_send, key, params).message, key, params)
        if feedback:
            residual = {name: x - decoded[name] for name, x in to_send.items()}
        if key == keys[0]:
            first = decibels(decoded, update, 1)
        total = {name: x + decoded[name] for name, x in total.items()}
    return total, first


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=Path, default=TENSORS)
    update = {name: torch.from_numpy(x) for name, x in load(parser.parse_args().tensors, "round15").items()}
    torch.set_num_threads(1)
    print("| encoder | says it is unbiased | one | mean | rounds | feedback |\n|---|---|---|---|---|---|")
    for choice in CHOICES.split():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            encoder = build_encoder(compose("config", [f"encoder={choice}"]), "upload")
        if isinstance(encoder, ErrorFeedback):
            encoder = encoder.encoder
        unbiased = all(stage.unbiased for stage in encoder.encoder.stages)
        clients, first = summed(encoder, update, [Key(0, 0, client) for client in range(N)], False)
        rounds, _ = summed(encoder, update, [Key(0, number, 0) for number in range(N)], False)
        fed, _ = summed(encoder, update, [Key(0, number, 0) for number in range(N)], True)
        cells = [f"{x:.1f} dB" for x in (first, *(decibels(total, update, N) for total in (clients, rounds, fed)))]
        print(f"| `{choice}` | {'yes' if unbiased else 'no'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
