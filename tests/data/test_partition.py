"""Partitions: each example goes to one client, and sizes and label shares follow the papers' mathematics."""

import numpy as np
import pytest

from fedq.data.partition import Dirichlet, DirichletSizes, Iid, Natural, Pachinko, PowerLaw, Shards
from fedq.keys import Key

BY_LABEL = [Dirichlet(0.3), Shards(), Shards(3), Pachinko()]
ALL = [Iid(), DirichletSizes(), PowerLaw(), *BY_LABEL]


def columns(labels: int, each: int, coarse: int = 1) -> dict[str, np.ndarray]:
    """Returns shuffled labels, each one `each` times; label c is in superclass c mod `coarse`."""
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(labels), each))
    return {"label": label, "coarse_label": label % coarse}


def split(partition, known, clients, seed=0):
    return partition.split(len(known["label"]), known, clients, Key(seed).fold("partition"))


def named(partition):
    return type(partition).__name__


@pytest.mark.parametrize("partition", ALL, ids=named)
@pytest.mark.parametrize("clients", [1, 7, 100, 330])
def test_each_example_goes_to_one_client(partition, clients):
    parts = split(partition, columns(10, 99, coarse=3), clients)
    assert len(parts) == clients and min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(990))


@pytest.mark.parametrize("partition", [Iid(), Dirichlet(0.3), Pachinko(), PowerLaw(exponent=0)], ids=named)
def test_sizes_differ_by_one_at_most(partition):
    sizes = [len(part) for part in split(partition, columns(10, 101, coarse=2), 70)]
    assert sorted(set(sizes)) == [14, 15]


@pytest.mark.parametrize("partition", ALL, ids=named)
def test_the_key_decides_alone(partition):
    known = columns(10, 30, coarse=2)
    parts = split(partition, known, 12)
    np.random.seed(1)
    for one, same in zip(parts, split(partition, known, 12), strict=True):
        assert np.array_equal(one, same)
    other = split(partition, known, 12, seed=1)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(parts, other, strict=True))


def same(parts, column):
    """Returns the share of clients whose first two examples have the same value."""
    return np.mean([column[part[0]] == column[part[1]] for part in parts])


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_two_examples_of_a_client_have_one_label_as_often_as_under_a_dirichlet_distribution(alpha):
    known = columns(10, 4000)  # 2,000 clients with 20 examples each: after two turns, all labels have examples left
    parts = split(Dirichlet(alpha), known, 2000)
    assert same(parts, known["label"]) == pytest.approx((alpha + 1) / (10 * alpha + 1), abs=0.035)  # 3 deviations


def test_the_prior_is_that_of_the_dataset():
    label = np.repeat([3, 7, 8], [6000, 3000, 1000])
    parts = split(Dirichlet(alpha=0.2), {"label": label}, 2000)
    first, second = label[[part[0] for part in parts]], label[[part[1] for part in parts]]
    assert [np.mean(first == c) for c in (3, 7, 8)] == pytest.approx([0.6, 0.3, 0.1], abs=0.035)
    # Pólya's urn with the concentrations 0.6 · (0.6, 0.3, 0.1)
    expected = sum(p * (0.6 * p + 1) / (0.6 + 1) for p in (0.6, 0.3, 0.1))
    assert np.mean(first == second) == pytest.approx(expected, abs=0.035)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 10.0), (1.0, 0.5)])
def test_pachinko_draws_superclasses_and_then_labels(alpha, beta):
    known = columns(20, 2000, coarse=5)
    parts = split(Pachinko(alpha, beta), known, 2000)
    both = (alpha + 1) / (5 * alpha + 1)
    assert same(parts, known["coarse_label"]) == pytest.approx(both, abs=0.035)
    assert same(parts, known["label"]) == pytest.approx(both * (beta + 1) / (4 * beta + 1), abs=0.035)


