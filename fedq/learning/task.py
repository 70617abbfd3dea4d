"""Tasks: loss and metrics of a model's outputs and of the targets of examples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fedq.data import Examples
from fedq.errors import FedqError

Reduction = Literal["mean", "sum"]
"""Whether a loss is the mean or the sum over the targets that count. Without targets, both are 0."""

Sums = Mapping[str, Any]
"""Sums over examples: numbers, or tensors of integers or float64. "targets" is the number of targets that count."""


Reported = Mapping[str, type[int] | type[float]]
"""Names of the sums that a client reports, with their types."""


class TaskError(FedqError):
    """The examples or the model's outputs do not fit the task; the message has the shapes and dtypes."""


class Task(ABC):
    """The interface of a task. Metrics follow from sums over examples: they do not depend on the split of the work.

    An author writes `loss` and `sums`, and names the headline. The other methods have defaults.

    headline: The name of the metric by which runs are compared.
    more_is_better: Whether a larger headline is better. If true, the headline must be a share, from 0 to 1, and is
        shown in per cent.
    reported: The sums that a client reports from training, with their types. The headline must follow from these
        sums. "targets" is needed unless each example has exactly one target that counts.
    """

    headline: ClassVar[str]
    more_is_better: ClassVar[bool] = True
    reported: ClassVar[Reported]

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Returns the loss over the targets that count, a scalar.

        outputs: The model's outputs, float32 or float64, shape (N, …).
        targets: The examples' targets, shape (N, …).
        reduction: As of torch's loss functions.
        """

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums of `reported`, except "targets", over the targets that count. For arguments see `loss`."""

    def test_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the sums from which an evaluation's metrics follow. By default, the reported sums."""
        return self.sums(outputs, targets)

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Returns all metrics that follow from sums; by default each sum divided by the number of targets.

        sums: The sums of `reported`, or of `test_sums`; in both cases with "loss" and "targets".
        """
        return {name: value / sums["targets"] for name, value in sums.items() if name != "targets"}

    def count(self, targets: Tensor) -> int:
        """Returns how many targets count; by default all."""
        return targets.numel()

    def check(self, outputs: Tensor, targets: Tensor) -> None:  # noqa: B027  # a task may take all
        """Raises TaskError for outputs and targets that the task does not take. By default, any are taken.

        outputs: The outputs of some examples.
        targets: The targets of all examples of a client, or of the test set.
        """

    def can_give(self, sums: Sums) -> bool:
        """Returns whether training can give these reported sums, with "loss" and "targets". By default, true."""
        return True


class Classification(Task):
    """One class for each example: cross entropy, and accuracy.

    Outputs are logits, shape (N, classes). Targets are classes, int64, shape (N,).
    """

    headline = "accuracy"
    reported: ClassVar[Reported] = {"correct": int}

    @override
    def loss(self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    @override
    def sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        return {"correct": (outputs.argmax(1) == targets).sum()}

    @override
    def metrics(self, sums: Sums) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["targets"], "accuracy": sums["correct"] / sums["targets"]}

    @override
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() != 2 or outputs.shape[1] < 2 or targets.dim() != 1 or targets.dtype != torch.int64:
            raise TaskError(
                "task=classification takes outputs of shape (N, classes), at least two classes, and int64 targets of "
                f"shape (N,), not {in_words(outputs, targets)}{remedy(self, targets)}"
            )
        check_classes(targets, outputs.shape[1])

    @override
    def can_give(self, sums: Sums) -> bool:
        return bool(sums["loss"] >= 0 and 0 <= sums["correct"] <= sums["targets"])


def check_examples(examples: Any) -> Examples:
    """Returns two tensors as examples. Raises TaskError unless they are two, of equal length."""
    if not (isinstance(examples, tuple | list) and len(examples) == 2):
        raise TaskError(f"examples must be two tensors of shape (N, …), not a {type(examples).__name__}")
    x, y = examples
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() and y.dim()):
        raise TaskError(f"examples must be two tensors of shape (N, …), not {type(x).__name__} and {type(y).__name__}")
    if len(x) != len(y):
        raise TaskError(f"the examples have {len(x)} inputs but {len(y)} targets")
    return Examples(x, y)


def check_fit(task: Task, outputs: Tensor, examples: int, targets: Tensor) -> None:
    """Raises TaskError unless a model's outputs and a dataset's targets fit the task.

    outputs: The model's outputs for some examples.
    examples: The number of these examples.
    targets: The targets of all examples.
    """
    if not outputs.dim() or len(outputs) != examples:
        raise TaskError(
            f"the model returns outputs {of(outputs)} for {examples} examples: the first axis must be the examples"
        )
    task.check(outputs, targets)
    if "targets" not in task.reported and task.count(targets) != len(targets):
        raise TaskError(
            f'task: {type(task).__name__}.reported must have "targets": int, because {len(targets)} examples have '
            f"{task.count(targets)} targets that count"
        )


def check_works(task: Task, outputs: Tensor, targets: Tensor) -> None:
    """Raises TaskError unless the methods of an author's task work, and give the `reported` sums and the headline."""
    try:
        others = task.sums(outputs, targets)
        sums = {"loss": task.loss(outputs, targets), "targets": task.count(targets), **others}
        once, twice = (
            {"loss": task.loss(x, y, "sum"), **task.test_sums(x, y)}
            for x, y in ((outputs, targets), (torch.cat([outputs] * 2), torch.cat([targets] * 2)))
        )
        if lacking := task.reported.keys() - sums.keys():
            raise TaskError(f"task: sums() of {type(task).__name__} lacks {min(lacking)!r}, which `reported` names")
        for name, value in twice.items():  # a mean stays the same
            if torch.any(torch.as_tensor(value)) and torch.equal(*map(torch.as_tensor, (once[name], value))):
                method = 'loss(…, reduction="sum")' if name == "loss" else f"{name!r} of sums()"
                raise TaskError(f"task: {method} of {type(task).__name__} must be a sum over examples, not a mean")
        of_client = {name: summable(sums[name]) for name in ("loss", "targets", *task.reported)}
        if of_client["targets"] and task.headline not in task.metrics(of_client):
            raise TaskError(f"task: metrics() of {type(task).__name__} lacks {task.headline!r}, the headline")
    except TaskError:
        raise
    except Exception as error:  # an author's task may raise any error
        reason = f"{type(error).__name__}: {error}"
        raise TaskError(f"task: {type(task).__name__} fails on {in_words(outputs, targets)}: {reason}") from error


