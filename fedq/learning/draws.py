"""Random draws of a model in training: each client's draws follow from the client's key."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from fedq.keys import Key


@contextmanager
def seeded(key: Key, device: torch.device) -> Iterator[None]:
    """Seeds the generators that all threads share, for a model's first weights, and restores them afterwards."""
    of_python, of_numpy, seed = random.getstate(), np.random.get_state(), key.integer()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


_DRAWING = (
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli"),
    *("multinomial", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "rrelu", "rrelu_"),
    *("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"),
    *("dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_dropout_", "native_dropout"),
    *("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_", "_fused_dropout"),
    *("fractional_max_pool2d", "fractional_max_pool2d_with_indices", "fractional_max_pool3d"),
    *("fractional_max_pool3d_with_indices", "gumbel_softmax"),
)
"""The names of functions of torch, Tensor and torch.nn.functional that draw random numbers."""

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
"""Recurrent networks of several layers. With dropout, the C++ code of these networks draws between two layers."""

# in the backward pass, gradient checkpointing repeats computations that draw
_COMPOSED = (F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad)
"""Functions whose Python code calls functions that draw."""


_SFC64_BYTES = 32


class KeyedDraws(TorchFunctionMode):
    """In a `with` block, torch draws the calling thread's random numbers from the client's generator.

    If a caller passes a generator to torch, torch uses that generator. In the block, `torch.get_rng_state` and
    `torch.set_rng_state` read and set the state of the client's generators. Gradient checkpointing therefore repeats
    the same draws. Draws of numpy, of Python's `random` and of other compiled code do not change.

    drawn: Whether torch has drawn since the block began.
    """

    def __init__(self, key: Key, device: torch.device) -> None:
        """Seeds the generators.

        key: The key of the draws.
        device: Where the model is trained. Functions that draw on the CPU have a second generator.
        """
        super().__init__()
        self.drawn = False
        places = {torch.device("cpu").type: torch.device("cpu"), device.type: device}
        self.generators = {
            kind: torch.Generator(place).manual_seed(key.fold(kind).integer()) for kind, place in places.items()
        }
        self._bits = key.fold("dropout").bit_generator()
        self._hand_over = _HandOver(self)

    @override
    def __enter__(self) -> Self:
        torch.get_rng_state, torch.set_rng_state = _get_rng_state, _set_rng_state
        super().__enter__()  # type: ignore[no-untyped-call]  # torch gives no types here
        return self

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a function of torch. torch switches this mode off until the function returns."""
        run = _runners().get(func)
        return func(*args, **(kwargs or {})) if run is None else run(self, func, *args, **(kwargs or {}))

    def draw(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function whose C++ code draws."""
        with self._hand_over:
            return func(*args, **kwargs)

    def compose(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function whose Python code calls functions that draw."""
        with self:
            return _without_override(func)(*args, **kwargs)

    def drop(
        self, func: Callable[..., Any], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Runs dropout as torch does for the same mask. On a CPU, the key's raw bits are three times as fast."""
        if input.device.type != "cpu" or not training or not 0 < p < 1:
            arguments = (inplace,) if func is F.dropout else ()
            dropped: Tensor = self.draw(func, input, p, training, *arguments)
            return dropped
        self.drawn = True
        n = input.numel()
        kept = self._bits.random_raw((n + 1) // 2).astype("<u8", copy=False).view("<u4")[:n] < round((1 - p) * 2**32)
        noise = torch.from_numpy(kept).view(input.shape).to(input.dtype).div_(1 - p)
        return input.mul_(noise) if inplace or func is torch.dropout_ else input * noise

    def attend(
        self,
        func: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Runs scaled_dot_product_attention. With dropout, torch's fused kernels would ignore the client's key."""
        if not dropout_p > 0:
            options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            attended: Tensor = func(query, key, value, attn_mask, dropout_p, **options)
            return attended
        # with values of no columns, torch returns the attention weights alone
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        _, weights = torch._scaled_dot_product_attention_math(
            query, key, value[..., :0], attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if enable_gqa:
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        return self.drop(torch.dropout, weights, dropout_p) @ value

    def recur(self, func: Callable[..., Any], *args: Any) -> Any:
        """Runs a recurrent network layer by layer, with dropout between two layers."""
        # padded batch: x, state, weights, …; packed batch: x, lengths, state, weights, …
        first = 1 if isinstance(args[3], bool) else 2
        x, lengths, (states, weights, biased, layers, dropout, training, bidirectional, *order) = (
            args[0],
            args[1:first],
            args[first:],
        )
        if layers == 1 or not dropout or not training:
            return func(*args)
        rows, each, last = 2 if bidirectional else 1, len(weights) // layers, []
        for layer in range(layers):
            if layer:
                x = self.drop(torch.dropout, x, dropout)
            part = slice(layer * rows, (layer + 1) * rows)
            state = states[part] if isinstance(states, Tensor) else [one[part] for one in states]
            its_weights = weights[layer * each : (layer + 1) * each]
            x, *after = func(x, *lengths, state, its_weights, biased, 1, 0.0, True, bidirectional, *order)
            last.append(after)
        return x, *map(torch.cat, zip(*last, strict=True))

    def state(self) -> Tensor:
        """Returns the state of all generators, shape (bytes,)."""
        of_bits = torch.from_numpy(self._bits.state["state"]["state"].view(np.uint8))
        return torch.cat([of_bits, *(generator.get_state() for generator in self.generators.values())])

    def set_state(self, state: Tensor) -> None:
        """Sets a state of all generators that `state` returned."""
        sizes = [_SFC64_BYTES, *(len(generator.get_state()) for generator in self.generators.values())]
        of_bits, *others = torch.split(state, sizes)
        self._bits.state = self._bits.state | {"state": {"state": of_bits.clone().numpy().view(np.uint64)}}
        for generator, its_state in zip(self.generators.values(), others, strict=True):
            generator.set_state(its_state.clone())  # torch reads a view from the start of the storage


class _HandOver(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types here
    """Gives the client's generator to operators that draw."""

    def __init__(self, draws: KeyedDraws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives no types here
        self._draws = draws

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with_generator = _with_generator(func)
        if with_generator is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        tensors = [value for value in args if isinstance(value, Tensor)]
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        self._draws.drawn = True
        return with_generator(*args, **kwargs | {"generator": self._draws.generators[device.type]})


def _native_dropout(x: Tensor, p: float, train: bool | None, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Implements torch.native_dropout, which a GPU's dropout calls. Returns the result and the mask."""
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return x * mask * (1 / (1 - p) if p < 1 else 0.0), mask


@cache
def _with_generator(func: Any) -> Callable[..., Any] | None:
    """Returns the overload of an operator that takes a generator; None if the operator does not draw."""
    if func is torch.ops.aten.native_dropout.default:
        return _native_dropout
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func  # type: ignore[no-any-return]  # operators have no types
    if torch.Tag.nondeterministic_seeded in func.tags:
        wanted = _types_of(func)
        for name in func.overloadpacket.overloads():
            other = getattr(func.overloadpacket, name)
            if _types_of(other) == {**wanted, "generator": "Optional[Generator]"}:
                return other  # type: ignore[no-any-return]  # operators have no types
    return None


def _types_of(func: Any) -> dict[str, str]:
    return {argument.name: str(argument.type) for argument in func._schema.arguments}


@cache
def _runners() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns each function that draws → the method of KeyedDraws that runs the function."""
    places = (torch, Tensor, F)
    drawing = {getattr(place, name) for place in places for name in _DRAWING if hasattr(place, name)}
    return {
        **dict.fromkeys(drawing, KeyedDraws.draw),
        **dict.fromkeys(_COMPOSED, KeyedDraws.compose),
        **dict.fromkeys(_RECURRENT, KeyedDraws.recur),
        **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_), KeyedDraws.drop),
        F.scaled_dot_product_attention: KeyedDraws.attend,
    }


@cache
def _without_override(func: FunctionType) -> Callable[..., Any]:
    """Returns a copy of a function of torch that ignores modes; functions that the copy calls do not."""
    blind = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(func.__code__, {**func.__globals__, **blind}, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# Gradient checkpointing saves the generator's state before a segment, and sets this state before the segment is
# repeated. In torch, all threads share this generator. In a client's training, the client's generator must be used
# instead.
_torchs_get_rng_state, _torchs_set_rng_state = torch.get_rng_state, torch.set_rng_state


def _current() -> KeyedDraws | None:
    """Returns the draws of the block that runs now. The backward pass may run in another thread, which torch starts."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode for mode in modes if isinstance(mode, KeyedDraws)), None)


def _get_rng_state() -> Tensor:
    draws = _current()
    return draws.state() if draws else _torchs_get_rng_state()


def _set_rng_state(new_state: Tensor) -> None:
    draws = _current()
    return draws.set_state(new_state) if draws else _torchs_set_rng_state(new_state)
