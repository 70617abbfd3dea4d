"""Every encoder's place on the plane of rate and distortion, in real bytes: a table, a CSV file and a picture.

python -m fedq.bench                                  all of conf/encoder, its upload chains, on every source
python -m fedq.bench eden qsgd:levels=2 --sources normal,update

The rate is that of a message of one tensor without its frame, tables and side values included: 8 × bytes / elements.
The distortion is the normalised mean squared error ‖x − x̂‖² / ‖x‖² (NMSE), of one client and of the mean of several
that send the same tensor with keys of their own: unbiased schemes gain by the mean, biased ones do not.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedq.config import build, build_encoder, build_run, check, explain
from fedq.encoding import AdaptiveCoder, Key, StateDictEncoder, TensorSpec, schema_of
from fedq.encoding.message import OVERHEAD
from fedq.encoding.state_dict import ByTensor
from fedq.errors import FedqError
from fedq.train import CONF

if TYPE_CHECKING:  # matplotlib takes a second to load: only the picture waits for it
    from matplotlib.axes import Axes

Draw = Callable[[int], Tensor]
"""Returns the tensor numbered i of a source: draws of one distribution, or clients' updates of one round."""

SHAPE = (1024, 1024)
SOURCES = ("normal", "laplace", "student", "sparse", "update")
BITS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Result:
    """One encoder on one source. Rates in bits an element; times in milliseconds, once, to give an idea."""

    encoder: str
    source: str
    bits: float
    table_bits: float  # of them, what a coder's table takes
    nmse: float
    nmse_of_mean: float
    encode_ms: float
    decode_ms: float


def synthetic(name: str) -> Draw:
    """Returns draws of SHAPE of a distribution with variance 1: normal, laplace, student (3 degrees) or sparse.

    sparse: one value in twenty is normal, the others are zero.
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
    """Trains the default configuration for some rounds; returns clients' updates of its largest tensor after them."""
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
    """Sends one tensor from `clients` clients, however small it is, and returns what it cost and what arrived.

    Adaptive parts have seen one round of another tensor of the source; rate control has seen eight rounds.
    """
    direction = replace(encoder, threshold=0, rules={}, reference="none", error_feedback=False)
    schema = {"x": TensorSpec.of(draw(0))}
    state = direction.initial_state(schema)
    for warming in range((8 if direction.rate_control else 1) if state else 0):
        params, key = direction.params(schema, state), Key(0, 0, warming)
        message, _ = direction.encode({"x": draw(0)}, key, params, report=True, loss=1.0)
        _, reports = direction.decode(message, key, schema, params, direction.update_spec(schema))
        state = direction.update_state(schema, state, direction.report(schema, reports))
    params, x = direction.params(schema, state), draw(1)
    mean, size, errors, encode, decode = torch.zeros(x.shape, dtype=torch.float64), 0, [], [], []
    for client in range(clients):
        key = Key(0, 1, client)
        started = perf_counter()
        message, _ = direction.encode({"x": x}, key, params, loss=1.0)
        encode.append(perf_counter() - started)
        started = perf_counter()
        received, _ = direction.decode(message, key, schema, params)
        decode.append(perf_counter() - started)
        size += len(message) - OVERHEAD
        errors.append(_nmse(x, received["x"]))
        mean += received["x"] / clients
    rate = 8 / (x.numel() * clients)
    milliseconds = [1000 * min(times) for times in (encode, decode)]
    table = 8 / x.numel() * _table(direction, x, params)
    return Result(name, source, size * rate, table, sum(errors) / clients, _nmse(x, mean), *milliseconds)


def _table(direction: StateDictEncoder, x: Tensor, params: ByTensor) -> int:
    """Returns how many bytes the coder's table takes in a message of `x`."""
    ((name, (_, chain)),) = direction.chains(schema_of({"x": x})).items()
    if isinstance(chain.coder, AdaptiveCoder):
        return 0
    scaled = x / x.square().mean().sqrt() if direction.common_scale else x
    parts, _ = chain.encode(scaled, Key(0, 1, 0).fold(name), params.get(name, {}))
    return chain.coder.model_size(memoryview(parts[-1]))


def _nmse(x: Tensor, received: Tensor) -> float:
    wide = x.double()
    return float((wide - received.double()).square().sum() / wide.square().sum())


