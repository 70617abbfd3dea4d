"""Options that cannot be combined, each with its error message; and the order in which options wrap a direction.

On the way out: federated dropout cuts the tensors, error feedback adds the residual, the reference is subtracted, the
common scale divides, and the chain encodes. On the server the guard checks the decoded update last.
"""

from dataclasses import replace
from glob import escape

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedq.encoding import Codec, Encoder, Key, StateDictEncoder, ZeroOutliers, schema_of
from fedq.errors import FedqError
from fedq.learning.algorithm import FedAvg
from fedq.learning.error_feedback import Direction, ErrorFeedback
from fedq.learning.local_training import LocalTraining
from fedq.learning.optimizers import stepped, tried
from fedq.learning.parts import Parts
from fedq.learning.submodel import FederatedDropout


def check_together(
    training: LocalTraining,
    algorithm: FedAvg,
    broadcast: Direction,
    upload: Direction,
    submodel: FederatedDropout | None,
) -> None:
    """Raises FedqError for options that cannot be combined, or that a direction does not have."""
    algorithm.check(training)
    check_optimizer(training)
    check_directions(broadcast, upload)
    down, up = (way.encoder if isinstance(way, ErrorFeedback) else way for way in (broadcast, upload))
    changed = (type(algorithm).groups, type(algorithm).to_sum, type(algorithm).phases)
    with_groups = changed != (FedAvg.groups, FedAvg.to_sum, FedAvg.phases)
    refused = {
        "run.submodel: reference=last needs clients that receive the whole model": submodel
        and "last" in (down.reference, up.reference),
        "run.submodel: algorithm.personal needs clients that train the whole model": submodel and algorithm.personal,
        "run.submodel: error_feedback must be false: the residual of one sub-model is not that of the next": submodel
        and (isinstance(broadcast, ErrorFeedback) or isinstance(upload, ErrorFeedback)),
        "run.submodel: client.structured must be false: a sub-model is trained as it is": submodel
        and training.structured,
        f"run.submodel: algorithm={type(algorithm).__name__.lower()} needs clients that train the whole model": submodel
        and with_groups,
        "run.submodel: client.keep_optimizer must be false: a client's next sub-model has other parameters": submodel
        and training.keep_optimizer,
        "client.structured needs client.optimizer=null and client.keep_optimizer=false: the upload can "
        "send SGD's steps only": training.structured and (training.optimizer or training.keep_optimizer),
        f"client.structured must be false with algorithm={type(algorithm).__name__.lower()}: its corrections of a step "
        "are not within what the upload can send": training.structured
        and type(algorithm).correct is not FedAvg.correct,
        "client.structured cannot go with encoder.upload.error_feedback: a structured update is sent without loss, and "
        "the residual of another round is not in the subspace of this one": training.structured
        and isinstance(upload, ErrorFeedback),
    }
    for sentence, applies in refused.items():
        if applies:
            raise FedqError(sentence)


def check_directions(broadcast: Direction, upload: Direction) -> None:
    """Raises FedqError for an option that a direction does not have."""
    down, up = (way.encoder if isinstance(way, ErrorFeedback) else way for way in (broadcast, upload))
    if up.reference != "none":
        raise FedqError(f"upload.reference must be none, not {up.reference}: an update is a difference already")
    if down.rate_control and down.rate_control.reports == "loss":
        raise FedqError("broadcast.rate_control: only clients know a training loss; use upload.rate_control")


def check_optimizer(training: LocalTraining) -> None:
    """Raises FedqError if the client's optimizer or schedule cannot be built or stepped, or keeps no tensors."""
    if training.optimizer:
        optimizer = tried("client.optimizer", lambda: stepped(training.optimizer_of, {"weight": torch.zeros(2, 2)}))
        if training.keep_optimizer and not optimizer.state():
            raise FedqError("client.keep_optimizer must be false: the optimizer has no state")
    if training.schedule:
        training.at(1)


def fitted(way: str, encoder: StateDictEncoder, model: nn.Module, parts: Parts) -> StateDictEncoder:
    """Returns `encoder` with rules that send small floating buffers exact, whatever its threshold.

    A small buffer has at most as many elements as the default threshold. The encoder's own rules come first. A step
    that suits weights could round batch norm's running variances to below 0.

    Raises FedqError for a rule that no tensor follows.
    """
    schema, largest = schema_of(parts.travelling(model.state_dict())), StateDictEncoder().threshold
    if idle := encoder.idle_rules(schema):
        raise FedqError(
            f"encoder.{way}.rules: no tensor follows {idle[0]!r}: no name fits it, or an earlier rule fits first. "
            f"The tensors are {', '.join(schema)}"
        )
    buffers = {name: schema[name] for name, _ in model.named_buffers() if name in schema}
    exact = [name for name, spec in buffers.items() if spec.dtype.is_floating_point and spec.numel <= largest]
    rules = {escape(name): Encoder() for name in exact}
    return replace(encoder, rules={**encoder.rules, **rules}) if rules else encoder


