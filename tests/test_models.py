import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fedq.data import Client, Examples
from fedq.learning import Classification, FederatedAveraging, LocalTraining, NextToken
from fedq.learning.local_training import channels_last
from fedq.models import MLP, CharLSTM, FedAvgCNN, ResNet, Transformer, WordLSTM
from fedq.models.transformer import rotated, rotations
from fedq.simulation.workers import Workers

RESNET18 = {"blocks": 2, "widths": (64, 128, 256, 512), "projection": True}
BUILDS = {
    "cnn": lambda: FedAvgCNN(10),
    "mlp": lambda: MLP(10),
    "char_lstm": lambda: CharLSTM(50),
    "word_lstm": lambda: WordLSTM(50),
    "transformer": lambda: Transformer(50),
    "resnet20": lambda: ResNet(10, channels=1, norm="group"),
    "resnet20, batch norm": lambda: ResNet(10, channels=1),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def examples(name):
    """Returns eight random examples of a model of BUILDS."""
    if name.endswith(("lstm", "transformer")):
        return torch.randint(0, 50, (8, 12)), torch.randint(0, 50, (8, 12))
    return torch.rand(8, 1, 28, 28), torch.randint(0, 10, (8,))


def steps(name, count):
    """Trains a new model with seed 0 on the same eight examples; returns the model and each step's loss."""
    torch.manual_seed(0)
    model, (x, y) = BUILDS[name](), examples(name)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(count):
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("name", BUILDS)
def test_a_model_learns_all_of_its_parameters(name):
    model, losses = steps(name, 5)
    assert losses[-1] < losses[0]
    torch.manual_seed(0)
    first = dict(BUILDS[name]().named_parameters())
    assert [key for key, value in model.named_parameters() if torch.equal(value, first[key])] == []


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_seed_gives_the_same_bits(name):
    (one, losses), (other, again) = steps(name, 2), steps(name, 2)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_numbers_of_parameters_are_the_papers():
    assert count(FedAvgCNN(10)) == 1_663_370
    assert count(MLP(10)) == 199_210
    assert count(FedAvgCNN(62)) == 1_663_370 + 52 * 513
    assert count(CharLSTM(90)) == 820_522
    assert count(WordLSTM(10_004)) == 4_050_748
    assert count(ResNet(10)) == 269_722  # He 2016, table 6: 0.27 M
    assert count(ResNet(10, 9)) == 853_018  # table 6, ResNet-56: 0.85 M
    assert count(ResNet(10, projection=True)) == 272_474
    assert count(ResNet(10, **RESNET18)) == 11_173_962
    for other in ({"norm": "group"}, {"channels": 1}):
        assert count(ResNet(10, **other)) == 269_722 - (9 * 2 * 16 if "channels" in other else 0)
    block = 12 * 128**2 + 13 * 128  # 4 and 8 matrices; 9 vectors of biases, 4 of norms
    assert count(Transformer(90)) == 90 * 128 + 4 * block + 2 * 128 == 804_864


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


def lstm(x, weights, name):
    """Returns the states (N, T, units) of an LSTM layer with one bias for `x` (N, T, inputs), step by step in numpy."""

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    into, around, bias = (weights[f"{name}.{part}_l0"] for part in ("weight_ih", "weight_hh", "bias_ih"))
    h = c = np.zeros((len(x), around.shape[1]))
    states = []
    for step in range(x.shape[1]):
        entry, forget, cell, out = np.split(x[:, step] @ into.T + h @ around.T + bias, 4, axis=1)
        c = sigmoid(forget) * c + sigmoid(entry) * np.tanh(cell)
        h = sigmoid(out) * np.tanh(c)
        states.append(h)
    return np.stack(states, 1)


def test_the_language_models_are_the_papers_step_by_step():
    torch.manual_seed(0)
    x = torch.randint(0, 50, (3, 9))
    for model in (CharLSTM(50), WordLSTM(50)):
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3)  # biases too
        w = {name: value.numpy() for name, value in model.state_dict().items()}
        h = w["embedding.weight"][x.numpy()]
        if isinstance(model, CharLSTM):
            h = lstm(lstm(h, w, "lstm1"), w, "lstm2") @ w["dense.weight"].T + w["dense.bias"]
        else:
            h = lstm(h, w, "lstm") @ w["dense1.weight"].T + w["dense1.bias"]
            h = h @ w["dense2.weight"].T + w["dense2.bias"]
        np.testing.assert_allclose(model(x).detach().numpy(), h, atol=1e-4)


