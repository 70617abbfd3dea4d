# ruff: noqa: E501  a table of commands and answers reads best a line each
import re
from pathlib import Path

import pytest
import torch
from encoding.configured import CONF, DIRECTIONS, NAMES, config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedq.config import (
    ConfigError,
    build,
    build_encoder,
    build_run,
    build_server,
    check,
    explain,
    flatten,
)
from fedq.config_check import NESTED_GROUPS, overridden
from fedq.encoding import (
    Encoder,
    FixedWidth,
    Golomb,
    Raw,
    ScaledSign,
    StateDictEncoder,
    UniformQuantization,
)
from fedq.errors import FedqError


def configured(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def options(group):
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))


GROUPS = ("algorithm", "client/augment", "run/faults", "run/guard", "run/network", "run/submodel")
ELSEWHERE = {  # groups whose options all train in another test
    "test_datasets.py": ("dataset/partition",),
    "test_presets.py": ("experiment",),
    "test_task.py": ("task",),
    "test_train.py": ("client", "dataset", "encoder", "model", "run", "server"),
}


@pytest.mark.parametrize(
    "overrides",
    [
        ("encoder=uint8", "encoder.upload.stages=[{_target_:fedq.encoding.ScaledSign}]"),
        ("encoder=frontier", "encoder.upload.stages=[]", "encoder.upload.coder._target_=fedq.encoding.Raw"),
        ("encoder=qsgd", "encoder.upload.stages=[]", "encoder.upload.coder._target_=fedq.encoding.Raw"),
        ("encoder=uniform", "encoder.broadcast.bits=8", "encoder.upload.bits=2", "encoder.upload.rounding=nearest"),
        (
            "encoder=uniform",
            "encoder.broadcast.stages.0.bits=4",
            "encoder.upload={stages:[],coder:{_target_:fedq.encoding.Raw}}",
        ),
    ],
)
def test_keys_that_what_is_replaced_leaves_behind_are_no_fault(overrides):
    check(configured(*overrides), overrides)


@pytest.mark.parametrize("changed", ["upload: {bits: 2}\nbroadcast: {bits: 4}", "upload: {stages: []}"])
def test_keys_that_a_file_leaves_behind_in_the_one_it_changes_are_no_fault(tmp_path, changed):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.yaml").write_text(f"defaults: [uniform]\n{changed}\n")
    check(configured(f"hydra.searchpath=[file://{tmp_path}]", "encoder=mine"))


