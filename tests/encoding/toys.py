"""Small stages and coders for tests."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.encoding import AdaptiveEncodingStage, Coder, EncodingStage, Key, Raw, StateUpdate, TensorSpec


@dataclass(frozen=True)
class Zlib(Coder):
    """A coder whose length depends on the values. Decoding never makes more bytes than the spec has."""

    def encode(self, symbols: Tensor, spec: TensorSpec) -> bytes:
        return zlib.compress(Raw().encode(symbols, spec))

    def decode(self, data: memoryview, spec: TensorSpec) -> Tensor:
        size, inflate = spec.numel * spec.dtype.itemsize, zlib.decompressobj()
        try:
            raw = inflate.decompress(data, size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(raw) != size or not inflate.eof or inflate.unused_data:
            raise ValueError("the bytes are not one stream of the right length")
        values = torch.zeros(size, dtype=torch.uint8)
        values.numpy()[:] = memoryview(raw)
        symbols = values.view(spec.dtype).reshape(spec.shape)
        if (
            spec.levels is not None
            and symbols.numel()
            and not 0 <= int(symbols.min()) <= int(symbols.max()) < spec.levels
        ):
            raise ValueError("a symbol is out of range")
        return symbols


@dataclass(frozen=True)
class Negate(EncodingStage):
    """Sends −x.

    Lossless and therefore unbiased; commutes with the sum. Keeps the spec, and so the levels.
    """

    lossless = True
    unbiased = True
    commutes_with_sum = True

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return -x, {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return -y


@dataclass(frozen=True)
class Reverse(EncodingStage):
    """Sends the elements in reverse order, as a vector. Keeps dtype and levels."""

    lossless = True
    unbiased = True
    commutes_with_sum = True

    def encoded_spec(self, spec: TensorSpec, side: dict[str, Tensor]) -> TensorSpec:
        return TensorSpec((spec.numel,), spec.dtype, spec.levels)

    def encode(self, x: Tensor, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        return x.reshape(-1).flip(0), {}

    def decode(self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key) -> Tensor:
        return y.flip(0).reshape(spec.shape)


@dataclass(frozen=True)
class PlusOneOverN(AdaptiveEncodingStage):
    """Sends x + 1/n in round n. The server counts rounds, and the params hold n."""

    def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
        return {"n": torch.tensor(1)}

    def params(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"addend": 1 / state["n"].float()}

    def update_state(self, state: dict[str, Tensor], aggregated: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"n": state["n"] + 1}

    def encode(
        self, x: Tensor, key: Key, params: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        return x + params["addend"].to(x.dtype), {}, {}

    def decode(
        self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key, params: dict[str, Tensor]
    ) -> Tensor:
        return y - params["addend"].to(y.dtype)


@dataclass(frozen=True)
class Statistics(AdaptiveEncodingStage):
    """Sends x exact and reports one tensor of each kind. The state holds the last combined reports.

    `count` (sum, int64), `low` (min), `high` (max), `row` (stack): the first two elements of x, flat.
    """

    scrambled: bool = False  # report in another order than declared

    def initial_state(self, spec: TensorSpec) -> dict[str, Tensor]:
        return {"high": torch.tensor(1.0), "rows": torch.zeros(0, 2)}

    def params(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scale": state["high"].clone()}

    def update_spec(self, spec: TensorSpec) -> dict[str, StateUpdate]:
        scalar = TensorSpec((), torch.float32)
        return {
            "count": StateUpdate(TensorSpec((), torch.int64), "sum"),
            "low": StateUpdate(scalar, "min"),
            "high": StateUpdate(scalar, "max"),
            "row": StateUpdate(TensorSpec((2,), torch.float32), "stack"),
            "total": StateUpdate(TensorSpec(spec.shape, torch.float32), "sum"),
        }

    def update_state(self, state: dict[str, Tensor], aggregated: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"high": aggregated["high"], "rows": aggregated["row"]}

    def encode(
        self, x: Tensor, key: Key, params: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        x32 = x.float()
        updates = {
            "count": torch.tensor(x.numel()),
            "low": x32.min(),
            "high": x32.max(),
            "row": x32.reshape(-1)[:2].clone(),
            "total": x32.clone(),
        }
        return x.clone(), {}, dict(reversed(updates.items())) if self.scrambled else updates

    def decode(
        self, y: Tensor, side: dict[str, Tensor], spec: TensorSpec, key: Key, params: dict[str, Tensor]
    ) -> Tensor:
        return y
