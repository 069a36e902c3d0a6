"""The command as a user meets it: help without heavy imports, and one clear line with exit code 2 for each mistake."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_run
from typer.testing import CliRunner

from rlvid.cli import app, main
from rlvid.runs.find import find_run

ROOT = Path(__file__).resolve().parents[2]
VERBS = [
    "train", "evaluate", "report", "export", "generate", "encode", "plan", "keys", "doctor", "demo", "study", "reward",
]  # fmt: skip


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    code += "sys.argv = ['rlvid', '--help']; from rlvid.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    imported = {module.partition(".")[0] for module in done.stderr.splitlines()[-1].split()}
    assert {"rlvid", "typer"} <= imported
    heavy = {"torch", "ray", "diffusers", "transformers", "deepspeed", "pyarrow", "matplotlib", "pandas", "scipy"}
    assert imported & heavy == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output


def test_keys_are_found_by_words_of_their_meaning() -> None:
    def shown(*words: str) -> str:
        return CliRunner().invoke(app, ["keys", *words]).output

    assert shown("Lambda").startswith("reward.attenuation: number ≥ 0; default 1.0\n    lambda of TAR")
    assert "method.tau (method: instructvideo): number > 0, ≤ 1, or null; default 0.6\n" in shown("tau")
    assert {line.split(".")[0] for line in shown("guard.").splitlines() if line[0] != " "} == {"guard"}
    assert "method.mean (method: alignprop)" in shown("alignprop")
    assert "reward.held_out:" in shown("pickscore")
    of_a_batch = shown("batch")
    assert "train.batch_size: " in of_a_batch
    (others,) = (line for line in of_a_batch.splitlines() if line.startswith("also mentioned by "))
    assert "method.inner_epochs" in others
    assert others.count("method.clip_range") == 1
    everything = shown()
    for key in ("seed:", "train.steps:", "method.name:", "data.source:", "model.lora.rank:"):
        assert f"\n{key}" in everything


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("rlvid ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "toy", "train.stepz=3"], ["unknown key train.stepz", "allowed here: steps"]),
        (["train", "toy", "data.clips=4"], ["the key data.clips is now data.count"]),
        (["train", "toy", "train.steps=many"], ["train.steps = 'many'", "valid integer"]),
        (["train", "toy", "model.frames=8", "reward.segments=9"], ["reward.segments = 9", "allowed: 1 to 8"]),
        (["train", "toy", "reward.segments=9"], ["reward.segments = 9", "allowed: 1 to 8"]),
        (["train", "toy", "method.tau=0"], ["method.tau = 0", "greater than 0"]),
        (["train", "toy", "method.tau=1.5"], ["method.tau = 1.5", "less than or equal to 1"]),
        (["train", "toy", "method.gradient_steps=13"], ["method.gradient_steps = 13", "allowed: 1 to 12"]),
        (["train", "nowhere.yaml"], ["'nowhere.yaml' is neither a file nor a shipped description", "toy"]),
        (["keys", "lambada"], ["no key mentions 'lambada'", "rlvid keys lists all"]),
        (["train", "toy", "steps"], ["'steps' must have the form section.key=value"]),
        (["train", "toy", "model.path=/nowhere"], ["model.path = '/nowhere'", "unet"]),
        (["train", "toy", "reward.name=hpsv2"], ["reward.path is not set", "'hpsv2'", "docs/rewards.md"]),
        (["train", "toy", "reward.name=clip", "reward.path=/nowhere"], ["reward.path = '/nowhere'", "no such file"]),
        (
            ["train", "toy", "reward.held_out=clip", "reward.held_out_path=/no"],
            ["reward.held_out_path = '/no'", "no such file"],
        ),
        (
            ["train", "toy", "reward.name=custom", "reward.path=no.py:score"],
            ["reward.path = 'no.py:score'", "there is no file no.py"],
        ),
        (["train", "toy", "model.path=some/thing"], ["model.path = 'some/thing'", "hf download some/thing --include"]),
        (["plan", "toy", "model.path=some/thing"], ["model.path = 'some/thing'", "hf download some/thing --include"]),
        (["plan", "toy", "reward.segments=9"], ["reward.segments = 9", "allowed: 1 to 8"]),
        (["train", "toy", "data.source=/nowhere"], ["data.source = '/nowhere': no such folder", "rlvid encode"]),
        (["train", "toy", "data.source=samples", "data.prompts=no.txt"], ["data.prompts = 'no.txt'", "in_domain"]),
        (["train", "toy", "output.storage=/proc/nowhere"], ["output.storage = '/proc/nowhere'", "cannot be written"]),
        (["train", "toy", "name=../up"], ["name = '../up'"]),
        (["evaluate"], ["no MODEL; name at least one", "for a base model alone, --base CONFIG"]),
        (["evaluate", "--base", "nowhere"], ["'nowhere' is neither a file nor a shipped description"]),
        (["evaluate", "--base", "toy", "run"], ["'run' must have the form section.key=value"]),
        (["evaluate", "nowhere"], ["run 'nowhere': no such folder"]),
        (["evaluate", "nowhere", "--steps", "ten"], ["--steps 'ten'", "whole numbers from 1 to 500"]),
        (["evaluate", "nowhere", "--sets", "beasts"], ["beasts", "new_animals", "nor a file"]),
        (["evaluate", "toy@best*much"], ["MODEL 'toy@best*much'", "above 0 and at most 4 after *, such as 0.5"]),
        (["evaluate", "toy@last"], ["run 'toy@last': no such folder", "after @ comes a step, best or all"]),
        (["evaluate", "nowhere", "--rewards", "beauty"], ["--rewards 'beauty'", "there is no reward 'beauty'"]),
        (["evaluate", "nowhere", "--rewards", "b:hpsv2=no.pt"], ["--rewards b = ", "no.pt"]),
        (
            ["evaluate", "nowhere", "--rewards", "hpsv2=random,hpsv2=random"],
            ["'hpsv2' is there twice", "LABEL:NAME=PATH"],
        ),
        (["evaluate", "nowhere", "--rewards", "hpsv2=no.pt"], ["--rewards hpsv2 = ", "no.pt"]),
        (["evaluate", "s3://b/run", "--workers", "2"], ["--workers", "s3://b/run", "mount"]),
        (["evaluate", "s3://b/run", "--address", "a:1"], ["--workers", "s3://b/run", "omit --workers and --address"]),
        (["evaluate", "nowhere", "--lora-scale", "0"], ["--lora-scale '0'", "above 0 and at most 4"]),
        (["train", "toy", "guard.every=7"], ["guard.every = 7", "output.checkpoint_every = 20", "guard.every=20"]),
        (["train", "toy", "guard.every=20", "guard.prompts=no.txt"], ["'no.txt'", "neither a built-in set"]),
        (["export", "nowhere", "--out", "model"], ["run 'nowhere': no such folder"]),
        (["train", "toy", "model.finetune=full", "method.kl=1"], ["keeps no copy of the base", "method.kl=0"]),
        (["generate", "builtin", ""], ["prompt 1", "empty"]),
        (["generate", "builtin", "a star", "a \x1b[31mwall"], ["prompt 2", "U+001B"]),
        (["generate", "builtin", os.fsdecode(b"a caf\xe9")], [r"argument a caf\xe9", "UTF-8"]),
        (["train", "toy", os.fsdecode(b"name=caf\xe9")], [r"argument name=caf\xe9", "UTF-8"]),
        (["generate", "builtin", "missing.txt"], ["missing.txt"]),
        (["encode", "/nowhere", "out"], ["/nowhere"]),
        (["reward", "fit", "votes.csv"], ["votes.csv: no such file of preference pairs", ".jsonl"]),
        (["reward", "fit", "votes.csv", "colour=1"], ["unknown key colour", "allowed here: kind"]),
        (["reward", "fit", "votes.csv", "steps=0"], ["steps = 0", "greater than or equal to 1"]),
        (["reward", "fit", "votes.csv", "kind=video", "axes=[a, a]"], ["axes = ['a', 'a']", "twice"]),
        (["reward", "fit", "votes.csv", "axes=[a, b]"], ["axes = ['a', 'b']", "set kind=video"]),
        (["reward", "fit", "votes.csv", "backbone.layers=99"], ["backbone.layers = 99", "allowed: 0 to"]),
        (["reward", "fit", "votes.csv", "backbone.name=clip"], ["path is not set", "'clip'", "'random'"]),
        (
            ["reward", "fit", "votes.csv", "backbone.name=clip", "backbone.path=/nowhere"],
            ["backbone.path = '/nowhere'", "no such file"],
        ),
        (["reward", "fit", "votes.csv", "--out", "s3://bucket/mine"], ["--out s3://bucket/mine", "folder"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlvid", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not any(tmp_path.iterdir()), "something was left behind"


def test_a_folder_that_is_no_run_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs")
    for name in ("my-model", "letters", "runs/void"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my-model" / "model_index.json").write_text("{}")
    shutil.rmtree(tmp_path / "runs" / "run" / "step-000003")
    for run, words in (
        (
            "my-model",
            r"is a model, as `rlvid export` writes one, and no run; .*\(under runs there are: run\), or train",
        ),
        ("letters", r"is no run, for it has no config\.yaml; name a folder that `rlvid train` wrote, .*\(there: run\)"),
        ("void", "is no run, for it has no config"),
        ("nowhere", r"no such folder, and no such run under runs \(there: run\)"),
        ("run", r"no checkpoint; it has: none yet, and one is written every 50 steps .*`rlvid train` again"),
    ):
        with pytest.raises(ValueError, match=f"^run .*{run}'?: {words}"):
            find_run(run)


def test_prompts_that_are_not_utf8_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_bytes(b"a red star\n\xff\xfe\n")
    monkeypatch.setattr(sys, "argv", ["rlvid", "generate", "builtin", "prompts.txt"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "UTF-8" in line


def test_a_locale_without_utf8_is_named_as_such() -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "rlvid", "train", "toy", "output.storage=läufe".encode()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert re.search(r"^error: argument output.storage=.*\bascii\b.* PYTHONUTF8=1$", done.stderr)
