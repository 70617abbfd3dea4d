"""Measures each encoder's rate and distortion in real bytes: a table, a CSV file and a picture.

python -m experiments.rate_distortion.bench             the uploads of all of conf/encoder, on every source
python -m experiments.rate_distortion.bench eden qsgd:levels=2 --sources normal,update

The rate is 8 × bytes / elements, where bytes are a message of one tensor without the frame. Tables and side values
count. The distortion is the normalised mean squared error ‖x − x̂‖² / ‖x‖² (NMSE). It is given for one client, and for
the mean of several clients that send the same tensor with different keys. The mean is better for unbiased schemes only.
"""

import argparse
import csv
import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.tables import show
from fedq.config import build, build_encoder, build_run, check, explain
from fedq.encoding import Codec, Key, StateDictEncoder, TensorSpec
from fedq.encoding.message import OVERHEAD
from fedq.encoding.schema import Tensors
from fedq.errors import FedqError
from fedq.learning import ErrorFeedback
from fedq.train import CONF

if TYPE_CHECKING:  # matplotlib takes a second to load, and only the picture needs it
    from matplotlib.axes import Axes

Draw = Callable[[int], Tensor]
"""Returns tensor number i of a source: a draw from a distribution, or a client's update."""

SHAPE = (1024, 1024)
SOURCES = ("normal", "laplace", "student", "sparse", "update")
BITS = (1, 2, 3, 4, 6, 8)
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8")  # colours of encoders in the picture; C7 is grey
MOST_BITS = 10  # an element, in the picture

Point = tuple[float, float]
"""Bits an element, NMSE in decibels."""


@dataclass(frozen=True)
class Result:
    """One encoder on one source.

    bits: Bits an element.
    table_bits: The part of `bits` that a coder's table takes.
    nmse: NMSE of one client, as a mean over all clients.
    nmse_of_mean: NMSE of the mean over clients.
    encode_ms, decode_ms: Milliseconds of the fastest client.
    """

    encoder: str
    source: str
    bits: float
    table_bits: float
    nmse: float
    nmse_of_mean: float
    encode_ms: float
    decode_ms: float


def synthetic(name: str) -> Draw:
    """Returns draws of SHAPE from a distribution with variance 1.

    name: normal, laplace, student (3 degrees of freedom) or sparse (one value in twenty is normal, the others are 0).
    """

    def draw(i: int) -> Tensor:
        numbers = Key(i).fold(name).generator()
        values = {
            "normal": lambda: numbers.standard_normal(SHAPE),
            "laplace": lambda: numbers.laplace(scale=2**-0.5, size=SHAPE),
            "student": lambda: numbers.standard_t(3, SHAPE) / 3**0.5,
            "sparse": lambda: numbers.standard_normal(SHAPE) * (numbers.random(SHAPE) < 0.05) * 20**0.5,
        }[name]()
        return torch.from_numpy(values.astype(np.float32))

    return draw


def real_updates(rounds: int) -> Draw:
    """Returns clients' updates of the largest tensor, after `rounds` rounds of training the default configuration."""
    from fedq.learning import FederatedAveraging
    from fedq.learning.local_training import update_of
    from fedq.simulation.loop import rounds as trained
    from fedq.simulation.workers import Workers

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["encoder=float32", f"run.rounds={rounds}", f"run.evaluate_every={rounds}"])
    dataset, training = build(cfg, "dataset"), build(cfg, "client")
    model = build(cfg, "model", num_classes=dataset.num_classes)
    with Workers() as workers:
        process = FederatedAveraging(model, training, build(cfg, "server"), map=workers.map)
        *_, (state, _) = trained(process, process.initialize(), dataset, build_run(cfg))
    largest = max(state.weights, key=lambda name: state.weights[name].numel())

    def draw(i: int) -> Tensor:
        network = model()
        training.train(network, state.weights, dataset.client(i).load(), Key(0, rounds, i))
        return update_of(network.state_dict(), state.weights)[largest]

    return draw


