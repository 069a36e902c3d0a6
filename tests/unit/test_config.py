"""The typed description of a run: what is wrong is said in one line, what is right survives the round trip."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rlvid.config import RunConfig, load_config, parse_config, shipped_configs
from rlvid.config.reward import NamedReward
from rlvid.files import read_mapping

# (what is written, what the message must say: the key, the value, what is allowed)
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"trian": {}}, ["unknown key trian;", "allowed here: name, seed, model", "do you mean train?"]),
    ({"train": {"stepz": 1}}, ["unknown key train.stepz;", "allowed here: steps, max_seconds"]),
    ({"model": {"lora": {"alfa": 1}}}, ["unknown key model.lora.alfa;", "allowed here: rank, alpha, targets"]),
    ({"model": {"lora": {"alpha": 0}}}, ["model.lora.alpha = 0", "greater than 0"]),
    ({"model": {"finetune": "full", "lora": {"alpha": 8}}}, ["lora.alpha = 8", "trains no adapter"]),
    ({"model": {"size": 64, "width": 32}}, ["size = 64 sets both sides", "width = 32", "leave one of the two out"]),
    ({"model": {"shift": 0}}, ["model.shift = 0", "greater than 0"]),
    ({"method": {"K": 1}}, ["unknown key method.K;", "allowed here: kl, kl_at, unconditional_gradient, name"]),
    ({"train": {"steps": "many"}}, ["train.steps = 'many'", "valid integer"]),
    ({"train": {"batch_size": 2.5}}, ["train.batch_size = 2.5", "valid integer"]),
    ({"train": 3}, ["train = 3", "a section", "allowed: steps, "]),
    ({"train": None}, ["train = None", "a section"]),
    ({"model": {"lora": {"targets": 3}}}, ["model.lora.targets = 3", "valid list"]),
    ({"model": {"finetune": "half"}}, ["model.finetune = 'half'", "'lora' or 'full'"]),
    ({"model": {"finetune": "full"}, "method": "dpok"}, ["method.kl compares", "set model.finetune=lora"]),
    ({"model": {"finetune": "full"}, "method": {"kl": 0.1}}, ["'full'", "method.kl compares", "lora or method.kl=0"]),
    ({"train": {"steps": 0}}, ["train.steps = 0", "greater than or equal to 1"]),
    ({"train": {"zero_stage": 4}}, ["train.zero_stage = 4", "0, 1, 2 or 3"]),
    ({"sampling": {"final_level": "last"}}, ["sampling.final_level = 'last'", "'exact' or 'paper'"]),
    ({"sampling": {"eta": 1.5}}, ["sampling.eta = 1.5", "less than or equal to 1"]),
    ({"method": "drift"}, ["method.name = 'drift'", "allowed: instructvideo, draft,"]),
    ({"method": {"tau": 0}}, ["method.tau = 0", "greater than 0"]),
    ({"method": {"tau": 1.5}}, ["method.tau = 1.5", "less than or equal to 1"]),
    ({"method": {"tau": math.nan}}, ["method.tau = nan"]),
    ({"reward": {"attenuation": math.nan}}, ["reward.attenuation = nan", "greater than or equal to 0"]),
    ({"reward": {"attenuation": -1}}, ["reward.attenuation = -1", "greater than or equal to 0"]),
    ({"optimizer": {"lr": math.nan}}, ["optimizer.lr = nan", "finite number"]),
    ({"name": "../run"}, ["name = '../run'", "pattern"]),
    ({"data": {"prompts": "p.txt"}}, ["data.prompts = 'p.txt' is for data.source=prompts", "data.source = 'builtin'"]),
    ({"data": {"source": "prompts"}}, ["data.source = 'prompts'", "'instructvideo'", "data.source=samples"]),
    ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
    ({"method": {"tau": 0.04}}, ["method.tau = 0.04", "sampling.steps = 20", "at least 0.05"]),
    ({"method": {"gradient_steps": 13}}, ["method.gradient_steps = 13", "12 steps", "allowed: 1 to 12"]),
    ({"train": {"batch_size": 7, "workers": 2}}, ["train.batch_size = 7", "train.workers = 2", "multiple"]),
    ({"train": {"workers": 2, "micro_batch": 3}}, ["train.micro_batch = 3", "share of 4 videos", "divisors of 4"]),
    ({"model": {"frames": 4}, "reward": {"segments": 5}}, ["reward.segments = 5", "model.frames = 4", "1 to 4"]),
    ({"sampling": {"steps": 501}}, ["sampling.steps = 501", "less than or equal to 500"]),
    ({"optimizer": {"betas": [0.9, 1]}}, ["optimizer.betas.1 = 1", "less than 1"]),
    ({"optimizer": {"betas": [-0.1, 0.9]}}, ["optimizer.betas.0 = -0.1", "greater than or equal to 0"]),
    ({"optimizer": {"lr": math.inf}}, ["optimizer.lr = inf", "finite number"]),
    ({"train": {"steps": True}}, ["train.steps = True", "true and false are not allowed here"]),
    ({"optimizer": {"lr": True}}, ["optimizer.lr = True", "true and false are not allowed here"]),
    ({"model": {"frames": False}}, ["model.frames = False", "true and false are not allowed here"]),
    ({"reward": {"name": "hpsv3"}}, ["reward.name = 'hpsv3'", "'hpsv2', 'hpsv2.1', 'pickscore'"]),
    ({"reward": {"name": "oracle"}}, ["reward.name = 'oracle' gives no gradient", "ddpo, dpok, grpo, rwr, raft"]),
    ({"reward": {"mixture": [{"name": "oracle"}]}}, ["reward.name = 'oracle' gives no gradient"]),
    ({"reward": {"path": "a.pt"}}, ["reward: path = 'a.pt'", "'builtin' takes no path"]),
    ({"reward": {"name": "custom", "path": "a.pt"}}, ["reward: path = 'a.pt'", "FILE.py:FUNCTION"]),
    ({"reward": {"name": "hpsv2", "path": "a.py:f"}}, ["reward: path = 'a.py:f'", "'hpsv2' takes a checkpoint"]),
    ({"reward": {"held_out_path": "a.pt"}}, ["reward: held_out_path = 'a.pt'", "'builtin-heldout' takes no path"]),
    ({"reward": {"name": "mixture"}}, ["reward: name = 'mixture', but mixture has 0 parts"]),
    ({"reward": {"name": "clip", "mixture": [{"name": "clip"}]}}, ["name = 'clip', but mixture has 1 parts"]),
    ({"reward": {"mixture": [{"name": "clip"}, {"name": "clip"}]}}, ["two parts are called 'clip'"]),
    ({"reward": {"mixture": [{"name": "hps"}]}}, ["reward.mixture.0.name = 'hps'", "'hpsv2.1'"]),
    ({"reward": {"remote": {"pyhton": "python3"}}}, ["unknown key reward.remote.pyhton", "do you mean python?"]),
    ({"reward": {"mixture": [{"name": "builtin-heldout"}]}}, ["reward.mixture.0.name", "a reward to judge with"]),
    ({"reward": {"mixture": [{"name": "clip", "wait": 1}]}}, ["unknown key reward.mixture.0.wait;", "name, path"]),
    ({"reward": {"mixture": [{"name": "brightness", "path": "x"}]}}, ["reward.mixture.0: path = 'x'", "no path"]),
    ({"reward": {"preprocess": "clip"}}, ["reward: preprocess = 'clip' is for hpsv2,", "not for 'builtin'"]),
    ({"model": {"train": "lora"}}, ["the key model.train is now model.finetune"]),
    ({"data": {"clips": 4}, "guard": {"copies": 1}}, ["data.clips is now data.count; the key guard.copies is now"]),
    ({"train": {"max_skipped": 9}}, ["the key train.max_skipped is gone: leave it out"]),
    ({"reward": {"precision": "int8"}}, ["reward.precision = 'int8'", "'bfloat16'"]),
    ({"reward": {"chunk": 0}}, ["reward.chunk = 0", "greater than or equal to 1"]),
    ({"seed": -1, "train": {"steps": 0}}, ["seed = -1", "; train.steps = 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_is_wrong_is_said_in_one_line(data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_config(data)
    message = str(error.value)
    assert "\n" not in message
    assert not isinstance(error.value, ValidationError)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("", [], "must be a mapping of sections"),
        ("- train", [], "must be a mapping of sections"),
        ("train: {steps: 3", [], "is not valid YAML"),
        ("{}", ["train.steps"], "override 'train.steps' must have the form section.key=value"),
        ("{}", ["=3"], "override '=3' must have the form section.key=value"),
        ("{}", ["train.steps=[1"], "override 'train.steps=[1': the value is not valid YAML"),
        ("{}", ["train.stepz=3"], "unknown key train.stepz"),
        ("{}", ["train.steps=x"], "train.steps = 'x'"),
        ("{}", ["train.steps.more=3"], "train.steps = {'more': 3}"),
    ],
)
def test_wrong_files_and_overrides_are_told(tmp_path: Path, text: str, overrides: list[str], words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".") as error:
        load_config(path, overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    if not overrides:
        assert str(path) in str(error.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"config 'nowhere\.yaml' is neither a file nor a shipped description; shipped: .*toy"
    ):
        load_config("nowhere.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(tmp_path / "run.yaml")


def test_overrides_win_and_the_later_ones_over_the_earlier(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3, batch_size: 4}\nmethod: instructvideo\n")
    overrides = [
        "train.steps=5",
        "method.tau=0.5",
        "optimizer.lr=1e-4",
        "model.lora.targets=[to_q, to_k]",
        "train.steps=7",
    ]
    config = load_config(path, [*overrides, "reward.attenuation=inf", "reward.held_out=null"])
    assert (config.train.steps, config.train.batch_size) == (7, 4)
    assert (config.method.name, config.method.tau) == ("instructvideo", 0.5)
    assert config.optimizer.lr == 1e-4
    assert config.model.lora.targets == ["to_q", "to_k"]
    assert config.reward.attenuation == math.inf
    assert config.reward.held_out is None


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_descriptions_are_valid_and_survive_the_round_trip(name: str) -> None:
    config = load_config(name)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    "data", [{"sampling": {"steps": 500}}, {"optimizer": {"betas": [0, 0.999]}}, {"reward": {"attenuation": math.inf}}]
)
def test_the_ends_of_what_is_allowed_are_allowed(data: dict[str, Any]) -> None:
    assert parse_config(data) != RunConfig()


def test_one_target_or_set_of_an_adapter_needs_no_list() -> None:
    assert parse_config({"model": {"lora": {"targets": "temporal"}}}).model.lora.targets == ["temporal"]


def test_infinity_survives_the_round_trip() -> None:
    config = parse_config({"reward": {"attenuation": "inf"}, "optimizer": {"betas": [0.8, 0.9]}})
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config
    assert again.reward.attenuation == math.inf
    assert again.fingerprint == config.fingerprint


@pytest.mark.parametrize(
    "data",
    [{"name": "other"}, {"output": {"storage": "elsewhere", "checkpoint_every": 1}}, {"train": {"steps": 7}},
     {"train": {"max_failures": 9}}, {"train": {"grace_period": 5}}, {"train": {"cpus_per_worker": 2}},
     {"train": {"use_gpu": True}}, {"train": {"use_gpu": False}}],
)  # fmt: skip
def test_a_fingerprint_overlooks_what_the_result_does_not_depend_on(data: dict[str, Any]) -> None:
    assert parse_config(data).fingerprint == RunConfig().fingerprint


@pytest.mark.parametrize(
    "data",
    [{"seed": 1}, {"optimizer": {"lr": 2e-5}}, {"reward": {"attenuation": math.inf}}, {"method": {"tau": 0.7}},
     {"model": {"lora": {"rank": 8}}}, {"model": {"finetune": "full"}}, {"sampling": {"final_level": "paper"}},
     {"train": {"batch_size": 4}}, {"train": {"workers": 2}}, {"train": {"zero_stage": 2}},
     {"train": {"micro_batch": 4}}, {"model": {"height": 16}}, {"model": {"width": 16}}, {"model": {"shift": 3}},
     {"model": {"lora": {"alpha": 8}}}, {"sampling": {"negative_prompt": "blurred"}}],
)  # fmt: skip
def test_a_fingerprint_sees_what_the_result_depends_on(data: dict[str, Any]) -> None:
    fingerprint = parse_config(data).fingerprint
    assert len(fingerprint) == 12
    assert fingerprint != RunConfig().fingerprint


def test_a_fingerprint_does_not_depend_on_how_a_default_is_given() -> None:
    plain = load_config("toy").fingerprint
    assert load_config("toy", ["reward.precision=float32"]).fingerprint == plain
    assert load_config("toy", ["reward.precision=bfloat16"]).fingerprint != plain


def test_a_rewards_name_follows_from_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function = parse_config({"reward": {"path": "my.py:score", "held_out_path": "my.py:other"}}).reward
    assert (function.name, function.held_out) == ("custom", "custom")
    assert function.resolved().path == f"{tmp_path}/my.py:score"
    assert function.resolved().held_out_path == f"{tmp_path}/my.py:other"
    parts = [
        {"name": "hpsv2.1", "path": "hps.pt"},
        {"path": "~/my.py:score", "weight": -1},
        {"name": "clip", "path": "random"},
    ]
    mixture = parse_config({"reward": {"mixture": parts}}).reward
    assert mixture.name == "mixture"
    assert [part.label for part in mixture.mixture] == ["hpsv2.1", "score", "clip"]
    for path in (".", "../" + Path.cwd().name, str(Path.cwd())):
        assert NamedReward(name="fitted", path=path).label == Path.cwd().name
    home = str(Path.home())
    assert [part.path for part in mixture.resolved().mixture] == [f"{tmp_path}/hps.pt", f"{home}/my.py:score", "random"]
    again = parse_config(yaml.safe_load(yaml.safe_dump({"reward": mixture.model_dump(mode="json")}))).reward
    assert again == mixture


def test_the_papers_settings_are_the_defaults() -> None:
    config = RunConfig()
    assert (config.sampling.steps, config.sampling.guidance, config.eta) == (20, 3.0, 0.0)
    assert (config.method.tau, config.method.gradient_steps, config.method.offset_noise) == (0.6, 1, 0.1)
    assert (config.reward.segments, config.reward.attenuation, config.frame_weights) == (4, 1.0, "paper")
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-5, (0.9, 0.999), 0.0)
    assert (config.optimizer.warmup, config.train.batch_size, config.train.steps) == (10, 8, 20_000)
    assert (config.model.lora.rank, config.model.lora.targets) == (4, ["to_q", "to_k", "to_v", "to_out.0"])
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(("train", "expected"), [({}, 8), ({"workers": 4}, 2), ({"workers": 2, "micro_batch": 1}, 1)])
def test_a_micro_batch_is_a_workers_share_unless_told(train: dict[str, int], expected: int) -> None:
    assert parse_config({"train": train}).micro_batch == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3}\nseed: 1\ntrain: {workers: 1}\n", "the key train is there twice.* line 3"),
        (
            "a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
            "large",
        ),
        ("a: &a [*a]", "alias holds itself"),
        ("[" * 1000, "nested too deeply"),
        ("seed: !!int x", "none of its type"),
        ("name: 2024-99-99", "none of its type"),
    ],
)
def test_yaml_that_means_other_than_it_says_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^config {path} is not valid YAML: .*{words}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"^{path} is damaged .*{words}"):
        read_mapping(path)


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("<<: {seed: 3, name: a}\nseed: 4\n")
    assert load_config(tmp_path / "run.yaml").seed == 4