def test_a_misspelt_key_of_ones_own_file_is_told(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.yaml").write_text("defaults: [uniform]\nupload: {eror_feedback: true}\n")
    with pytest.raises(ConfigError, match=re.escape("encoder.upload.eror_feedback is not a key")):
        check(configured(f"hydra.searchpath=[file://{tmp_path}]", "encoder=mine"))


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_option_composes_and_passes_the_check(group, option):
    check(configured(f"{group}={option}"))


def test_the_options_of_every_group_are_tried():
    found = {str(path.parent.relative_to(CONF)) for path in CONF.glob("*/**/*.yaml")}
    assert {group for group in found if not group.startswith("hydra")} == {*GROUPS, *sum(ELSEWHERE.values(), ())}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.bits=eight", "encoder.bits: 'eight' is not allowed; it must be an integer"),
        ("encoder.upload.bits=2.5", "encoder.upload.bits: 2.5 is not allowed; it must be an integer"),
        ("encoder.broadcast.rounding=up", "encoder.broadcast.rounding: 'up' is not allowed; it must be stochastic or nearest"),
        ("encoder.threshold=many", "encoder.threshold: 'many' is not allowed; it must be an integer"),
        ("encoder=float16 +encoder.upload.bits=4", "encoder.upload.bits is not a key; allowed here: stages, coder, rules"),
        ("encoder=frontier +encoder.step=8", "encoder.step is not a key: use encoder.broadcast.step or encoder.upload.step"),
        ("encoder=uniform encoder.bits=4 encoder.broadcast.bits=8 encoder.upload.bits=2", "encoder.bits is not a key: use encoder.broadcast.bits or encoder.upload.bits"),
        ("server=adam server.betas=0.9", "server.betas: 0.9 is not allowed; it must be a list of a number, a number"),
        ("server=adam server.betas=[0.9]", "server.betas: [0.9] is not allowed; it must be a list of"),
        ("server=adam server.betas=[0.9,high]", "server.betas: [0.9, 'high'] is not allowed; it must be a list of"),
        ("encoder=top_k +encoder.upload.rank=4", "encoder.upload.rank is not a key; allowed here: stages, coder"),
        ("+encoder.broadcast.stages.0.bist=3", "encoder.broadcast.stages[0].bist is not a key; allowed here: bits, rounding"),
        ("encoder.broadcast.coder._target_=fedq.encoding.Nope", "encoder.broadcast.coder._target_: 'fedq.encoding.Nope' cannot be imported"),
        ("encoder.upload.rules=[{pattern:x}]", "encoder.upload.rules[0].stages is missing"),
        ("+encoder.upload.coder.model=adaptive", "encoder.upload.coder._target_ is missing"),
        ("client.lr=nan", "client.lr: nan is not a finite number"),
        ("client.lr=fast", "client.lr: 'fast' is not allowed; it must be a number"),
        ("client.max_examples=true", "client.max_examples: True is not allowed; it must be an integer or null"),
        ("algorithm.frozen=conv1", "algorithm.frozen: 'conv1' is not allowed; it must be a list"),
        ("algorithm.personal=[1]", "algorithm.personal: [1] is not allowed; it must be a list"),
        ("server.lr=inf", "server.lr: inf is not a finite number"),
        ("server.lr=high", "server.lr: 'high' is not allowed; it must be a number"),
        ("+dataset.paht=x", "dataset.paht is not a key; allowed here: clients, alpha, background, seed"),
        ("dataset._target_=no.such.Class", "dataset._target_: 'no.such.Class' cannot be imported"),
        ("dataset._target_=fedq.data.emnist", "dataset._target_: 'fedq.data.emnist' is not a class or function"),
        ("encoder.upload.coder._target_=8", "encoder.upload.coder._target_: 8 cannot be imported"),
        ("~run", "run: None is not allowed; it must be keys and values"),
        ("run.rounds=1.5", "run.rounds: 1.5 is not allowed; it must be an integer"),
        ("run.rounds=0", "run: rounds must be 1 or more, not 0"),
        ("run.seed=-1", "run: seed must be from 0"),
        ("run.workers=0", "run: workers must be 1 or more, not 0"),
        ("run.workers=all", "run.workers: 'all' is not allowed; it must be an integer or auto"),
        ("run.min_clients=11", "run: min_clients=11 is more than clients_per_round=10"),
        ("~run.seed", "run.seed is missing"),
        ("run.faults={dropout:0.5}", "run.faults._target_ is missing"),
        ("run.guard={}", "run.guard._target_ is missing"),
        ("+encoder.upload.rate_control={bits:1}", "encoder.upload.rate_control._target_ is missing"),
        ("encoder.upload.rules=[5]", "encoder.upload.rules[0]: 5 is not allowed; it must be keys and values"),
        ("encoder.upload.rules=[{pattern:x,stages:[],coder:{}}]", "encoder.upload.rules[0].coder._target_ is missing"),
        ("encoder.upload.stages=[1]", "encoder.upload.stages[0]._target_ is missing"),
        (
            "encoder.upload.rules=[{pattern:w,stages:[],coder:{_target_:fedq.encoding.Raw}},{pattern:w,stages:[],coder:{_target_:fedq.encoding.ANS}}]",
            "encoder.upload.rules: 'w' is there twice",
        ),
        ("~model._partial_", "model._partial_ must be true"),
        ("client=adam +client.optimizer.lr=1", "client.optimizer.lr is not a key: set client.lr"),
        ("client=adam +client.optimizer.beta=1", "client.optimizer.beta is not a key; allowed here: betas, eps, weight_decay"),
        ("client=adam client.optimizer.eps=x", "client.optimizer.eps: 'x' is not allowed; it must be a number"),
        ("client=adam client.optimizer._partial_=false", "client.optimizer must be null, or a node with _target_ and _partial_: true"),
        ("client.optimizer=adam", "client.optimizer must be null, or a node with _target_ and _partial_: true"),
        ("client.schedule={_partial_:true}", "client.schedule must be null, or a node with _target_ and _partial_: true"),
        ("client.schedule={_target_:torch.optim.lr_scheduler.StepLR,_partial_:true}", "client.schedule.step_size is missing"),
        ("+server.schedule={_target_:torch.optim.lr_scheduler.StepLR,_partial_:true,size:1}", "server.schedule.step_size is missing"),
        ("+server.schedule=3", "server.schedule must be null, or a node with _target_ and _partial_: true"),
        ("+client._partial_=true", "client._partial_ must be false; an optimizer's class is client.optimizer"),
        ("+model.num_classes=37", "model.num_classes is not a key: the dataset gives the number"),
        ("+foo.bar=1", "foo is not a key; allowed here: dataset, model, task, algorithm, client, server, run, encoder"),
        ("+encoder.upload.eror_feedback=true", "encoder.upload.eror_feedback is not a key; allowed here: stages"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        check(configured(*override.split()), override.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "group", "message"),
    [
        ("client.lr=0", "client", "client: lr must be above 0, not 0"),
        ("client.batch_size=0", "client", "client: batch_size must be at least 1, not 0"),
        ("client.momentum=1", "client", "client: momentum must be at least 0 and below 1, not 1"),
        ("dataset.alpha=-1", "dataset", "dataset: alpha must be"),
        ("client.max_grad_norm=0", "client", "client: max_grad_norm must be above 0, not 0"),
    ],
)
def test_what_a_constructor_refuses_names_the_group(override, group, message):
    cfg = configured(override)
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(cfg, group)


@pytest.mark.parametrize(
    ("override", "shape"),
    [
        ("~model +model={_target_:torch.nn.Linear,_partial_:true,in_features:3,out_features:5}", (5, 3)),
        ("model=mlp", (7, 200)),
        ("model=torchvision model._target_=torchvision.models.squeezenet1_1", (7, 512, 1, 1)),  # by **kwargs
    ],
)
def test_a_model_that_takes_num_classes_gets_the_datasets_number(override, shape):
    cfg = configured(*override.split())
    check(cfg, override.split())
    *_, last = (p for p in build(cfg, "model", num_classes=7)().parameters() if p.dim() > 1)
    assert last.shape == shape


def test_what_a_stage_refuses_names_its_place():
    with pytest.raises(ConfigError, match=re.escape("encoder.upload.stages[0]: bits must be from 1 to 16, not 17")):
        build_encoder(configured("encoder.upload.bits=17"), "upload")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.upload.stages=[{_target_:fedq.encoding.FixedWidth}]"], "encoder.upload: FixedWidth() is not a stage"),
        (["encoder.upload.coder._target_=fedq.encoding.ScaledSign"], "encoder.upload: ScaledSign() is not a coder"),
        (["encoder=best", "encoder.upload.coder.coders=[{_target_:fedq.encoding.ScaledSign}]"], "is not a coder"),
        (["encoder=frontier", "+encoder.upload.rate_control={_target_:fedq.encoding.FixedWidth}"], "encoder: FixedWidth() is not a rate controller"),
        (["encoder=follow_loss", "encoder.upload.rate_control.patience=1000000000000000"], "patience must be from 1 to 10000"),
        (["encoder=kashin", "encoder.upload.redundancy=1e300"], "redundancy must be from 1 to 64"),
    ],
)  # fmt: skip
def test_chains_that_are_none_are_told_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_encoder(configured(*overrides), "upload")


