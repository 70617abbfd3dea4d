# ruff: noqa: E501  a table of commands and answers reads best a line each
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedq.config import ConfigError, build, build_encoder, build_run, build_server, check
from fedq.encoding import Encoder, FixedWidth, Golomb, Raw, ScaledSign, StateDictEncoder, UniformQuantization
from fedq.train import CONF


def configured(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def options(group):
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))


GROUPS = ("run/faults", "run/guard", "run/submodel")  # test_train.py trains with every option of the others


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.bits=eight", "encoder.bits: 'eight' is not allowed; it must be an integer"),
        ("encoder.upload.bits=2.5", "encoder.upload.bits: 2.5 is not allowed; it must be an integer"),
        ("encoder.broadcast.rounding=up", "encoder.broadcast.rounding: 'up' is not allowed; it must be stochastic or nearest"),
        ("encoder.threshold=many", "encoder.threshold: 'many' is not allowed; it must be an integer"),
        ("encoder=uniform_block +encoder.upload.bits=4", "encoder.upload.bits is not a key; allowed here: stages, coder, rules"),
        ("encoder=frontier +encoder.step=8", "encoder.step is not a key; allowed here: threshold, broadcast, upload"),
        ("encoder=uniform encoder.bits=4 encoder.broadcast.bits=8 encoder.upload.bits=2", "encoder.bits is not a key; allowed here: threshold"),
        ("server=adam server.betas=0.9", "server.betas: 0.9 is not allowed; it must be a list of a number, a number"),
        ("server=adam server.betas=[0.9]", "server.betas: [0.9] is not allowed; it must be a list of"),
        ("server=adam server.betas=[0.9,high]", "server.betas: [0.9, 'high'] is not allowed; it must be a list of"),
        ("encoder=top_k +encoder.upload.fraction=0.01", "encoder.upload.fraction is not a key; allowed here: stages, coder"),
        ("+encoder.broadcast.stages.0.bist=3", "encoder.broadcast.stages[0].bist is not a key; allowed here: bits, rounding"),
        ("encoder.broadcast.coder._target_=fedq.encoding.Nope", "encoder.broadcast.coder._target_: 'fedq.encoding.Nope' cannot be imported"),
        ("encoder.upload.rules=[{pattern:x,stages:[]}]", "encoder.upload.rules[0].coder is missing"),
        ("client.lr=nan", "client.lr: nan is not a finite number"),
        ("client.lr=fast", "client.lr: 'fast' is not allowed; it must be a number"),
        ("client.max_examples=true", "client.max_examples: True is not allowed; it must be an integer or null"),
        ("server.lr=inf", "server.lr: inf is not a finite number"),
        ("server.lr=high", "server.lr: 'high' is not allowed; it must be a number"),
        ("+dataset.paht=x", "dataset.paht is not a key; allowed here: clients, alpha, background, seed"),
        ("dataset._target_=no.such.Class", "dataset._target_: 'no.such.Class' cannot be imported"),
        ("dataset._target_=fedq.data.emnist", "dataset._target_: 'fedq.data.emnist' is no class or function"),
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
        ("+client._partial_=true", "client._partial_ must be false"),
        ("+model.num_classes=37", "model.num_classes is not a key: it is the dataset's"),
        ("+foo.bar=1", "foo is not a key; allowed here: dataset, model, client, server, run, encoder"),
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
        ("client.batch_size=0", "client", "client: batch_size must be 1 or more, not 0"),
        ("client.momentum=1", "client", "client: momentum must be from 0 to below 1, not 1"),
        ("dataset.alpha=-1", "dataset", "dataset: alpha must be"),
    ],
)
def test_what_a_constructor_refuses_names_the_group(override, group, message):
    cfg = configured(override)
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(cfg, group)


def test_what_a_stage_refuses_names_its_place():
    with pytest.raises(ConfigError, match=re.escape("encoder.upload.stages[0]: bits must be from 1 to 16, not 17")):
        build_encoder(configured("encoder.upload.bits=17"), "upload")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.upload.stages=[{_target_:fedq.encoding.FixedWidth}]"], "encoder.upload: FixedWidth() is not a stage"),
        (["encoder.upload.coder._target_=fedq.encoding.ScaledSign"], "encoder.upload: ScaledSign() is not a coder"),
        (["encoder=best", "encoder.upload.coder.coders=[{_target_:fedq.encoding.LearnedANS}]"], "is not a coder, or one that learns"),
        (["encoder=frontier", "+encoder.upload.rate_control={_target_:fedq.encoding.FixedWidth}"], "encoder: FixedWidth() is not a rate_control"),
        (["encoder=follow_loss", "encoder.upload.rate_control.patience=1000000000000000"], "patience must be from 1 to 10,000"),
        (["encoder=kashin", "encoder.redundancy=1e300"], "redundancy must be from 1 to 64"),
    ],
)  # fmt: skip
def test_chains_that_are_none_are_told_in_one_line(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_encoder(configured(*overrides), "upload")


@pytest.mark.parametrize(("target", "message"), [("LBFGS", "closure"), ("SparseAdam", "dense gradients")])
def test_a_server_optimizer_that_cannot_step_is_told_before_any_round(target, message):
    with pytest.raises(ConfigError, match=f"^server: .*{message}"):
        build_server(configured(f"server._target_=torch.optim.{target}"))


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
    # and what a person sets on the command line still counts
    assert configured("run=tutorial", "client.lr=0.5", "run.rounds=3").client.lr == 0.5
