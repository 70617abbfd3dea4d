"""One battery of checks for every stage, coder and chain, also for yours. It needs the package hypothesis.

    check_stage(MyStage())

runs all checks on a stage, and prints their names. If a check fails, the call raises AssertionError, or the error of
the stage. `check_encoder` does the same for a chain and its coder; `check_coder` takes a coder alone.
"""

import math
from collections.abc import Callable

import torch

from fedq.encoding.coders import Coder, FixedWidth, Raw
from fedq.encoding.encoder import Encoder
from fedq.encoding.schema import TensorSpec
from fedq.encoding.stage import AdaptiveEncodingStage, EncodingStage
from fedq.encoding.testing import checks
from fedq.encoding.testing.chain import KEY, lossless, raw_bytes, reframe, same, steps, taken, unbiased
from fedq.encoding.testing.checks import Bound
from fedq.encoding.testing.inputs import floating_inputs, wave

__all__ = ["CHECKS", "KEY", "Bound", "check_coder", "check_encoder", "check_stage", "raw_bytes", "reframe", "wave"]

CHECKS: tuple[Callable[[Encoder, Bound | None], None], ...] = (
    checks.check_dataclasses,
    checks.check_round_trip,
    checks.check_arbitrary_arrays,
    checks.check_largest_input,
    checks.check_exact_tensors,
    checks.check_refusals,
    checks.check_input_untouched,
    checks.check_same_key,
    checks.check_aliasing,
    checks.check_other_keys,
    checks.check_length,
    checks.check_damage,
    checks.check_lossless,
    checks.check_unbiased,
    checks.check_commutes_with_sum,
    checks.check_state,
)


def check_stage(
    stage: EncodingStage | AdaptiveEncodingStage, bound: Bound | None = None, coder: Coder | None = None
) -> None:
    """Runs all checks on a stage, and prints their names.

    stage: the stage.
    bound: see Bound; a lossless stage's is 0.
    coder: the coder after the stage; by default FixedWidth for symbols of known levels, else Raw.
    """
    if coder is None:
        encoder, spec = Encoder([stage]), TensorSpec.of(wave(4))
        for _, side, _ in steps(encoder, wave(4)):
            spec = stage.encoded_spec(spec, side)
        coder = Raw() if spec.levels is None else FixedWidth()
    check_encoder(Encoder([stage], coder), bound)


def check_encoder(encoder: Encoder, bound: Bound | None = None) -> None:
    """Runs all checks on a chain and its coder, and prints their names.

    encoder: the chain.
    bound: see Bound; a lossless chain's is 0.
    """
    for check in CHECKS:
        check(encoder, bound)
    print(_report(encoder, bound))


def _report(encoder: Encoder, bound: Bound | None) -> str:
    sent = taken(encoder)
    refused = [name for name in floating_inputs() if name not in sent]
    claimed = {
        "lossless": lossless(encoder),
        f"unbiased ({checks.DRAWS:,} draws)": unbiased(encoder),
        "commutes with a sum": any(stage.commutes_with_sum for stage in encoder.stages),
        "state": any(isinstance(stage, AdaptiveEncodingStage) for stage in encoder.stages),
    }
    return (
        f"{encoder} passes {len(CHECKS)} checks.\n"
        f"  Tensors sent and received: {len(sent)}, {checks.ARRAYS} arrays of hypothesis, and one of millions.\n"
        f"  Refused: {', '.join(refused) or 'none'}. Largest error: {'any' if bound is None else 'within the bound'}.\n"
        f"  Claims: {', '.join(claim for claim, made in claimed.items() if made) or 'none'}."
    )


def check_coder(coder: Coder, levels: int | None, dtype: torch.dtype) -> None:
    """Runs all checks on a coder: tensors of symbols of many shapes must be decoded exactly.

    coder: the coder.
    levels: the number of levels, or None.
    dtype: dtype of the symbols.
    """
    for shape in ((), (0,), (1,), (7,), (8,), (70,), (3, 0), (5, 3), (2, 3, 2, 2), (1000,)):
        for strided in (False, True):
            n = math.prod(shape)
            symbols = (torch.arange(2 * n) * 40_503) % (levels or 251)
            symbols = symbols.to(dtype).reshape(*shape, 2)[..., 0] if strided else symbols[:n].to(dtype).reshape(shape)
            for x in (symbols, torch.zeros_like(symbols), torch.full_like(symbols, (levels or 251) - 1)):
                spec, before = TensorSpec(shape, dtype, levels), x.clone()
                data = coder.encode(x, spec)
                assert coder.size(spec) in (None, len(data)), f"{coder} declares another size than {len(data)}"
                back = coder.decode(memoryview(data), spec)
                assert same(back, before), f"{coder} gives another tensor of {shape}"
                assert same(x, before), f"{coder} writes to its input"
                back.fill_(0)  # a writable copy, so that torch does not warn
                assert coder.encode(x, spec) == data, f"{coder} gives other bytes the second time"
