"""The table of rates and distortions: compares numbers with theory, and tests choices and files."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from experiments.rate_distortion.bench import (
    COLOURS,
    SHAPE,
    Result,
    encoders,
    main,
    measure,
    plot,
    real_updates,
    synthetic,
    table,
)
from experiments.tables import show
from fedq.encoding import (
    CABAC,
    Encoder,
    FixedWidth,
    Key,
    Raw,
    StateDictEncoder,
    StepQuantization,
    TensorSpec,
    UniformQuantization,
)
from fedq.encoding.message import Reader

ROOT = Path(__file__).parents[1]
N = SHAPE[0] * SHAPE[1]


@pytest.mark.parametrize(
    ("source", "fourth_moment"), [("normal", 3), ("laplace", 6), ("sparse", 60), ("student", None)]
)
def test_sources_are_what_they_are_called(source, fourth_moment):
    x = synthetic(source)(0).double()
    assert x.shape == SHAPE
    assert abs(float(x.mean())) < 5e-3
    assert float(x.square().mean()) == pytest.approx(1, abs=0.05 if source == "student" else 0.02)
    if fourth_moment:
        assert float(x.pow(4).mean()) == pytest.approx(fourth_moment, rel=0.05)
    else:  # the fourth moment is infinite: checks the tails of Student's distribution, P(|t| > 5.841) = 0.01
        assert float((x.abs() * 3**0.5 > 5.841).double().mean()) == pytest.approx(0.01, rel=0.05)
    assert (float((x == 0).double().mean()) > 0.94) == (source == "sparse")
    assert not torch.equal(synthetic(source)(0), synthetic(source)(1))
    assert torch.equal(synthetic(source)(1), synthetic(source)(1))


def uniform(i):
    """Returns a grid of 0 … 1, 1,000 times finer than six bits, so that rounding errors are uniform."""
    return torch.linspace(0, 1, 63_001).roll(i)


def sent_by(stage):
    return StateDictEncoder(Encoder([stage], FixedWidth()))


@pytest.mark.parametrize(("rounding", "share"), [("nearest", 12), ("stochastic", 6)])
def test_errors_are_those_of_the_formula(rounding, share):
    result = measure("mine", sent_by(UniformQuantization(6, rounding)), "grid", uniform, clients=8)
    power = float(uniform(1).double().square().mean())
    assert result.nmse == pytest.approx(1 / 63**2 / share / power, rel=0.02)
    # with random rounding the clients' errors are independent; otherwise they are equal
    assert result.nmse_of_mean == pytest.approx(result.nmse / (8 if rounding == "stochastic" else 1), rel=0.05)
    assert result.bits == 8 * (8 + math.ceil(63_001 * 6 / 8)) / 63_001
    assert (result.encoder, result.source, result.table_bits) == ("mine", "grid", 0)


def test_the_error_is_that_of_the_bytes_counted():
    encoder, x, errors = Encoder([UniformQuantization(2)], FixedWidth()), uniform(1), []
    codec = encoder.bind(TensorSpec.of(x))
    for client in range(3):
        key = Key(0, 1, client)
        key = key.fold("x")
        parts, _ = codec.encode(x, key, {})
        back = codec.decode(Reader(memoryview(b"".join(parts))), key, {}, torch.device("cpu"), False)
        errors.append(float((x - back).double().square().sum() / x.double().square().sum()))
    assert len(set(errors)) == 3
    assert measure("", StateDictEncoder(encoder), "", uniform, clients=3).nmse == pytest.approx(
        sum(errors) / 3, rel=1e-6
    )


def test_a_table_is_told_apart():
    class WithTable(Raw):
        def model_size(self, data):
            return len(data) // 4

    result = measure("mine", StateDictEncoder(Encoder([], WithTable())), "grid", uniform, clients=1)
    assert (result.bits, result.table_bits, result.nmse) == (32, pytest.approx(8, rel=1e-4), 0)


def low_rank(scale):
    def draw(i):
        numbers = Key(i).fold("low rank").generator()
        factors = numbers.standard_normal((256, 4)), numbers.standard_normal((4, 256))
        return scale * torch.from_numpy((factors[0] @ factors[1] / 2).astype(np.float32))

    return draw


def test_what_is_measured_is_the_encoder_and_not_its_chain_alone():
    (frontier,) = encoders(["frontier:threshold=1"]).values()
    large, small = (measure("frontier", frontier, "", low_rank(scale), clients=1) for scale in (1, 2**-9))
    assert large.nmse == pytest.approx(small.nmse, rel=1e-3)  # steps are relative to the message's scale
    assert large.nmse < 0.1
    (budget,) = encoders(["bit_budget:bits=0.5"]).values()
    assert measure("bit_budget", budget, "", synthetic("normal"), clients=1).bits == pytest.approx(0.5, rel=0.1)


def test_every_option_is_there_with_its_bits():
    chains = encoders([])
    names = {path.stem for path in Path(ROOT, "conf", "encoder").glob("*.yaml")}
    # these encoders equal another one, or change from round to round
    assert names - {label.partition(":")[0] for label in chains} == {"uint8", "drive", "bit_budget", "follow_loss"}
    assert chains["eden:bits=1"] == encoders(["drive:shared=false"])["drive:shared=false"]
    assert chains["hadamard:bits=4"] == encoders(["hadamard:upload.bits=4"])["hadamard:upload.bits=4"]
    assert encoders(["uniform:bits=3"])["uniform:bits=3"] == chains["uniform:bits=3"]
    assert chains["uniform:bits=3"] == sent_by(UniformQuantization(3))
    assert chains["float32"].encoder == Encoder()
    (label,) = chosen = encoders(["uniform:upload.bits=5,upload.rounding=nearest"])
    assert chosen[label].encoder.stages == (UniformQuantization(5, "nearest"),)


@pytest.fixture(scope="module")
def updates():
    return real_updates(1)


def test_updates_are_clients_of_a_trained_model(updates):
    first, second = updates(0), updates(1)
    assert first.shape == (512, 3136)
    assert torch.equal(first, updates(0))
    assert not torch.equal(first, second)
    assert 0 < float(first.abs().mean()) < 0.01
    # some rows are all zero, which a scheme may use
    assert float((first == 0).all(1).double().mean()) > 0.02


def test_contexts_save_a_third_of_a_real_updates_bits(updates):
    """Compares real bytes with the zeroth-order entropy of the same symbols. Rows and columns differ in scale."""
    x = updates(0)
    for steps in (1.0, 2.0, 4.0):  # −14, −9 and −4 dB
        symbols, side = StepQuantization(steps).encode(x, Key(0))
        spec = StepQuantization(steps).encoded_spec(TensorSpec.of(x), side)
        counts = np.unique(symbols.numpy(), return_counts=True)[1]
        entropy = -float((counts * np.log2(counts / x.numel())).sum())
        assert 8 * memoryview(CABAC().encode(symbols, spec)).nbytes < 0.65 * entropy


def test_the_command_writes_what_it_prints(tmp_path):
    module = "experiments.rate_distortion.bench"
    command = ("-m", module, "float32", "uniform:bits=4", "--sources", "sparse", "--clients", "2")
    done = subprocess.run(
        [sys.executable, *command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with (tmp_path / "bench.csv").open() as file:
        exact, four = csv.DictReader(file)
    assert (exact["encoder"], float(exact["bits"]), float(exact["nmse"])) == ("float32", 32, 0)
    assert (four["encoder"], float(four["bits"])) == ("uniform:bits=4", 4 + 64 / N)
    x = synthetic("sparse")(1).double()
    step = float(x.max() - x.min()) / 15
    # zeros are also rounded, to the two nearest values
    fraction = (x.numpy() - float(x.min())) / step % 1
    expected = step**2 * np.mean(fraction * (1 - fraction)) / float(x.square().mean())
    assert float(four["nmse"]) == pytest.approx(expected, rel=0.01)
    assert f"{float(four['nmse']):.3g}" in done.stdout
    assert "sparse: float32, 1 of 2" in done.stderr  # without a terminal, log lines show the progress
    pixels = imread(tmp_path / "bench.png")[..., :3].reshape(-1, 3)
    drawn = {tuple(colour) for colour in np.unique((pixels * 255).round().astype(int), axis=0).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= drawn, "the two encoders' colours are not in the picture"


def test_no_name_and_no_number_is_cut_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    name = "uniform:upload.bits=5,upload.rounding=nearest,threshold=0"
    show(table([Result(name, "normal", 12.34567, 0, 2.5678e-5, 1.2345e-10, 123456.78, 98765.43)]))
    assert [name, "12.3457", "2.57e-05", "1.23e-10", "123456.8", "98765.4"] in map(
        str.split, capsys.readouterr().out.splitlines()
    )


def test_a_picture_of_many_encoders_has_few_colours_and_shows_the_best(tmp_path):
    def result(name, bits, nmse):
        return Result(name, "normal", bits, 0, nmse, nmse, 1, 1)

    good = [result(f"good{i}", i, 10.0**-i) for i in range(1, len(COLOURS))]
    poor = [result(f"poor{i}", i % 9 + 1, 0.9) for i in range(20)]
    drawn = []
    for name, results in (("few", good), ("many", [*poor, result("uniform", 9, 0.5), *good])):
        plot(results, tmp_path / f"{name}.png")
        pixels = (imread(tmp_path / f"{name}.png")[..., :3].reshape(-1, 3) * 255).round().astype(int)
        drawn.append({tuple(colour) for colour in np.unique(pixels, axis=0).tolist()})
    colours = [tuple(round(255 * part) for part in to_rgb(colour)) for colour in COLOURS]
    assert [colour in drawn[0] for colour in colours] == [True] * (len(COLOURS) - 1) + [False]
    assert [colour in drawn[1] for colour in colours] == [True] * len(COLOURS)
    assert (211, 211, 211) in drawn[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "encoder/nothing"),
        (["uniform:bits=17"], "bits must be from 1 to 16, not 17"),
        (["uniform:bist=7"], "encoder.bist"),
        (["qsgd:levels=2.5"], "encoder.upload.levels: 2.5 is not allowed; it must be an integer"),
        (["uniform:bits=true"], "encoder.bits: True is not allowed; it must be an integer"),
        (["--config-dir", "nowhere"], "nowhere is not a folder"),
        (["--sources", "cauchy"], "unknown sources: cauchy"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    code, told = ended.value.code, capsys.readouterr().err  # argparse writes to stderr
    assert code
    assert sentence in (code if isinstance(code, str) else told).splitlines()[-1]


def test_a_folder_that_is_none_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("sys.argv", ["bench", "float32", "--sources", "normal", "--out", str(tmp_path / "file")])
    monkeypatch.setattr("experiments.rate_distortion.bench.measure", None)
    with pytest.raises(SystemExit, match="^fedq: .*File exists"):
        main()


def test_what_needs_a_package_that_is_not_there_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["bench", "ans:bits=4", "float32", "--sources", "sparse", "--clients", "1", "--out", str(tmp_path)]
    )
    for module in [name for name in sys.modules if name.endswith("_loops") or name == "fedq.encoding.compiled"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "numba", None)
    main()
    with (tmp_path / "bench.csv").open() as file:
        assert [row["encoder"] for row in csv.DictReader(file)] == ["float32"]
    left_out = 'ans:bits=4 is left out: numba is missing, for compiled loops: pip install "fedq[coders]"'
    assert left_out in capsys.readouterr().out


def test_encoders_of_ones_own_are_measured(tmp_path):
    (tmp_path / "encoder").mkdir()
    text = (ROOT / "conf" / "encoder" / "uniform.yaml").read_text()
    (tmp_path / "encoder" / "mine.yaml").write_text(text.replace("bits: 8 ", "bits: 3 "))
    assert encoders(["mine:threshold=5"], tmp_path)["mine:threshold=5"].encoder.stages[0].bits == 3