@pytest.mark.parametrize(("target", "message"), [("LBFGS", "closure"), ("SparseAdam", "dense gradients")])
def test_a_server_optimizer_that_cannot_step_is_told_before_any_round(target, message):
    with pytest.raises(ConfigError, match=f"^server: .*{message}"):
        build_server(configured(f"server._target_=torch.optim.{target}"))


STEP = "+server.schedule={_target_:torch.optim.lr_scheduler.StepLR,_partial_:true,step_size:2}"


def test_a_schedule_of_the_server_makes_the_rates_of_its_optimizer():
    server = build_server(configured("server.lr=0.5", STEP))
    assert [server.rate(round_) for round_ in range(5)] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])
    assert not hasattr(build_server(configured("server.lr=0.5")), "rate")
    with pytest.raises(FedqError, match=r"server\.schedule, round 2: TypeError: .*metrics"):
        build_server(configured(STEP.replace("StepLR", "ReduceLROnPlateau").replace("step_size:2", "patience:2")))


@pytest.mark.parametrize(("choice", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("adagrad", "Adagrad")])
def test_a_client_file_builds_its_optimizer(choice, kind):
    training = build(configured(f"client={choice}", "client.lr=0.25"), "client")
    (group,) = training.optimizer([torch.zeros(1)], lr=training.lr).param_groups
    assert training.optimizer.func is getattr(torch.optim, kind)
    assert group["lr"] == 0.25


