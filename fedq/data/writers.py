"""Handwriting drawn by a program: the ten digits by any number of writers, each with a style.

A digit is the path of a pen: a smooth curve through a few knots (`_GLYPHS`). A writer has habits: one way to draw each
digit, shifts of its knots, slant, proportions, bends, size and pen. Each example adds small random changes. A round
soft pen then inks the paths of all examples at once.
"""

import math

import numpy as np
import torch

from fedq.data.dataset import Client, Examples
from fedq.keys import Key

SIDE = 28
"""Height and width of an image in pixels."""

# Each row is a way to draw a digit: knots "x,y" in hundredths of the digit's box, with y downwards. The curve is smooth
# at its knots, except at "!" (a corner); "/" lifts the pen.
_GLYPHS = [
    (0, "55,3 27,12 12,50 25,88 52,97 78,85 88,48 75,14 52,3"),
    (0, "66,10 40,2 18,25 12,60 32,95 65,92 88,55 78,16 50,4 38,16"),
    (1, "50,2 50,35 50,65 50,98"),
    (1, "30,24 52,2! 51,50 50,98"),
    (1, "32,22 52,2! 52,50 51,96 / 28,97 50,96 76,98"),
    (2, "15,25 35,4 68,8 75,32 50,65 15,96! 50,95 88,94"),
    (2, "15,25 38,3 70,10 70,38 42,75 18,92 16,78 32,78 55,92 90,90"),
    (3, "15,15 45,3 75,15 70,38 42,48! 75,58 80,82 45,98 12,85"),
    (3, "15,6 50,5 80,5! 60,25 42,42! 75,52 82,78 50,98 12,88"),
    (3, "15,15 45,2 75,18 65,40 38,50 42,42 72,54 80,80 48,98 12,86"),
    (4, "25,5 18,35 15,58! 50,58 88,55 / 68,10 66,55 62,98"),
    (4, "65,98 66,50 68,3! 40,32 10,65! 50,66 92,64"),
    (4, "20,5 16,40 30,56 55,52 78,40 / 78,5 72,50 66,98"),
    (5, "25,5 22,25 20,45! 50,38 80,55 78,85 45,98 12,88 / 25,5 55,5 85,3"),
    (5, "82,5 55,6 28,6! 25,25 22,44! 52,40 80,58 72,88 42,98 12,88"),
    (5, "80,8 48,6 28,22 38,42 65,52 78,70 60,92 32,97 12,86"),
    (6, "70,5 38,18 16,52 22,86 50,97 78,84 76,58 50,46 22,64"),
    (6, "48,2 26,38 15,70 34,96 68,92 76,66 52,48 20,72"),
    (7, "12,8 50,7 85,6! 62,45 42,97"),
    (7, "12,8 50,7 85,6! 62,45 42,97 / 35,50 60,48 85,47"),
    (7, "12,22 15,6! 50,8 86,6! 60,50 48,97"),
    (8, "75,15 45,3 22,20 45,45 75,68 70,92 45,98 20,85 28,62 55,45 78,22 70,8"),
    (8, "50,48 25,35 28,10 52,2 75,12 72,36 50,48! 20,62 20,88 50,98 80,88 78,62 50,48"),
    (9, "75,20 48,3 20,20 25,45 52,50 75,28! 76,60 74,98"),
    (9, "78,22 50,3 22,22 28,46 58,46 78,22! 80,60 62,92 28,95"),
    (9, "72,35 45,48 22,28 40,5 70,10 76,40 70,70 55,98"),
]
_POINTS = 64  # points along a digit's path: closer together than the pen is wide
_KNOTS = 14  # at least the knots of the longest row above