def test_lstms_start_as_in_keras():
    torch.manual_seed(0)
    model = WordLSTM(10_004)
    assert model.embedding.weight.abs().max() <= 0.05
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.1 / math.sqrt(12), rel=0.01)
    fans = {"lstm.weight_ih_l0": 2 / 96, "dense1.weight": 2 / (670 + 96), "dense2.weight": 2 / (96 + 10_004)}
    for name, variance in fans.items():
        values = model.get_parameter(name).detach()
        assert float(values.var()) == pytest.approx(variance, rel=0.02)
        # 0.8796: standard deviation of a normal distribution that is cut at ±2
        assert 0.98 < values.abs().max() / (2 * math.sqrt(variance) / 0.8796) < 1.001
    around = model.lstm.weight_hh_l0.detach()
    torch.testing.assert_close(around.T @ around, torch.eye(670), atol=1e-4, rtol=0)
    entry, forget, cell, out = model.lstm.bias_ih_l0.detach().chunk(4)
    assert (forget == 1).all()
    assert not torch.cat((entry, cell, out, model.dense1.bias, model.dense2.bias)).any()


def test_the_second_bias_of_an_lstm_is_a_constant():
    model, _ = steps("char_lstm", 2)
    assert not any("bias_hh" in name for name in (*model.state_dict(), *dict(model.named_parameters())))
    assert not model.lstm1.bias_hh_l0.any()
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lstm2.weight_hh_l0)  # a copy uses the copied weights
    x, _ = examples("char_lstm")
    assert not torch.equal(other(x), model(x))
    assert model.double()(x).dtype == torch.float64
    assert model.lstm1.bias_hh_l0.dtype == torch.float64


@pytest.mark.parametrize("name", ["char_lstm", "word_lstm", "transformer"])
def test_logits_depend_on_earlier_tokens_only(name):
    torch.manual_seed(0)
    model = BUILDS[name]().eval()
    x, _ = examples(name)
    before = model(x)
    assert before.shape == (8, 12, 50)
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 50
    after = model(changed)
    assert torch.equal(after[:, :7], before[:, :7])
    assert (after[:, 7:] != before[:, 7:]).any(2).all()  # each later place sees the change
    torch.testing.assert_close(model(x[:, :5]), before[:, :5])


def test_a_transformer_knows_the_order_of_tokens():
    model = Transformer(50).eval()
    x = torch.tensor([[3, 4, 5, 6], [4, 3, 5, 6]])
    one, other = model(x)
    assert not torch.allclose(one[3], other[3], atol=1e-4)


def test_attention_is_the_papers():
    """Compares a block with Vaswani 2017, eq. 1, and with rotations as products of complex numbers (Su 2021)."""
    torch.manual_seed(0)
    model = Transformer(50, layers=1, width=16, heads=2).eval()
    (block,) = model.blocks
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 6, 16)
    q, k, v = block.attention_in(block.norm1(x))[0].chunk(3, 1)
    turns = torch.polar(torch.ones(6, 4), torch.arange(6)[:, None] * 10_000 ** (-torch.arange(4) / 4))
    heads = []
    for head in range(2):
        columns = slice(8 * head, 8 * head + 8)
        query, key = (torch.complex(*part[:, columns].split(4, 1)) * turns for part in (q, k))
        scores = (query @ key.conj().T).real / math.sqrt(8)
        for place in range(6):
            scores[place, place + 1 :] = -torch.inf
        heads.append(scores.softmax(1) @ v[:, columns])
    y = x + block.attention_out(torch.cat(heads, 1))
    expected = y + block.mlp_out(F.gelu(block.mlp_in(block.norm2(y))))
    torch.testing.assert_close(block(x, rotations(6, 8, x.device)), expected)


def test_a_rotation_leaves_what_depends_on_the_distance():
    torch.manual_seed(0)
    turns = rotations(20, 8, torch.device("cpu"))
    query, key = (rotated(torch.randn(8).expand(20, 8), turns) for _ in range(2))
    products = query @ key.T
    torch.testing.assert_close(products[3:, 3:], products[:-3, :-3])
    assert products.std() > 0.1