def test_bits_set_both_directions_or_one():
    cfg = configured("encoder=uniform", "encoder.bits=3", "encoder.upload.bits=5", "encoder.upload.rounding=nearest")
    assert build_encoder(cfg, "broadcast").encoder == Encoder([UniformQuantization(3)], FixedWidth())
    assert build_encoder(cfg, "upload").encoder == Encoder([UniformQuantization(5, "nearest")], FixedWidth())
    same = configured("encoder=uniform", "encoder.bits=8")
    for direction in ("broadcast", "upload"):
        assert build_encoder(configured("encoder=uint8"), direction) == build_encoder(same, direction)
    assert build_encoder(configured("encoder=float32"), "upload").encoder == Encoder([], Raw())


@pytest.mark.parametrize(
    ("broadcast", "chain"),
    [
        ("", Encoder([UniformQuantization(8)], FixedWidth())),
        ("broadcast: {stages: [], coder: {_target_: fedq.encoding.Raw}}", Encoder([], Raw())),
        ("broadcast: {coder: {_target_: fedq.encoding.Golomb}}", Encoder([UniformQuantization(8)], Golomb())),
    ],
)
def test_an_authors_file_broadcasts_8_bits_unless_it_says_otherwise(tmp_path, broadcast, chain):
    upload = "upload: {stages: [{_target_: fedq.encoding.ScaledSign}], coder: {_target_: fedq.encoding.FixedWidth}}"
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.yaml").write_text(f"threshold: 7\n{broadcast}\n{upload}\n")
    cfg = configured(f"hydra.searchpath=[file://{tmp_path}]", "encoder=mine")
    check(cfg)
    assert build_encoder(cfg, "broadcast") == StateDictEncoder(chain, 7)
    assert build_encoder(cfg, "upload") == StateDictEncoder(Encoder([ScaledSign()], FixedWidth()), 7)


def test_rules_and_threshold_reach_the_encoder():
    stage, coder = "{_target_:fedq.encoding.UniformQuantization,bits:2}", "{_target_:fedq.encoding.FixedWidth}"
    rule = f"{{pattern:'conv*',stages:[{stage}],coder:{coder}}}"
    encoder = build_encoder(configured(f"encoder.upload.rules=[{rule}]", "encoder.threshold=5"), "upload")
    assert encoder.rules == {"conv*": Encoder([UniformQuantization(2)], FixedWidth())}
    assert encoder.threshold == 5


def test_no_container_of_omegaconf_reaches_the_code():
    server = build(configured("server=adam"), "server")
    assert type(server.keywords["betas"]) is list
    cfg = configured("encoder=uint8")
    assert type(build_encoder(cfg, "upload").encoder.stages) is tuple
    assert not OmegaConf.is_config(build_run(cfg).rounds)


def test_the_tutorial_is_to_the_letter():
    cfg = configured("run=tutorial")
    run = build_run(cfg)
    assert (run.rounds, run.clients_per_round, cfg.client.lr, cfg.server.lr) == (10, 10, 0.02, 1.0)
    assert (cfg.client.batch_size, cfg.client.epochs, cfg.client.max_examples, run.test_batch_size) == (20, 1, 418, 500)
    # keys on the command line still count
    assert configured("run=tutorial", "client.lr=0.5", "run.rounds=3").client.lr == 0.5


