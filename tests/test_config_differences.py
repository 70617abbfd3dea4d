"""Differences between an earlier run's configuration and this run's, for all configurations of version 1c20104."""

# ruff: noqa: E501  a table of commands and answers reads best a line each
import json
from copy import deepcopy
from pathlib import Path

import pytest
from encoding.configured import NAMES
from test_config import configured

from fedq.config import to_container
from fedq.config_differences import config_differences

# configurations in checkpoints of commit 1c20104, for each encoder and for other groups
OLD = json.loads(Path(__file__).with_name("old_configurations.json").read_text())


def old(name, **groups):
    return deepcopy({**OLD["others"], "encoder": OLD["encoder"][name], **groups})


def composed(*overrides):
    return to_container(configured("model=mlp", "run.rounds=4", "run.checkpoint_every=4", *overrides))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_the_version_before_is_the_same_choice_today(name):
    today = composed(f"encoder={name}")
    assert config_differences(old(name), today) == []
    assert config_differences(today, today) == []


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("hadamard", ("encoder.upload.bits=3",), "encoder.upload.stages[1].bits was 4, not 3"),
        ("hadamard", ("encoder.threshold=5",), "encoder.threshold was 10000, not 5"),
        ("top_k", ("encoder.upload.error_feedback=true",), "encoder.upload.error_feedback was False, not True"),
        ("top_k", ("++encoder.upload.stages.1.rounding=nearest",), "encoder.upload.stages[1].rounding was stochastic, not nearest"),
        ("top_k", ("encoder.upload.coder._target_=fedq.encoding.Golomb",), "encoder.upload.coder was FixedWidth, not Golomb"),
        ("frontier", ("encoder.upload.reference=initial",), "encoder.upload.reference was none, not initial"),
        ("bit_budget", ("encoder.upload.bits=0.2",), "encoder.upload.rate_control.bits was 0.1, not 0.2"),
        ("best", ("encoder.upload.coder.coders=[{_target_:fedq.encoding.ANS}]",), "encoder.upload.coder.coders was [ANS, ANS, Huffman, Zstandard], not [ANS]"),
        ("uint8", ("encoder.upload.rules=[{pattern:x,stages:[]}]",), "encoder.upload.rules was [], not [{'pattern': 'x', 'stages': []}]"),
        ("uint8", ("client.lr=0.5",), "client.lr was 0.1, not 0.5"),
        ("uint8", ("client.structured=true",), "client.structured was False, not True"),
        ("uint8", ("dataset=writers",), "dataset was Mnist5k, not Writers"),
        ("uint8", ("run/submodel=some",), "run.submodel was None, not FederatedDropout"),
    ],
)  # fmt: skip
def test_a_difference_is_told_once_and_by_what_is_built(name, overrides, expected):
    assert config_differences(old(name), composed(f"encoder={name}", *overrides)) == [expected]


def test_another_encoder_is_told_by_its_stages_and_not_by_all_their_arguments():
    assert config_differences(old("top_k"), composed("encoder=eden")) == [
        "encoder.upload.stages was [TopK, UniformQuantization], not [HadamardRotation, Eden]"
    ]


def test_the_coder_that_fits_is_that_of_the_version_before_in_rules_too():
    stage = {"_target_": "fedq.encoding.ScaledSign"}
    before = old("uint8")
    before["encoder"]["upload"]["rules"] = [
        {"pattern": "x", "stages": [stage], "coder": {"_target_": "fedq.encoding.FixedWidth"}}
    ]
    today = composed("encoder.upload.rules=[{pattern:x,stages:[{_target_:fedq.encoding.ScaledSign}]}]")
    assert config_differences(before, today) == []
    before["encoder"]["upload"]["rules"][0]["coder"]["_target_"] = "fedq.encoding.Raw"
    assert config_differences(before, today) == ["encoder.upload.rules[0].coder was Raw, not FixedWidth"]


def test_keys_of_the_version_before_have_todays_names():
    before = old("bit_budget")
    before["encoder"]["upload"]["pace"]["bits"] = 0.3
    before["run"]["dropout"] = {"_target_": "fedq.learning.FederatedDropout", "keep": 0.75}
    before["run"]["faults"] = {"_target_": "fedq.simulation.faults.Faults", "dropout": 0.05}
    others = ("crash", "late", "nan", "damaged", "replayed")
    faults = [f"run.faults.{name}=0" for name in others]
    today = composed("encoder=bit_budget", "encoder.upload.bits=0.3", "run/submodel=some", "run/faults=some", *faults)
    assert config_differences(before, today) == []
    before["run"]["faults"]["dropout"] = 0.5
    assert config_differences(before, today) == ["run.faults.absent was 0.5, not 0.05"]


def test_keys_may_change_where_they_change_no_round_that_is_done():
    today = composed("run.rounds=9", "run.min_clients=2", "run.keep=7")
    assert config_differences(old("uint8"), today) == []
    assert config_differences(old("uint8"), today, continuing=False) == ["run.min_clients was 1, not 2"]


def test_nothing_that_an_earlier_configuration_names_is_imported(monkeypatch):
    before = old("uint8", dataset={"_target_": "antigravity.fly_geohash"})
    before["encoder"]["upload"] |= {"coder": {"_target_": None}, "stages": [{"_target_": "antigravity.fly_geohash"}]}
    monkeypatch.setitem(__import__("sys").modules, "antigravity", None)  # an import would raise ImportError
    found = config_differences(before, composed("encoder=uint8"))
    assert found == [
        "dataset was fly_geohash, not Mnist5k",
        "encoder.upload.stages was [fly_geohash], not [UniformQuantization]",
    ]


@pytest.mark.parametrize("damaged", [{}, {"encoder": 5}, {"encoder": {"upload": {"rules": 3, "stages": 4}}, "run": []}])
def test_any_configuration_is_told_apart_without_an_exception(damaged):
    assert config_differences(damaged, composed())
    assert config_differences(composed(), damaged)