def test_a_transformer_drops_values_in_training_only():
    torch.manual_seed(0)
    x, _ = examples("transformer")
    model = Transformer(50, dropout=0.5)
    assert not torch.equal(model(x), model(x))
    still = copy.deepcopy(model).eval()
    assert torch.equal(still(x), still(x))
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    assert not torch.equal(model(x), model(x))  # attention weights are dropped as well
    model = Transformer(50, dropout=0.0)
    torch.testing.assert_close(model(x), copy.deepcopy(model).eval()(x))


def test_a_transformer_starts_as_its_paper_says():
    torch.manual_seed(0)
    for name, parameter in Transformer(50).named_parameters():
        values = parameter.detach()
        if parameter.dim() == 1:
            assert torch.equal(values, torch.full_like(values, float("norm" in name and name.endswith("weight")))), name
        else:
            added = "_out." in name  # 2 × 4 of them are added to the embeddings
            assert float(values.std()) == pytest.approx(0.02 / math.sqrt(8) if added else 0.02, rel=0.03), name


def test_a_width_that_heads_do_not_divide_is_refused():
    for heads in (3, 64, 0):
        with pytest.raises(ValueError, match="width / heads must be an even number"):
            Transformer(50, width=64, heads=heads)


def test_a_resnet_halves_its_images_twice():
    model = ResNet(10)
    shapes = []
    for block in model.stages:
        block.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[1:])))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    assert ResNet(62, channels=1)(torch.rand(2, 1, 28, 28)).shape == (2, 62)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20


def test_a_shortcut_of_option_a_adds_channels_of_zeros():
    block = ResNet(10).stages[3].eval()
    nn.init.zeros_(block.norm2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet18_is_torchvisions_with_another_first_layer(norm):
    torch.manual_seed(0)
    groups = {"norm_layer": lambda width: nn.GroupNorm(2, width)} if norm == "group" else {}
    theirs = torchvision.models.resnet18(num_classes=10, **groups)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = ResNet(10, **RESNET18, norm=norm)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(other)
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_convolutions_of_a_resnet_are_he_normal():
    torch.manual_seed(0)
    weight = ResNet(10, **RESNET18).stages[6].conv1.weight.detach()  # from 256 to 512 channels
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)


def test_group_norm_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    for norm, alone in (("group", True), ("batch", False)):
        model = ResNet(10, norm=norm)
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5) == alone
        names = [name for name, _ in model.named_buffers()]
        assert bool(names) == (norm == "batch")


def test_the_order_of_channels_in_memory_changes_no_result():
    torch.manual_seed(0)
    model, x = ResNet(10, norm="group"), torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(channels_last(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize("name", ["char_lstm", "transformer", "resnet20", "resnet20, batch norm"])
def test_a_round_has_the_same_bits_with_any_number_of_workers(name):
    torch.manual_seed(0)
    data = [Examples(*examples(name)) for _ in range(4)]
    clients = [Client(i, partial(data.__getitem__, i)) for i in range(4)]
    task = NextToken() if name in ("char_lstm", "transformer") else Classification()
    training, server = LocalTraining(lr=0.1, batch_size=3), partial(torch.optim.SGD, lr=1.0)
    states = []
    for count in (1, 2, 3):
        with Workers(count) as workers:
            process = FederatedAveraging(BUILDS[name], training, server, task=task, map=workers.map)
            states.append(process.next(process.initialize(), clients)[0].weights)
    for other in states[1:]:
        assert all(torch.equal(value, other[tensor]) for tensor, value in states[0].items())


def test_a_resnet_crops_the_middle_and_standardises_as_tensorflow_does():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 9, 10), dtype=torch.uint8)
    images[1] = 7
    model = ResNet(5, 1, (4, 8), norm="group", crop=6, standardise=True)
    seen = []
    model.conv.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    model(images.float() / 255)
    crop = images[:, :, 1:7, 2:8].numpy().astype(np.float64)
    mean, deviation = crop.mean((1, 2, 3), keepdims=True), crop.std((1, 2, 3), keepdims=True)
    expected = (crop - mean) / np.maximum(deviation, 1 / np.sqrt(3 * 6 * 6))  # tf.image.per_image_standardization
    assert np.allclose(seen[0].numpy(), expected, atol=1e-5)
    assert not seen[0][1].any()
    with pytest.raises(ValueError, match=r"\(3, 3, 9, 10\) have no 12 × 12 pixels: set model.crop lower"):
        ResNet(5, crop=12)(images.float())