def check_model(model: nn.Module, parts: Parts, submodel: FederatedDropout | None) -> None:
    """Raises FedqError, naming the tensor, for a model whose state_dict cannot be sent and averaged.

    Each entry must be a dense tensor with values. Only tied entries may share memory. Entries that are not frozen must
    have a dtype with a mean.
    """
    if submodel and (ties := list(parts.tied.items())):
        raise FedqError(f"run.submodel: {ties[0][1]!r} and {ties[0][0]!r} are tied, and a sub-model would untie them")
    places: list[tuple[int, int, int, str]] = []  # storage, first byte, end, name
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise FedqError(
                f"model: {name!r} of its state_dict is a {kind}: "
                "get_extra_state must return a tensor; otherwise remove it"
            )
        if is_lazy(tensor):
            raise FedqError(f"model: {name!r} has no shape yet: give lazy layers their sizes, or run the model once")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise FedqError(f"model: {name!r} must be a dense tensor with values, not sparse, quantized or meta")
        if name not in parts.frozen and (tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize < 2)):
            raise FedqError(
                f"model: {name!r} is {str(tensor.dtype).removeprefix('torch.')}: only floats of 16 to 64 bits, "
                "integers and booleans have a mean. Buffers that never change need persistent=False or a pattern in "
                "algorithm.frozen"
            )
        extent = 1
        for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
            if size > 1 and stride < extent:
                raise FedqError(f"model: elements of {name!r} share memory, as expand() makes them: clone() the tensor")
            extent += (size - 1) * stride
        if tensor.numel() and name not in parts.tied:
            start = tensor.data_ptr()
            end = start + extent * tensor.itemsize
            storage = tensor.untyped_storage().data_ptr()
            for other, first, last, other_name in places:
                if other == storage and start < last and first < end:
                    equal = (first, last) == (start, end)
                    reason = (
                        "are one tensor: only a Parameter may have two names" if equal else "share memory: clone() one"
                    )
                    raise FedqError(f"model: {other_name!r} and {name!r} {reason}")
            places.append((storage, start, end, name))


def check_phases(algorithm: FedAvg, training: LocalTraining, upload: Direction, codec: Codec) -> None:
    """Raises FedqError if parameters rest in some rounds, and an option needs all parameters."""
    refused = {
        "client.keep_optimizer must be false": training.keep_optimizer,
        "client.structured must be false": training.structured,
        "encoder.upload.error_feedback must be false": isinstance(upload, ErrorFeedback),
        "the upload must have no adaptive part": codec.adaptation.parts,
    }
    for sentence, applies in refused.items():
        if applies:
            name = type(algorithm).__name__.lower()
            raise FedqError(f"algorithm={name}: {sentence}, because clients send only some parameters in a round")


def check_scaled(algorithm: FedAvg, upload: Codec, model: nn.Module) -> None:
    """Raises FedqError if the algorithm scales parameters' updates and the joint vector holds a buffer beside them."""
    buffers = [name for name, _ in model.named_buffers() if name in upload.schema and name not in upload.chains]
    if buffers and type(algorithm).rescale is not FedAvg.rescale:
        name = type(algorithm).__name__.lower()
        raise FedqError(
            f"encoder.upload.joint must be false with algorithm={name}: it scales the updates of parameters only, and "
            f"the joint vector holds the buffer {buffers[0]!r}, unless a rule encodes that buffer"
        )


def check_feedback(way: str, codec: Codec, key: Key) -> None:
    """Raises FedqError if the chain's error on normal input exceeds the input's energy: residuals would diverge.

    Error feedback needs a contraction (Karimireddy 2019). A chain that scales up its values to be
    unbiased is often not a contraction.
    """
    for chain in codec.chains.values():
        if any(isinstance(stage, ZeroOutliers) for stage in chain.encoder.stages):
            raise FedqError(
                f"encoder.{way}.error_feedback must be false with ZeroOutliers: the next message would hold "
                "the outliers"
            )
    draw, schema = key.generator(), codec.schema
    zeros = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
    sent = {
        name: torch.from_numpy(draw.standard_normal(schema[name].shape)).to(schema[name].dtype)
        for name in codec.compressed
    }
    params = codec.adaptation.params(codec.adaptation.initial_state())
    encoded = codec.encode(zeros | sent, key, params, reference=zeros, loss=1.0)
    decoded, _ = codec.decode(encoded.message, key, params, reference=zeros)
    left = sum(float((sent[name] - decoded[name]).double().square().sum()) for name in sent)
    error = left / max(1.0, sum(float(value.double().square().sum()) for value in sent.values()))
    if error > 1.001:
        raise FedqError(
            f"encoder.{way}.error_feedback must be false: this chain's squared error on normal numbers is {error:.2f} "
            "times their energy. Residuals would grow from round to round. Use a chain that does not scale "
            "up what it sends"
        )
