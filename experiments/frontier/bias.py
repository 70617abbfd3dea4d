"""What lossy updates do to the mean of many, and what error feedback does about it.

python -m experiments.frontier.bias [--tensors outputs/frontier/tensors.npz]

One real update (round15) is encoded by each encoder's upload: by 32 clients, whose keys differ, once; and by one client
in 32 rounds, without and with error feedback. `one` is the NMSE of a message, `mean` that of the mean over clients: an
unbiased chain's falls as 1/32, by 15 dB, what is left of a biased one's is its bias. `rounds` and `feedback` are the
NMSE of the mean over the rounds: with error feedback it falls as 1/32², by 30 dB, as far as the last residual is no
larger than one message's error, biased or not.
"""

import argparse
import math
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from experiments.frontier.tensors import load
from fedq.config import build_encoder
from fedq.encoding import Key, StateDictEncoder, schema_of
from fedq.train import CONF

CHOICES = "uniform eden drive qsgd random_mask step trellis sign top_k frontier"
N = 32
Tensors = dict[str, torch.Tensor]


def decibels(total: Tensors, truth: Tensors, count: int) -> float:
    """Returns the NMSE, over all tensors, of a sum of `count` updates."""
    error = sum(float((total[name] / count - x).double().square().sum()) for name, x in truth.items())
    return 10 * math.log10(max(error, 1e-300) / sum(float(x.double().square().sum()) for x in truth.values()))


def summed(encoder: StateDictEncoder, update: Tensors, keys: list[Key], feedback: bool) -> tuple[Tensors, float]:
    """Returns the sum of what is decoded under each key, and the NMSE of the first."""
    schema = schema_of(update)
    params = encoder.params(schema, encoder.initial_state(schema))
    total = {name: torch.zeros_like(x) for name, x in update.items()}
    residual, first = {name: torch.zeros_like(x) for name, x in update.items()}, 0.0
    for key in keys:
        told = {name: x + residual[name] for name, x in update.items()}
        message, _ = encoder.encode(told, key, params)
        decoded, _ = encoder.decode(message, key, schema, params)
        if feedback:
            residual = {name: x - decoded[name] for name, x in told.items()}
        if key == keys[0]:
            first = decibels(decoded, update, 1)
        total = {name: x + decoded[name] for name, x in total.items()}
    return total, first


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=Path, default=Path("outputs/frontier/tensors.npz"))
    update = {name: torch.from_numpy(x) for name, x in load(parser.parse_args().tensors, "round15").items()}
    torch.set_num_threads(1)
    print("| encoder | says it is unbiased | one | mean | rounds | feedback |\n|---|---|---|---|---|---|")
    for choice in CHOICES.split():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            encoder = build_encoder(compose("config", [f"encoder={choice}"]), "upload")
        chain = encoder.encoder.stages
        unbiased = all(stage.unbiased for stage in chain)
        clients, first = summed(encoder, update, [Key(0, 0, client) for client in range(N)], False)
        rounds, _ = summed(encoder, update, [Key(0, number, 0) for number in range(N)], False)
        fed, _ = summed(encoder, update, [Key(0, number, 0) for number in range(N)], True)
        cells = [f"{x:.1f} dB" for x in (first, *(decibels(total, update, N) for total in (clients, rounds, fed)))]
        print(f"| `{choice}` | {'yes' if unbiased else 'no'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