# The mean writer, and the standard deviations of writers. The numbers are fitted to real writers: to mean and deviation
# of pixels, to how often the nearest image is by the same writer, and to rounds of FedAvg on unseen writers. The warp
# maps x, y, x², xy and y² of the digit (one row each, in boxes around its centre) to new x and y. This changes
# proportions, slant and bends.
_WARP = np.array([[0.90, 0], [-0.28, 1], [0, 0], [0, 0], [0, 0]], np.float32)
_WARP_SPREAD = np.array([[0.17, 0.08], [0.21, 0], [0.18, 0.18], [0.18, 0.18], [0.18, 0.18]], np.float32)
_KNOT_SPREAD = 0.048  # of each half of a knot's shift, in boxes; neighbours share a half, so paths stay smooth
_SIZE, _SIZE_SPREAD = 18.0, 0.05  # of the path's longer side: pixels, relative
_PEN, _PEN_SPREAD = 0.51, 0.2  # of the pen's radius: pixels, relative
_INK = 8.0  # optical depth in the middle of a line
_SHIFT = 0.5  # of an example on its page, in pixels
_UNSTEADY = 0.64  # deviation of one writer's examples, as a share of the deviation of writers
_TEST_EXAMPLES_PER_WRITER = 10


def _curve(row: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the knots of a row of `_GLYPHS`, the matrix from knots to points, and the pen.

    Shapes: knots (_KNOTS, 2) around 0, matrix (_POINTS, _KNOTS), pen (_POINTS - 1,): true where the pen is down between
    a point and the next. The points lie about evenly on a Catmull-Rom spline (1974). Each is a fixed mean of four
    knots, so moved knots move the points.
    """
    knots: list[list[float]] = []
    pieces: list[tuple[int, ...]] = []  # for each step between knots: the stroke, and four knots
    for stroke, runs in enumerate(row.split("/")):
        for i, run in enumerate(runs.split("!")):
            first = len(knots) - (i > 0)  # a corner ends one run and starts the next
            knots += [[float(v) / 100 - 0.5 for v in word.split(",")] for word in run.split()]
            last = len(knots) - 1
            pieces += [(stroke, max(k - 1, first), k, k + 1, min(k + 2, last)) for k in range(first, last)]
    table, xy = np.array(pieces), np.array(knots)
    ends = np.cumsum(np.linalg.norm(xy[table[:, 3]] - xy[table[:, 2]], axis=1))
    u = np.interp(np.linspace(0, ends[-1], _POINTS), [0, *ends], np.arange(len(ends) + 1))
    piece = np.minimum(u.astype(int), len(ends) - 1)
    u -= piece
    basis = [-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, u**3 - u**2]
    matrix = np.zeros((_POINTS, _KNOTS))
    np.add.at(matrix, (np.arange(_POINTS), table[piece, 1:].T), np.array(basis) / 2)
    return np.pad(xy, ((0, _KNOTS - len(xy)), (0, 0))), matrix, np.diff(table[piece, 0]) == 0


_PARTS = [_curve(row) for _, row in _GLYPHS]
_BOXES, _CURVES, _DOWN = (np.array(part, np.float32) for part in zip(*_PARTS, strict=True))
_WAYS = np.bincount([digit for digit, _ in _GLYPHS])  # number of ways to draw each digit
_FIRST_WAY = np.cumsum(_WAYS) - _WAYS


def _differences(generator: np.random.Generator, n: int, digits: int) -> tuple[np.ndarray, ...]:
    """Draws n changes of warp (n, 5, 2), log size (n,), log pen (n,) and knots (n * digits, _KNOTS, 2)."""
    normal = generator.standard_normal
    halves = _KNOT_SPREAD * normal((n * digits, _KNOTS + 1, 2), np.float32)
    return (
        _WARP_SPREAD * normal((n, *_WARP.shape), np.float32),
        _SIZE_SPREAD * normal(n, np.float32),
        _PEN_SPREAD * normal(n, np.float32),
        halves[:, 1:] + halves[:, :-1],
    )


def _write(key: Key, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns n images (n, 28, 28), ink 1.0 on 0.0, and their labels (n,) by the writer of this key."""
    style, hand = key.fold("style").generator(), key.fold("examples").generator()
    y = hand.integers(10, size=n)
    way = (_FIRST_WAY + style.integers(_WAYS))[y]
    *habits, knot_habits = _differences(style, 1, digits=10)
    slips = _differences(hand, n, digits=1)
    warp, size, pen, shift = (
        habit + _UNSTEADY * slip for habit, slip in zip((*habits, knot_habits[y]), slips, strict=True)
    )

    x, down = np.moveaxis(_CURVES[way] @ (_BOXES[way] + shift), 2, 0)
    points = np.stack([x, down, x * x, x * down, down * down], axis=2) @ (_WARP + warp)
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    scale = _SIZE * np.exp(size)[:, None, None] / (high - low).max(axis=2, keepdims=True)
    centre = (SIDE - 1) / 2 + _SHIFT * hand.standard_normal((n, 1, 2), np.float32)
    points = (points - (low + high) / 2) * scale + centre
    return _ink(points, _PEN * np.exp(pen), _DOWN[way]), y


def _ink(points: np.ndarray, pen: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Returns images (n, 28, 28) of paths (n, P, 2) in pixels, inked where the pen is down (n, P - 1).

    A line is a row of Gaussian blots of radius `pen` (n,). The darkness of a blot is the length of its piece of path.
    A blot is the outer product of its profiles across and down the page, so one matrix product inks an image.
    """
    start, end = points[:, :-1], points[:, 1:]
    darkness = _INK / math.sqrt(2 * math.pi) / pen[:, None] * np.linalg.norm(end - start, axis=2) * down
    distance = ((start + end) / 2)[..., None] - np.arange(SIDE, dtype=np.float32)
    profiles = np.exp(-0.5 * (distance / pen[:, None, None, None]) ** 2)
    across, downwards = profiles[:, :, 0], profiles[:, :, 1] * darkness[:, :, None]
    ink: np.ndarray = 1 - np.exp(-(downwards.transpose(0, 2, 1) @ across))
    return ink


class Writers:
    """A population of writers of the ten digits. Each load draws a writer's examples; nothing is kept.

    The examples of client c follow from the seed and c alone. Their labels are independent and uniform. The test set
    is by other writers, ten examples each.

    Args:
        clients: number of writers, 1 to 2^63 − 1.
        examples_per_client: mean number of examples, at least 1. Each client's number of examples is uniform within ± a
            quarter of the mean.
        test_examples: at least 1.
        background: pixel value of the page: 1.0 as in federated EMNIST, or 0.0 as in MNIST.
        seed: 0 to 2^64 − 1.

    Raises ValueError if an argument is out of range.
    """

    def __init__(
        self,
        clients: int = 1000,
        examples_per_client: int = 100,
        test_examples: int = 1000,
        background: float = 1.0,
        seed: int = 0,
    ) -> None:
        least = {"clients": (clients, 1), "examples_per_client": (examples_per_client, 1)}
        least |= {"test_examples": (test_examples, 1), "seed": (seed, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {value}.")
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2^64, not {seed}.")
        if clients >= 2**63:  # the limit of numpy's generator
            raise ValueError(f"clients must be below 2^63, not {clients}.")
        if background not in (0.0, 1.0):
            raise ValueError(f"background must be 1.0 (federated EMNIST) or 0.0 (MNIST), not {background}.")
        self.num_classes = 10
        self.num_clients = clients
        self.examples_per_client = examples_per_client
        self.test_examples = test_examples
        self.background = background
        self.seed = seed

    def client(self, number: int) -> Client:
        """Returns writer `number`, whose examples are drawn when loaded. Raises IndexError for other numbers."""
        if not 0 <= number < self.num_clients:
            raise IndexError(f"client {number} is not one of {self.num_clients} writers, numbered from 0.")
        return Client(number, lambda: self._load(number), self._count(number))

    def test(self) -> Examples:
        """Returns `test_examples` examples by writers who are not clients."""
        key, each = Key(self.seed).fold("writers").fold("test"), _TEST_EXAMPLES_PER_WRITER
        starts = range(0, self.test_examples, each)
        parts = [_write(key.fold(str(i)), min(each, self.test_examples - i)) for i in starts]
        return self._examples(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def _count(self, number: int) -> int:
        key, quarter = Key(self.seed, client=number).fold("writers"), self.examples_per_client // 4
        return self.examples_per_client + int(key.fold("number").generator().integers(-quarter, quarter + 1))

    def _load(self, number: int) -> Examples:
        return self._examples(*_write(Key(self.seed, client=number).fold("writers"), self._count(number)))

    def _examples(self, ink: np.ndarray, y: np.ndarray) -> Examples:
        x = torch.from_numpy(ink[:, None])
        return Examples(1 - x if self.background == 1 else x, torch.from_numpy(y))