def told(*overrides):
    """Returns the sentence with which a command is refused."""
    with pytest.raises(Exception) as error:  # Hydra's, OmegaConf's or a ConfigError: `explain` handles each
        cfg = configured(*overrides)
        check(cfg, overrides)
        for direction in ("broadcast", "upload"):
            build_encoder(cfg, direction)
        build(cfg, "dataset")
        build(cfg, "model", num_classes=10)()
        build(cfg, "client")
        build_server(cfg)
        for part in ("faults", "guard", "submodel"):
            if cfg.run[part]:
                build(cfg, f"run.{part}")
    assert "\n" not in explain(error.value)
    return explain(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_key_of_the_encoder_sets_both_directions_and_exists_only_where_both_have_it(name):
    encoder = OmegaConf.to_container(config(name).encoder, resolve=False)
    knobs = encoder.keys() - {"threshold", *DIRECTIONS}
    for knob in knobs:
        assert [encoder[direction][knob] for direction in DIRECTIONS] == [f"${{encoder.{knob}}}"] * 2
    parts = [(path, value) for direction in DIRECTIONS for path, value in flatten(encoder[direction], direction)]
    referring = {path: value for path, value in parts if "${encoder." in str(value)}
    assert referring.keys() == {f"{direction}.{knob}" for direction in DIRECTIONS for knob in knobs}


def test_the_encoders_files_are_short():
    assert sum(len(path.read_text().splitlines()) for path in (CONF / "encoder").glob("*.yaml")) <= 450


def test_a_key_of_both_directions_sets_both_or_one():
    cfg = configured("encoder=frontier", "encoder.rank=8", "encoder.upload.rank=2", "encoder.upload.step=3")
    first, last = (build_encoder(cfg, direction).encoder.stages for direction in DIRECTIONS)
    assert (first[0].rank, last[0].rank) == (8, 2)
    assert [stage.step for stage in (*first, *last)] == [4, 4, 3, 3]
    cfg = configured("encoder=ans_parametric", "encoder.axis=0", "encoder.broadcast.bits=3")
    (first,), (last,) = (build_encoder(cfg, direction).encoder.stages for direction in DIRECTIONS)
    assert (first, last) == (UniformQuantization(3, axis=0), UniformQuantization(8, axis=0))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["encoder=eden", "encoder.bits=4"], "encoder.bits sets both directions; this encoder has bits in the upload alone: use encoder.upload.bits"),
        (["encoder=eden", "+encoder.bits=4"], "encoder.bits sets both directions; this encoder has bits in the upload alone: use encoder.upload.bits"),
        (["encoder=hadamard", "encoder.bits=4"], "use encoder.upload.bits"),
        (["encoder=threshold", "encoder.limit=2"], "use encoder.upload.limit"),
        (["encoder=drive", "encoder.shared=true"], "use encoder.upload.shared"),
        (["encoder=frontier", "encoder.step=2"], "encoder.step is not a key: use encoder.broadcast.step or encoder.upload.step"),
        (["run/dropout=some"], "run/dropout is now run/submodel"),
        (["run.dropout.keep=0.5"], "run.dropout is now run.submodel"),
        (["+run.dropout={_target_:fedq.learning.FederatedDropout}"], "run.dropout is now run.submodel"),
        (["run/faults=some", "run.faults.dropout=0.5"], "run.faults.dropout is now run.faults.absent"),
        (["run/faults=some", "+run.faults.dropout=0.5"], "run.faults.dropout is now run.faults.absent"),
        (["encoder=bit_budget", "encoder.upload.pace.bits=1"], "encoder.upload.pace is now encoder.upload.rate_control"),
        (["+encoder.broadcast.pace={_target_:fedq.encoding.BitBudget}"], "encoder.broadcast.pace is now encoder.broadcast.rate_control"),
    ],
)  # fmt: skip
def test_a_key_of_the_version_before_is_refused_with_its_new_name(overrides, sentence):
    assert told(*overrides).endswith(sentence)


def test_a_text_in_place_of_a_nested_group_names_the_command_that_chooses_a_file():
    found = {path.relative_to(CONF).parent for path in CONF.glob("*/*/*.yaml")}
    nested = {str(path) for path in found if path.parent.name not in ("hydra", "experiment")}
    assert nested == {key.replace(".", "/") for key in NESTED_GROUPS}
    for group in nested:
        name, key = options(group)[0], group.replace("/", ".")
        dataset = ["dataset=cifar10"] if group.startswith("dataset") else []
        expected = f"{key}: {name!r} is not allowed; {group}={name} chooses a file of the group {group}"
        assert told(*dataset, f"{key}={name}") == expected


