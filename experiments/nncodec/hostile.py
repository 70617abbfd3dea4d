"""Tries NNCodec's decoder on damaged streams, each in a process of its own with limits.

python -m experiments.nncodec.hostile       with the Python of the environment that peer.py made

Flips every bit of a small stream, cuts the stream at every length, cuts a large stream, and counts how the decoder
ends. Then decodes streams of zeros, and prints how many bytes of memory a byte of the stream unpacks to.
"""

import os
import resource
import signal
from collections import Counter

import numpy as np

MEMORY, SECONDS = 4 << 30, 5


def decode(stream: bytes, expected: dict[str, np.ndarray]) -> str:
    """Returns how the decoder ends, in a process with limits of memory and time."""
    from nncodec import nnc

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            received = nnc.decompress(bytearray(stream))
            same = received.keys() == expected.keys() and all(
                np.array_equal(received[name], x) for name, x in expected.items()
            )
            shapes = {name: np.shape(x) for name, x in received.items()} == {n: x.shape for n, x in expected.items()}
            answer = "the same" if same else "other values" if shapes else "other tensors"
        except BaseException as error:
            answer = type(error).__name__
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else answer


def main() -> None:
    """Prints the counts."""
    from nncodec import nnc

    numbers = np.random.default_rng(0)
    tensors = {"w": numbers.standard_normal((16, 16)).astype(np.float32), "b": np.ones(4, np.float32)}
    stream = bytes(nnc.compress(tensors, bitstream_path=None, return_bitstream=True, qp=-4, nonweight_qp=-4))
    expected = nnc.decompress(bytearray(stream))
    flips, cuts = Counter[str](), Counter[str]()
    for i in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[i // 8] ^= 1 << i % 8
        flips[decode(bytes(damaged), expected)] += 1
    for length in range(len(stream)):
        cuts[decode(stream[:length], expected)] += 1
    print(f"{len(stream)} bytes; bits flipped: {dict(flips)}")
    print(f"cut: {dict(cuts)}")
    large = {"w": numbers.standard_normal((2048, 2048)).astype(np.float32)}
    stream = bytes(nnc.compress(large, bitstream_path=None, return_bitstream=True))
    print(f"{len(stream)} bytes, cut: {dict(Counter(decode(stream[: 10**n], {}) for n in (2, 3, 4, 5, 6)))}")
    for side in (1024, 4096, 8192):
        zeros = {"w": np.zeros((side, side), np.float32)}
        stream = bytes(
            nnc.compress(zeros, bitstream_path=None, return_bitstream=True, row_skipping=True, param_opt=True)
        )
        print(f"{side}×{side} zeros: {len(stream)} bytes, {4 * side * side / len(stream):.0f} × that when decoded")


if __name__ == "__main__":
    main()