def summable(value: Any) -> Any:
    """Returns a number or tensor as a Python number, or as a tensor of float64 or of its integers on the CPU."""
    if not isinstance(value, Tensor):
        return value
    value = value.double().cpu() if value.is_floating_point() else value.cpu()
    return value if value.dim() else value.item()


def outputs_of(returned: Any) -> Tensor:
    """Returns a model's outputs in float32; float64 stays float64. Raises TaskError if the outputs are not a tensor.

    returned: A model's result: a tensor, or an object with a tensor `logits`, as the models of the library
        transformers return.
    """
    outputs = getattr(returned, "logits", returned)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = f"a tensor {of(outputs)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise TaskError(
            f"the model returns {kind}: it must return a floating tensor, itself or as .logits of an object"
        )
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def of(tensor: Tensor) -> str:
    """Returns the shape and the dtype of a tensor in words."""
    return f"of shape {tuple(tensor.shape)} and dtype {str(tensor.dtype).removeprefix('torch.')}"


def remedy(task: Task, targets: Tensor) -> str:
    """Returns the end of an error's text: the task that these targets need, or "" without a better task."""
    of_fedq = type(task).__module__.startswith("fedq.")
    if targets.dtype in (torch.int32, torch.int16, torch.uint8):
        return "; give y.long()"
    if targets.dtype == torch.int64 and targets.dim() == 2 and targets.shape[1] == 1 and task.headline == "accuracy":
        return "; give y.squeeze(1)"
    counted, numbers = targets.dtype == torch.int64, targets.is_floating_point()
    if targets.dim() == 2 and bool(((targets == 0) | (targets == 1)).all()):
        kind, needed = "labels of 0 and 1", "multilabel"
    elif counted and targets.dim() in (1, 2):
        kind, needed = ("classes", "classification") if targets.dim() == 1 else ("tokens", "next_token")
    else:
        kind, needed = "numbers", "regression" if numbers else ""
    same = type(task).__name__.lower() == needed.replace("_", "")
    return f"; targets that are {kind} need task={needed}" if of_fedq and needed and not same else ""


def remedy_of_model(inputs: Tensor) -> str:
    """Returns the end of an error's text: a model that takes these inputs, or "" if no model is clear."""
    if inputs.dtype == torch.int64 and inputs.dim() == 2:
        return "; tokens need a model such as model=char_lstm"
    if inputs.dtype in (torch.uint8, torch.float64):
        return f"; most models take float32: give x.float(){' / 255' if inputs.dtype == torch.uint8 else ''}"
    if inputs.dim() == 4 and inputs.shape[3] in (1, 3) and inputs.shape[1] not in (1, 3):
        return "; most models take the channels before height and width: give x.permute(0, 3, 1, 2)"
    if inputs.is_floating_point() and inputs.dim() == 4:
        grey = inputs.shape[1:] == (1, 28, 28)
        model = "model=fedavg_cnn" if grey else f"model=resnet20 model.channels={inputs.shape[1]}"
        return f"; images of shape {tuple(inputs.shape[1:])} need a model such as {model}"
    return ""


def in_words(outputs: Tensor, targets: Tensor) -> str:
    """Returns the shapes and dtypes of outputs and targets, for an error's text."""
    return f"outputs {of(outputs)} and targets {of(targets)}"


def squeezed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns outputs of shape (N, 1) as (N,) if the targets have one axis; other outputs as they are."""
    return outputs.squeeze(1) if targets.dim() == 1 and outputs.dim() == 2 and outputs.shape[1] == 1 else outputs


def check_classes(targets: Tensor, classes: int) -> None:
    """Raises TaskError unless all targets are from 0 to `classes` − 1."""
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise TaskError(
            f"targets must be from 0 to {classes - 1}, because the model has {classes} outputs; these targets are "
            f"from {int(targets.min())} to {int(targets.max())}, {of(targets)}"
        )