def test_a_file_of_the_version_before_is_refused_with_the_new_name(tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.yaml").write_text("defaults: [eden]\nbits: 3\n")
    mine = (f"hydra.searchpath=[file://{tmp_path}]", "encoder=mine")
    assert told(*mine).endswith("use encoder.upload.bits")
    check(configured(*mine, "encoder.upload.bits=3"), ["encoder.upload.bits=3"])  # a value may replace the reference
    (tmp_path / "encoder" / "mine.yaml").write_text("defaults: [frontier]\nupload: {pace: {_target_: X}}\n")
    assert told(*mine) == "encoder.upload.pace is now encoder.upload.rate_control"


STAGE = "{_target_:fedq.encoding."


@pytest.mark.parametrize(
    ("stages", "coder"),
    [
        ("[]", Raw()),
        (f"[{STAGE}Cast,dtype:float16}}]", Raw()),
        (f"[{STAGE}Cast,dtype:float8_e4m3fn,scale:true}}]", FixedWidth()),
        (f"[{STAGE}TopK,fraction:0.1}}]", Raw()),
        (f"[{STAGE}TopK,fraction:0.1}},{STAGE}ScaledSign}}]", FixedWidth()),
        (f"[{STAGE}ZeroOutliers}}]", Raw()),
        (f"[{STAGE}ZeroOutliers}},{STAGE}UniformQuantization}}]", FixedWidth()),
    ],
)
def test_a_chain_without_a_coder_gets_the_one_that_fits(stages, coder):
    rule = f"encoder.upload.rules=[{{pattern:x,stages:{stages}}}]"
    cfg = configured("encoder=float32", f"encoder.upload.stages={stages}", rule)
    check(cfg)
    encoder = build_encoder(cfg, "upload")
    assert encoder.encoder.coder == encoder.rules["x"].coder == coder


def test_a_chain_that_cannot_be_tried_must_name_its_coder(monkeypatch):
    monkeypatch.setattr(ScaledSign, "encode", lambda self, x, key: x.reshape(2, 3))
    sentence = r"^encoder.upload.coder must be given, as the stages fail on four numbers: shape '\[2, 3\]' is invalid"
    with pytest.raises(ConfigError, match=sentence):
        build_encoder(configured("encoder=sign"), "upload")
    assert build_encoder(configured("encoder=sign", "encoder.upload.coder._target_=fedq.encoding.Golomb"), "upload")


class WithoutTest:
    num_classes, num_clients = 10, 20

    def client(self, number):
        raise AssertionError("a dataset without test() is refused before any client is read")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("encoder.bits=${encoder.bits}", "encoder.bits: its ${…} refers to itself"),
        ("encoder.bits=${encoder.upload.bits}", "encoder.bits: its ${…} refers to itself"),
        ("encoder.upload.bits=${encoder.upload}", "encoder.upload.bits: Interpolation to parent node detected"),
        ("run.rounds=${run.rounds}", "run.rounds: its ${…} refers to itself"),
        ("client.lr=${client.rate}", "client.lr: Interpolation key 'client.rate' not found"),
        ("dataset.alpha=???", "dataset.alpha has no value: set dataset.alpha=…"),
        ("dataset._target_=builtins.dict", "dataset: a dict has no num_classes, num_clients, client, test"),
        ("~dataset +dataset={_target_:test_config.WithoutTest}", "dataset: a WithoutTest has no test"),
        ("dataset._target_=torch.nn.Linear", "dataset.in_features is missing"),
        ("dataset._target_=null", "dataset._target_ is missing"),
        ("model._target_=torch.nn.Linear", "model.in_features is missing"),
        ("model._target_=builtins.dict", "model: a dict is not a torch.nn.Module"),
        ("client._target_=builtins.dict", "client: a dict has no train, structured"),
        ("server._target_=builtins.dict", "server: dictionary update sequence element #0 has length 1; 2 is required"),
        ("server._target_=torch.nn.Identity", "server: 'Identity' object has no attribute 'step'"),
        ("encoder.upload.coder={_target_:torch.nn.Linear}", "encoder.upload.coder.in_features is missing"),
        ("encoder.upload.coder={_target_:builtins.dict}", "encoder.upload: {} is not a coder"),
        ("encoder.upload.stages=[{_target_:builtins.dict}]", "encoder.upload: {} is not a stage"),
        ("run.faults={_target_:builtins.dict}", "run.faults: a dict has no client, uplink"),
        ("run.guard={_target_:builtins.dict}", "run.guard: a dict has no scale"),
        ("run.submodel={_target_:builtins.dict}", "run.submodel: a dict has no keep"),
        ("encoder=float32 encoder.upload.coder._target_=fedq.encoding.FixedWidth", "encoder.upload: FixedWidth must stand behind a stage that gives symbols of a known number of levels"),
        ("encoder=nothing", "In 'config': Could not find 'encoder/nothing' Available options in 'encoder': adaptive_clip"),
        ("run/guard=nothing", "In 'run/default': Could not find 'run/guard/nothing' Available options in 'run/guard': clip drop none"),
        ("hydra/launcher=nothing", "(some come with pip install \"fedq[sweep]\")"),
    ],
)  # fmt: skip
def test_what_used_to_be_a_traceback_is_a_sentence(override, sentence):
    assert sentence in told(*override.split())


def test_an_override_that_refers_to_itself_does_not_hide_its_fault():
    given = OmegaConf.create({"encoder": {"bits": "${encoder.bits}"}, "task": ["encoder.bits=${encoder.bits}"]})
    assert overridden(given.task) == {"encoder.bits"}