def encoders(choices: list[str], own: Path | None = None) -> dict[str, StateDictEncoder]:
    """Returns what encodes uploads with each option asked for, such as "eden" or "qsgd:levels=2", all of conf/ if none.

    All but those that only set another's knobs, as uint8 does uniform's.
    `own` is a folder like conf/ with more of them. One with a knob `bits` that is not set gives a chain for each of
    BITS that it takes. Raises FedqError.
    """
    chains: dict[str, StateDictEncoder] = {}
    if own and not own.is_dir():
        raise FedqError(f"{own} is no folder")
    search = [f"hydra.searchpath=[file://{own.resolve()}]"] if own else []
    files = sorted((CONF / "encoder").glob("*.yaml"))
    every = [path.stem for path in files if "defaults" not in OmegaConf.load(path)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choice in choices or every:
            name, _, given = choice.partition(":")
            overrides = [f"encoder.{override}" for override in given.split(",") if override]
            cfg = compose("config", [*search, f"encoder={name}", *overrides])
            check(cfg, overrides)
            if given or "bits" not in cfg.encoder:
                chains[choice] = build_encoder(cfg, "upload")
                continue
            for bits in BITS:
                OmegaConf.update(cfg, "encoder.bits", bits)
                with suppress(FedqError):  # too few or too many for this one
                    chains[f"{name}:bits={bits}"] = build_encoder(cfg, "upload")
    return chains


def table(results: list[Result]) -> Table:
    """Returns the results on one source."""
    shown = Table(title=results[0].source, box=SIMPLE_HEAD)
    shown.add_column("encoder", no_wrap=True)
    for heading in ("bits", "NMSE", "of mean", "encode ms", "decode ms"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for r in results:
        errors = (f"{r.nmse:.3g}", f"{r.nmse_of_mean:.3g}")
        shown.add_row(r.encoder, f"{r.bits:.4f}", *errors, f"{r.encode_ms:.1f}", f"{r.decode_ms:.1f}")
    return shown


def plot(results: list[Result], path: Path) -> None:
    """Draws one panel a source: NMSE in decibels against bits an element; Shannon's bound for the normal one."""
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(result.source for result in results))
    names = list(dict.fromkeys(result.encoder.partition(":")[0] for result in results))
    rows, columns = -(-len(sources) // 2), min(len(sources), 2)
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows + 2.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for source, panel in zip(sources, panels, strict=False):
        _panel(panel, source, names, [result for result in results if result.source == source])
    for panel in panels[len(sources) :]:
        panel.set_axis_off()
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize="x-small", ncols=4 * columns)
    figure.savefig(path, dpi=80)


def _panel(panel: "Axes", source: str, names: list[str], results: list[Result]) -> None:
    for i, name in enumerate(names):
        own = sorted(
            (r.bits, 10 * np.log10(max(r.nmse, 1e-12))) for r in results if r.encoder.partition(":")[0] == name
        )
        own = [point for point in own if point[0] <= 10]
        bits, decibels = [point[0] for point in own], [point[1] for point in own]
        marker = "os^vDPX*"[i // 10 % 8]
        panel.plot(bits, decibels, label=name, color=f"C{i % 10}", marker=marker, markersize=4, linewidth=0.8)
    if source == "normal":
        rates = np.linspace(0, 8)
        panel.plot(rates, -20 * rates * np.log10(2), color="black", linestyle=":", label="Shannon's bound")
    panel.set(title=source, xlabel="bits an element, measured", ylabel="NMSE (dB)", ylim=(-55, 5))
    panel.grid(alpha=0.3)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m fedq.bench", description=(__doc__ or "").splitlines()[0])
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
    console = Console()
    try:
        chains = encoders(arguments.encoders, arguments.config_dir)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        sys.exit(f"fedq: {explain(error)}")
    torch.set_num_threads(1)
    results = []
    with console.status("") as status:
        for source in wanted:
            status.update(f"{source}: preparing")
            draw = real_updates(arguments.rounds) if source == "update" else synthetic(source)
            for name, encoder in chains.items():
                status.update(f"{source}: {name}")
                try:
                    results.append(measure(name, encoder, source, draw, arguments.clients))
                except FedqError as error:
                    console.print(f"{source}: {name} is left out: {error}", markup=False, soft_wrap=True)
    if not results:
        sys.exit("fedq: nothing could be measured")
    with (arguments.out / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(map(asdict, results))
    plot(results, arguments.out / "bench.png")
    for source in wanted:
        if found := [result for result in results if result.source == source]:
            console.print(table(found))
    console.print(f"{arguments.out}/bench.csv and bench.png hold the same")


if __name__ == "__main__":
    main()