def measure(name: str, encoder: StateDictEncoder, source: str, draw: Draw, clients: int) -> Result:
    """Sends one tensor, of any size, from `clients` clients; returns its bits and its error.

    Adaptive stages have state from one round before, with another tensor of the source; rate control from eight.
    """
    codec = replace(encoder, threshold=0, rules={}, reference="none").bind({"x": TensorSpec.of(draw(0))})
    adaptation, state = codec.adaptation, codec.adaptation.initial_state()
    for warming in range((8 if encoder.rate_control else 1) if state else 0):
        reports = codec.encode({"x": draw(0)}, Key(0, 0, warming), adaptation.params(state), loss=1.0).reports
        state = adaptation.update_state(state, adaptation.as_cohort(reports))
    params, x = adaptation.params(state), draw(1)
    mean, size, errors, encode, decode = torch.zeros(x.shape, dtype=torch.float64), 0, [], [], []
    for client in range(clients):
        key = Key(0, 1, client)
        started = perf_counter()
        message, _ = codec.encode({"x": x}, key, params, loss=1.0)
        encode.append(perf_counter() - started)
        started = perf_counter()
        received, _ = codec.decode(message, key, params)
        decode.append(perf_counter() - started)
        size += len(message) - OVERHEAD
        errors.append(_nmse(x, received["x"]))
        mean += received["x"] / clients
    rate = 8 / (x.numel() * clients)
    milliseconds = [1000 * min(times) for times in (encode, decode)]
    table = 8 / x.numel() * _table(codec, x / x.square().mean().sqrt() if encoder.common_scale else x, params)
    return Result(name, source, size * rate, table, sum(errors) / clients, _nmse(x, mean), *milliseconds)


def _table(codec: Codec, x: Tensor, params: Tensors) -> int:
    """Returns how many bytes the coder's table takes in a message of `x`."""
    ((name, chain),) = codec.chains.items()
    parts, _ = chain.encode(x, Key(0, 1, 0).fold(name), params)
    return chain.encoder.coder.model_size(memoryview(parts[-1]))


def _nmse(x: Tensor, received: Tensor) -> float:
    wide = x.double()
    return float((wide - received.double()).square().sum() / wide.square().sum())


def encoders(choices: list[str], folder: Path | None = None) -> dict[str, StateDictEncoder]:
    """Returns the upload's encoder of each choice, such as "eden" or "qsgd:levels=2".

    A key of an encoder sets both directions if both have the key, else the upload. A choice without `bits` gives an
    encoder for each allowed value of BITS.

    choices: If empty, all of conf/encoder except encoders with rate control and encoders equal to another.
    folder: A folder like conf/, with further encoders.
    Raises FedqError.
    """
    chains: dict[str, StateDictEncoder] = {}
    if folder and not folder.is_dir():
        raise FedqError(f"{folder} is not a folder")
    search = [f"hydra.searchpath=[file://{folder.resolve()}]"] if folder else []
    # encoders that extend another come last: they may be equal to it
    files = sorted((CONF / "encoder").glob("*.yaml"), key=lambda path: ("defaults" in OmegaConf.load(path), path))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choice in choices or [path.stem for path in files]:
            name, _, given = choice.partition(":")
            cfg = compose("config", [*search, f"encoder={name}"])
            node = cfg.encoder
            if not choices and "rate_control" in node.upload:
                continue
            settings = [setting for setting in given.split(",") if setting]
            overrides = [
                f"{_path(node, setting.partition('=')[0])}={setting.partition('=')[2]}" for setting in settings
            ]
            if overrides:
                cfg = compose("config", [*search, f"encoder={name}", *overrides])
            check(cfg, overrides)
            if given or "bits" not in node.upload:
                chains[choice] = _upload(cfg)
                continue
            for bits in BITS:
                OmegaConf.update(cfg, _path(node, "bits"), bits)
                with suppress(FedqError):  # the encoder does not allow so many bits
                    chains[f"{name}:bits={bits}"] = _upload(cfg)
    if choices:
        return chains
    names = list(chains)
    return {name: chain for i, (name, chain) in enumerate(chains.items()) if chain not in map(chains.get, names[:i])}


def _path(node: DictConfig, key: str) -> str:
    """Returns the path of an encoder's `key`: for both directions if both have the key, else for the upload."""
    return f"encoder.{key}" if key in node or key not in node.upload else f"encoder.upload.{key}"


def _upload(cfg: DictConfig) -> StateDictEncoder:
    """Returns the encoder of uploads, without its error feedback."""
    upload = build_encoder(cfg, "upload")
    return upload.encoder if isinstance(upload, ErrorFeedback) else upload


def table(results: list[Result]) -> Table:
    """Returns the table of the results on one source."""
    shown = Table(title=results[0].source)
    shown.add_column("encoder")
    for heading in ("bits", "NMSE", "of mean", "encode ms", "decode ms"):
        shown.add_column(heading, justify="right")
    for r in results:
        errors = (f"{r.nmse:.3g}", f"{r.nmse_of_mean:.3g}")
        shown.add_row(r.encoder, f"{r.bits:.4f}", *errors, f"{r.encode_ms:.1f}", f"{r.decode_ms:.1f}")
    return shown


