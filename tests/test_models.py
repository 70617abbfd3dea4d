import math

import pytest
import torch
import torch.nn.functional as F

from fedq.models import MLP, FedAvgCNN


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_numbers_of_parameters_are_the_papers():
    assert count(FedAvgCNN(10)) == 1_663_370
    assert count(MLP(10)) == 199_210
    assert count(FedAvgCNN(62)) == 1_663_370 + 52 * 513


def test_two_tensors_of_the_cnn_are_large():
    sizes = sorted(p.numel() for p in FedAvgCNN(10).parameters())
    assert [size for size in sizes if size > 10_000] == [51_200, 1_605_632]


@pytest.mark.parametrize("build", [FedAvgCNN, MLP])
def test_weights_are_glorot_uniform_and_biases_zero(build):
    model = build(10)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
            continue
        receptive = math.prod(parameter.shape[2:])
        limit = math.sqrt(6 / (parameter.shape[0] * receptive + parameter.shape[1] * receptive))
        values = parameter.detach()
        assert values.abs().max() <= limit
        assert values.abs().max() > 0.95 * limit
        assert float(values.std()) == pytest.approx(limit / math.sqrt(3), rel=0.1)


def test_the_cnn_is_the_papers_layer_by_layer():
    """Compares the CNN with functional calls in the order of the paper: convolution, ReLU, pool."""
    torch.manual_seed(0)
    model, x = FedAvgCNN(10), torch.rand(3, 1, 28, 28)
    p = dict(model.named_parameters())
    h = F.max_pool2d(F.relu(F.conv2d(x, p["conv1.weight"], p["conv1.bias"], padding="same")), 2)
    h = F.max_pool2d(F.relu(F.conv2d(h, p["conv2.weight"], p["conv2.bias"], padding="same")), 2)
    h = F.relu(h.reshape(3, -1) @ p["dense1.weight"].T + p["dense1.bias"])
    torch.testing.assert_close(model(x), h @ p["dense2.weight"].T + p["dense2.bias"])
    assert (model(x) < 0).any()  # logits, not probabilities