def test_pachinko_leaves_the_share_of_a_used_label_to_its_superclass():
    # each client draws from one superclass; label 0 has three examples, and label 2 of the same superclass has the
    # others
    label = np.array([0] * 3 + [2] * 97 + [1] * 100)
    known = {"label": label, "coarse_label": label % 2}
    wanted = [set(part.tolist()) for part in split(Pachinko(alpha=1e-9, beta=1e6), known, 2)]
    coarse = [{int(label[i] % 2) for i in part} for part in wanted]
    assert coarse in ([{0}, {1}], [{1}, {0}], [{0, 1}, {0, 1}])
    draws = [split(Pachinko(alpha=1e-9, beta=1e6), known, 2, seed=seed) for seed in range(8)]
    pure = [parts for parts in draws if all(len(set(label[part] % 2)) == 1 for part in parts)]
    assert len(pure) >= 2  # half of the seeds give the clients different superclasses
    for parts in pure:
        assert sorted(len(set(label[part])) for part in parts) == [1, 2]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_client_has_as_many_shards_as_asked(shards):
    known = columns(10, 600)  # 100 shards or more, with borders at the borders of labels
    parts = split(Shards(shards), known, 100)
    assert {len(part) for part in parts} == {60}
    labels = [len(set(known["label"][part])) for part in parts]
    assert max(labels) == shards
    # McMahan 2016: two random shards of 200; each label fills 20 shards
    if shards == 2:
        assert np.mean(np.array(labels) == 1) == pytest.approx(19 / 199, abs=0.09)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_sizes_follow_a_power_law(exponent):
    sizes = sorted((len(part) for part in split(PowerLaw(exponent), columns(1, 5000), 50)), reverse=True)
    law = np.arange(1, 51) ** -exponent
    assert np.abs(np.array(sizes) - 1 - 4950 * law / law.sum()).max() < 1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_sizes_follow_a_dirichlet_distribution(alpha):
    known = columns(1, 20_000)
    draws = [[len(part) for part in split(DirichletSizes(alpha), known, 20, seed)] for seed in range(200)]
    second_moment = (np.array(draws) / 20_000) ** 2
    assert second_moment.sum(axis=1).mean() == pytest.approx((alpha + 1) / (20 * alpha + 1), rel=0.1)


def test_natural_clients_are_in_the_order_of_their_ids():
    known = {"label": np.zeros(6, int), "client": np.array(["b", "a", "c", "b", "a", "b"])}
    assert [part.tolist() for part in split(Natural(), known, None)] == [[1, 4], [0, 3, 5], [2]]


@pytest.mark.parametrize("partition", ALL, ids=named)
def test_more_clients_than_examples_are_refused(partition):
    most = 30 // getattr(partition, "shards", 1)
    with pytest.raises(ValueError, match=f"clients must be at most {most}, not 31: "):
        split(partition, columns(10, 3), 31)
    for clients in (0, -1, 2.0):
        with pytest.raises(ValueError, match="clients must be"):
            split(partition, columns(10, 3), clients)
    with pytest.raises(ValueError, match="clients must be a number for this partition"):
        split(partition, columns(10, 3), None)


@pytest.mark.parametrize("partition", BY_LABEL, ids=named)
def test_a_dataset_without_labels_is_refused(partition):
    with pytest.raises(ValueError, match="the dataset has no label of each example"):
        partition.split(10, {}, 2, Key(0))


def test_other_faults_are_named():
    known = {"label": np.array([0, 0, 1]), "coarse_label": np.array([0, 1, 1])}
    with pytest.raises(ValueError, match="a label is in two superclasses"):
        split(Pachinko(), known, 2)
    with pytest.raises(ValueError, match="the dataset has no client of each example"):
        split(Natural(), known, None)
    with pytest.raises(ValueError, match="clients must be null, not 3: the dataset already has 2 clients"):
        split(Natural(), {"label": np.zeros(3, int), "client": np.array([5, 7, 5])}, 3)
    for make in (Dirichlet, DirichletSizes, Pachinko):
        for alpha in (0, -1, float("nan"), 1.7e308, 5e-324):
            with pytest.raises(ValueError, match="alpha must be"):
                make(alpha)
    with pytest.raises(ValueError, match="shards must be"):
        Shards(0)
    with pytest.raises(ValueError, match="exponent must be"):
        PowerLaw(-1)


def test_ids_of_several_kinds_are_one_sentence():
    with pytest.raises(ValueError, match="the ids of the dataset's clients cannot be sorted: '<' not supported"):
        Natural().split(2, {"client": np.array(["a", None], dtype=object)}, None, Key(0))
