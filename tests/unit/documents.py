"""The commands of the README and of docs/: found, held against the real parsers, or performed as a reader would."""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from jobs import submit
from rlvid.cli import app, main
from rlvid.config import RunConfig, load_config, shipped_configs
from rlvid.config.fit import load_fit
from rlvid.config.reward_names import FROM_A_FILE, is_function
from rlvid.data.prompts import ANIMAL_SETS
from rlvid.evaluate.models import parse_spec
from rlvid.evaluate.scorers import parse_rewards
from rlvid.terminal import fractions, numbers
from rlvid.world.captions import PROMPT_SETS
from tuning.load import load_sweep

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
NEEDS = ("a GPU", "a cluster", "the network", "people", "a browser", "ffmpeg", "minutes: ")
"""What a marker may say; ``minutes`` says why. Commands that need nothing, or ffmpeg alone, are performed.

So are those after a marker that says how long a reader waits (``takes: 5 minutes``): here they take seconds.
"""
_MARKER = re.compile(r"<!-- (needs|takes): (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what the marker right before it says it needs or takes."""

    page: str
    language: str
    text: str
    needs: str | None = None
    takes: str | None = None

    @property
    def performed(self) -> bool:
        """Whether a test does what it says."""
        there = self.needs is None or (self.needs == "ffmpeg" and bool(shutil.which("ffmpeg")))
        return there and self.language == "sh"

    def commands(self) -> list[str]:
        """A command a line, as the shell joins lines and puts variables in."""
        found, variables = [], dict[str, str]()
        for line in self.text.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r"([A-Z]\w*)=(\S+)", line):
                variables[assigned[1]] = assigned[2]
            elif shlex.split(line, comments=True):
                found.append(Template(line).safe_substitute(variables))
        return found


def blocks(page: str) -> list[Block]:
    """All code of a page; text that is indented is no code of ours, and has the language ``indented``."""
    found, marker = [], dict[str, str]()
    for token in MarkdownIt().parse(PAGES[page].read_text(encoding="utf-8")):
        text = token.content.strip()
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "indented"
            found.append(Block(page, language, token.content, **marker))
        said = _MARKER.fullmatch(text) if token.type == "html_block" else None
        marker = {said[1]: said[2]} if said else {}
    return found


def code_in_text(page: str) -> list[str]:
    """Code within the sentences of a page."""
    tokens = MarkdownIt().parse(PAGES[page].read_text(encoding="utf-8"))
    inner = [child for token in tokens for child in token.children or []]
    return [child.content for child in inner if child.type == "code_inline"]


def files(page: str) -> dict[str, str]:
    """Files that a page shows whole: blocks that begin with a comment of the file's name."""
    found = {}
    for block in blocks(page):
        first = block.text.partition("\n")[0].removeprefix("# ")
        if block.language in ("yaml", "python") and first.endswith((".yaml", ".py")):
            found[first] = block.text
    return found


# ------------------------------------------------------------------------------------------------- the real parsers


class Parsed(Exception):
    """What a script's own parser made of its arguments."""


def parse_rlvid(words: Sequence[str]) -> None:
    """Holds the arguments of `rlvid` against its parser, and settings against the config.

    Raises:
        Exception: of the parser (typer's own), or ValueError of a setting.
    """
    command: Any = typer.main.get_command(app)
    rest, verb = list(words), ""
    while hasattr(command, "commands"):
        context = command.make_context("rlvid", rest[:1] if rest[:1] == ["--help"] else [], resilient_parsing=True)
        verb, command, rest = command.resolve_command(context, rest)
    given = command.make_context(verb, rest).params
    if verb in ("train", "plan"):
        load_config(given["config"], given["overrides"])
    if verb == "fit":
        load_fit(given["overrides"] or [])
    if verb == "evaluate":
        for model in given["models"]:
            parse_spec(model)
        for reward in filter(None, given["rewards"].split(",")):
            head, _, path = reward.partition("=")
            name = head.rpartition(":")[2]
            if is_function(path) or not path:
                parse_rewards(reward)
            else:
                assert name in FROM_A_FILE, reward
        for name in (given["sets"] or "in_domain").split(","):
            assert Path(name).suffix or name in (*PROMPT_SETS, *ANIMAL_SETS), name
        numbers(given["steps"], "--steps")
        fractions(given["lora_scale"], "--lora-scale")
    if verb == "encode":
        load_config(given["config"])


