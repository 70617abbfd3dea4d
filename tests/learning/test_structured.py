"""Structured updates: clients take only steps that their upload can send (Konečný 2016, §2)."""

from functools import partial

import pytest
import torch

from fedq.encoding import (
    Encoder,
    FixedWidth,
    FollowLoss,
    Key,
    PowerSGD,
    RandomMask,
    RandomSubspace,
    StateDictEncoder,
    UniformQuantization,
)
from fedq.errors import FedqError
from fedq.learning import LocalTraining
from fedq.learning import client as client_half
from fedq.learning.local_training import update_of

UPLOADS = {
    "mask": StateDictEncoder(Encoder([RandomMask(0.1, scale=False)]), 1000),
    "subspace": StateDictEncoder(Encoder([RandomSubspace(50, scale=False)]), 1000),
    "joint": StateDictEncoder(Encoder([RandomMask(0.3, shared=True, scale=False)]), 100, joint=True),
    "exact": StateDictEncoder(),
}


def losses(process, client, upload, structured, rounds=1, parts=None, **settings):
    """Trains three clients; returns each round's loss, and the part of each client's update that the upload loses."""
    lost = []
    local = LocalTraining(lr=0.1, epochs=2, structured=structured, **settings)
    averaging = process(client=local, upload=upload, **(parts or {}))

    def recording(trained, received):
        lost.append(update_of({name: value.clone() for name, value in trained.items()}, received))
        return update_of(trained, received)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_half, "update_of", recording)
        state, found = averaging.initialize(), []
        for number in range(rounds):
            cohort = [client(i) for i in range(3)]
            after, metrics = averaging.next(state, cohort)
            assert metrics["clients_failed"] == 0
            found.append(metrics["train/loss"])
            for i, update in enumerate(lost[-3:]):
                codec, key = averaging.protocol.weights.upload, Key(0, number, i)
                params = codec.adaptation.params(state.upload)
                decoded, _ = codec.decode(codec.encode(update, key, params).message, key, params)
                lost[-3 + i] = max(
                    float((decoded[n] - update[n]).norm() / update[n].norm().clamp(min=1e-30))
                    for n in averaging.protocol.parameters  # the mask may keep no element of a small tensor
                )
            state = after
    return found, lost


@pytest.mark.parametrize("upload", UPLOADS)
def test_nothing_of_the_update_is_lost(process, client, upload):
    _, lost = losses(process, client, UPLOADS[upload], True, momentum=0.5, proximal=0.1)
    assert max(lost) < 3e-5  # rounding of float32 in (w + update) − w
    if upload != "exact":
        _, lost = losses(process, client, UPLOADS[upload], False)
        assert min(lost) > 0.5


@pytest.mark.parametrize("upload", ["mask", "subspace", "joint"])
def test_it_learns(process, client, upload):
    found, _ = losses(process, client, UPLOADS[upload], True, rounds=8)
    assert found[-1] < found[0] - 0.02
    assert found[-1] == min(found)


def test_it_is_the_same_as_sgd_where_all_is_sent(process, client):
    plain, structured = (
        process(client=LocalTraining(lr=0.1, momentum=0.9, structured=s)).next(process().initialize(), [client(0)])
        for s in (False, True)
    )
    assert all(torch.equal(value, structured[0].weights[name]) for name, value in plain[0].weights.items())
    assert plain[1]["aggregated_bits"] == structured[1]["aggregated_bits"]


def test_steps_are_the_projected_gradients(tiny, client):
    # halving is no projection, but shows that each gradient is projected once, and only the gradient
    examples, key = client(3, 20).load(), Key(0)
    torch.manual_seed(0)
    model = tiny()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    updates = []
    for project in (None, lambda gradients: {name: gradient / 2 for name, gradient in gradients.items()}):
        LocalTraining(lr=0.1).train(model, start, examples, key, project)
        updates.append({name: value - start[name] for name, value in model.state_dict().items()})
    for name, update in updates[0].items():
        torch.testing.assert_close(updates[1][name], update / 2, rtol=1e-3, atol=1e-7)


def test_buffers_of_the_joint_vector_do_not_move_the_mask(process, client, normalised):
    # a batch norm's statistics have no gradient: the small tensors are sent exact, outside the joint vector
    upload = StateDictEncoder(Encoder([RandomMask(0.3, scale=False)]), 0, joint=True)
    _, lost = losses(process, client, upload, True, parts={"model": normalised})
    assert max(lost) < 3e-5


@pytest.mark.parametrize(
    "stage",
    [RandomMask(0.1), RandomSubspace(50), PowerSGD(2), UniformQuantization(8)],
    ids=lambda stage: type(stage).__name__,
)
def test_an_upload_that_is_no_projection_is_refused(process, stage):
    coder = FixedWidth() if isinstance(stage, UniformQuantization) else Encoder().coder
    upload = StateDictEncoder(Encoder([stage], coder), 1000)
    with pytest.raises(FedqError, match="client.structured: the upload of 'big.weight' is not a projection"):
        process(client=LocalTraining(lr=0.1, structured=True), upload=upload)
    process(client=LocalTraining(lr=0.1), upload=upload)


def test_a_gradient_that_cannot_be_sent_leaves_the_client_out(process, client):
    from fedq.data import Client, Examples

    bad = Client(9, lambda: Examples(torch.full((5, 1, 28, 28), torch.inf), torch.zeros(5, dtype=torch.int64)))
    averaging = process(client=LocalTraining(lr=0.1, structured=True), server=partial(torch.optim.SGD, lr=1.0))
    _, metrics = averaging.next(averaging.initialize(), [client(0), bad])
    assert metrics["clients_failed"] == 1


def test_a_structured_client_can_follow_the_loss(process, client):
    chain = Encoder([RandomSubspace(50, scale=False)])
    paced = StateDictEncoder(chain, 1000, common_scale=True, rate_control=FollowLoss(start=1.0))
    averaging = process(client=LocalTraining(lr=0.1, structured=True), upload=paced)
    _, metrics = averaging.next(averaging.initialize(), [client(1)])
    assert metrics["clients_failed"] == 0