def plot(results: list[Result], path: Path) -> None:
    """Draws one panel a source: NMSE in decibels against bits an element, with Shannon's bound for the normal source.

    If there are more encoders than COLOURS, `uniform` and the encoders with the most points on Pareto fronts have
    colours. The others are grey.
    """
    from matplotlib.figure import Figure

    by_source: dict[str, dict[str, list[Point]]] = {}
    for r in results:
        curves = by_source.setdefault(r.source, {})
        curves.setdefault(r.encoder.partition(":")[0], []).append((r.bits, 10 * math.log10(max(r.nmse, 1e-12))))
    on_front = Counter(name for curves in by_source.values() for name in _front(curves))
    names = list(dict.fromkeys(r.encoder.partition(":")[0] for r in results))
    if len(names) > len(COLOURS):
        names = sorted(names, key=lambda name: (name != "uniform", -on_front[name]))[: len(COLOURS)]
    rows, columns = -(-len(by_source) // 2), min(len(by_source), 2)
    figure = Figure(figsize=(6.4 * columns, 4.4 * rows + 1), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, (source, curves) in zip(panels, by_source.items(), strict=False):
        _panel(panel, source, curves, names)
    for panel in panels[len(by_source) :]:
        panel.set_axis_off()
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3 * columns)
    figure.savefig(path, dpi=80)


def _front(curves: dict[str, list[Point]]) -> list[str]:
    """Returns the encoder of each point that no other point beats in both bits and error."""
    seen = ((*point, name) for name, curve in curves.items() for point in curve if point[0] <= MOST_BITS)
    points = sorted(seen)
    best = list(accumulate((error for _, error, _ in points), min))
    return [name for i, (_, error, name) in enumerate(points) if not i or error < best[i - 1]]


def _panel(panel: "Axes", source: str, curves: dict[str, list[Point]], names: list[str]) -> None:
    for name in sorted(curves, key=lambda name: name in names):  # grey points first, so that coloured points cover them
        style: dict[str, Any] = {"color": "lightgrey", "label": "others", "linewidth": 0.6, "marker": "."}
        if name in names:
            i = names.index(name)
            style = {
                "color": COLOURS[i],
                "label": name,
                "linewidth": 1.2,
                "marker": "os^vDPX*"[i],
                "markersize": 5,
            }
        panel.plot(*zip(*curves[name], strict=True), **style)
    if source == "normal":
        rates = np.linspace(0, 8)
        panel.plot(rates, -20 * rates * np.log10(2), color="black", linestyle=":", label="Shannon's bound")
    panel.set(title=source, xlabel="bits an element", ylabel="NMSE (dB)", xlim=(0, MOST_BITS), ylim=(-55, 5))
    panel.grid(alpha=0.3)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoders", nargs="*", metavar="ENCODER", help="an option of conf/encoder, or NAME:KEY=VALUE,…")
    parser.add_argument("--sources", default=",".join(SOURCES), help="which of %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training before the updates are taken")
    parser.add_argument("--clients", type=int, default=10, help="how many send the same tensor")
    parser.add_argument("--config-dir", type=Path, help="a folder like conf/, with encoders of your own")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder of bench.csv and bench.png")
    arguments = parser.parse_args()
    wanted = arguments.sources.split(",")
    if unknown := set(wanted) - set(SOURCES):
        parser.error(f"no such source: {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    if arguments.rounds < 1 or arguments.clients < 1:
        parser.error("--rounds and --clients must be 1 or more")
    console, progress = Console(), Console(stderr=True)
    try:
        chains = encoders(arguments.encoders, arguments.config_dir)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        sys.exit(f"fedq: {explain(error)}")
    torch.set_num_threads(1)
    results: list[Result] = []
    with progress.status("") as status:
        for source in wanted:
            status.update(f"{source}: preparing")
            draw = real_updates(arguments.rounds) if source == "update" else synthetic(source)
            for number, (name, encoder) in enumerate(chains.items()):
                line = f"{source}: {name}, {number + 1} of {len(chains)}"
                status.update(line)
                if not progress.is_terminal and number % 10 == 0:
                    progress.print(line, markup=False, highlight=False, soft_wrap=True)
                try:
                    results.append(measure(name, encoder, source, draw, arguments.clients))
                except FedqError as error:
                    console.print(f"{source}: {name} is left out: {error}", markup=False, soft_wrap=True)
            if found := [result for result in results if result.source == source]:
                show(table(found))
    if not results:
        sys.exit("fedq: nothing could be measured")
    with (arguments.out / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(map(asdict, results))
    plot(results, arguments.out / "bench.png")
    console.print(f"{arguments.out}/bench.csv and {arguments.out}/bench.png hold the same", soft_wrap=True)


if __name__ == "__main__":
    main()