def parse_script(script: str, words: Sequence[str]) -> None:
    """Holds the arguments of a script, or of ``-m MODULE``, against its own parser, and settings against the config."""
    options = _parsed(script, words)
    if script == "jobs/submit.py":
        submit.job_name(options.command, options.arguments, options.name)
        if options.command in submit.ENTRYPOINTS and options.command != "sweep":
            parse_rlvid([options.command, *options.arguments])
    elif script == "tests/faults/chaos.py":
        load_config(options.config, options.overrides)
    elif script == "jobs.benchmark" and hasattr(options, "overrides"):
        load_config("toy", options.overrides)
    elif script == "tuning/sweep.py":
        named = [options.sweep, *options.overrides]
        load_sweep("toy" if "=" in named[0] else named.pop(0), named).planned()
    elif script == "tests/faults/kill_sweep.py":
        given = options[1]
        load_sweep(given[0], given[1:]).planned()


def _parsed(script: str, words: Sequence[str]) -> Any:
    """Starts the script, and stops it as soon as its parser has done its work."""
    depth = 0

    def stopping(original: Any) -> Any:
        def parse(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                found = original(self, *arguments, **named)
            finally:
                depth -= 1
            if depth:
                return found
            raise Parsed(found)

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [script, *words])
        patch.setattr(sys, "path", list(sys.path))  # scripts may add to it
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                for module in (script, f"{script}.__main__"):  # a test may have imported it: runpy warns then
                    patch.delitem(sys.modules, module, raising=False)
                runpy.run_module(script, run_name="__main__", alter_sys=False)
        except Parsed as found:
            return found.args[0]
    raise AssertionError(f"{script} did not parse its arguments")


def check(command: str) -> bool:
    """Parses a command if it is one of ours; whether it was."""
    words = shlex.split(command, comments=True)
    if words[0] == "rlvid":
        parse_rlvid(words[1:])
    elif words[:2] == ["python", "-m"] and words[2].startswith(("rlvid", "jobs.")):
        parse_rlvid(words[3:]) if words[2] == "rlvid.cli" else parse_script(words[2], words[3:])
    elif words[0] == "python" and words[1].startswith(("jobs/", "tuning/", "tests/")):
        parse_script(words[1], words[2:])
    elif words[:3] == ["ray", "job", "submit"]:
        return check(shlex.join(words[words.index("--") + 1 :]))
    elif words[0] == "make":
        targets = [line.partition(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()]
        assert set(words[1:]) <= set(targets), command
    else:
        return False
    return True


# ------------------------------------------------------------------------------------------------------ performing


SMALL = (
    "model.frames=4", "model.size=16", "data.count=6", "sampling.steps=5", "reward.segments=2", "train.batch_size=4",
    "train.steps=2", "optimizer.warmup=0", "output.checkpoint_every=2", "output.videos_every=0", "train.workers=1",
    "train.zero_stage=0",
)  # fmt: skip
"""What makes a run of seconds of any; it comes last, so it wins."""


class Reader:
    """Follows pages in a folder of its own: their files are there, and models are the tiny one in ``home/tiny``."""

    def __init__(self, home: Path, pages: Sequence[str]) -> None:
        self.home, self._done = home, set[str]()
        for page in pages:
            for name, text in files(page).items():
                (home / name).write_text(text, encoding="utf-8")
        tiny = yaml.safe_load(shipped_configs()["toy"].read_text(encoding="utf-8"))
        self.small = [f"model.path={home / 'tiny'}", *SMALL]
        (home / "tiny.yaml").write_text(yaml.safe_dump(load_config(tiny, self.small).model_dump(mode="json")))

    def perform(self, command: str) -> None:
        """Does what a command says, on the tiny model and few videos; once, where several pages say it.

        Raises:
            AssertionError: it ended with another exit code than 0.
        """
        words = shlex.split(command, comments=True)
        if command in self._done:
            return
        with self._inside() as patch:
            if words[0] == "rlvid":
                patch.setattr(sys, "argv", [*words, *self._smaller(words[1])])
                with pytest.raises(SystemExit) as ended:
                    main()
                assert not ended.value.code, command
            else:
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                done = subprocess.run(
                    ["bash", "-euc", command], cwd=self.home, env=os.environ | {"PATH": path}, timeout=120, check=False,
                    capture_output=True, text=True,
                )  # fmt: skip
                assert done.returncode == 0, f"{command}\n{done.stderr}"
        self._done.add(command)

    def follow(self, page: str) -> None:
        """Performs all that a page says and that needs nothing special."""
        for block in blocks(page):
            if block.performed:
                for command in block.commands():
                    self.perform(command)

    def _smaller(self, verb: str) -> list[str]:
        return {
            "train": self.small,
            "evaluate": ["--videos", "2", "--steps", "2"],
            "encode": ["--config", str(self.home / "tiny.yaml")],
            "report": ["--moving", "1"],
        }.get(verb, [])

    @contextmanager
    def _inside(self) -> Iterator[pytest.MonkeyPatch]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.home)
            yield patch


def leaves(section: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, field) of every key of a run that is no section itself, but those of the methods."""
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        elif name != "method":
            yield f"{prefix}{name}", field
