"""The documentation: it builds without a warning, holds every key, and every command in it is one that exists.

tests/ray/test_docs.py performs the commands that need nothing special.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from answer_study import launch
from documents import (
    NEEDS,
    PAGES,
    ROOT,
    SMALL,
    Block,
    blocks,
    check,
    code_in_text,
    files,
    leaves,
    parse_rlvid,
    parse_script,
)
from playwright.sync_api import sync_playwright

from rlvid.cli import app
from rlvid.config import load_config, parse_config
from rlvid.config.fit import FitConfig
from rlvid.config.methods import METHODS
from rlvid.config.reference import fit_reference, reference
from rlvid.plan.counts import count

SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]
LINES = [(block, command) for block in SHELL for command in block.commands()]
SCRIPT = re.compile(r"python (jobs|tuning|tests)/\S+ ")
OURS = re.compile(r"(rlvid |python (jobs|tuning|tests)/|python -m (rlvid|jobs)|make |ray job submit )")


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The files that the pages show, where commands look for them."""
    home = tmp_path_factory.mktemp("reader")
    for page in PAGES:
        for name, text in files(page).items():
            (home / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield


# -------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_code_is_fenced_in_a_known_language_and_markers_are_known(page: str) -> None:
    for block in blocks(page):
        assert block.language in ("sh", "yaml", "python", "text"), f"{page}: {block.language}: {block.text[:60]}"
        elsewhere = block.language != "sh" and any(map(OURS.match, block.text.splitlines()))
        assert not elsewhere, f"{page}: a command outside sh: {block.text[:60]}"
        assert block.needs is None or block.needs.startswith(NEEDS), f"{page}: needs {block.needs!r}"
        assert block.needs != "minutes: ", f"{page}: minutes for what? {block.text[:60]}"
        timed = block.takes is None or (block.performed and re.match(r"(about )?\d+ minutes?\b", block.takes))
        assert timed, f"{page}: takes {block.takes!r}"
    text, found = PAGES[page].read_text(encoding="utf-8"), blocks(page)
    counts = (sum(block.needs is not None for block in found), sum(block.takes is not None for block in found))
    assert counts == (text.count("<!-- needs: "), text.count("<!-- takes: ")), f"{page}: a marker marks nothing"


@pytest.mark.parametrize(("block", "command"), LINES, ids=[f"{b.page}: {' '.join(c.split())[:70]}" for b, c in LINES])
def test_every_command_is_understood_by_its_own_parser(block: Block, command: str) -> None:
    assert check(command) == bool(OURS.match(command))


def test_the_check_of_commands_finds_mistakes() -> None:
    for wrong in (
        "rlvid trian toy",
        "rlvid train toy train.stepz=3",
        "rlvid train nothing.yaml",
        "rlvid evaluate toy --setz in_domain",
        "rlvid evaluate toy --sets animal",
        "rlvid evaluate toy --steps many",
        "rlvid study serve folder --pears 3",
        "python jobs/submit.py train toy name=mine",
        "python jobs/submit.py train toy output.storage=/mnt/runs train.stepz=3",
        "python tests/faults/chaos.py --kills many",
        "python tuning/sweep.py methods 'space.variant={a: {method.name: ppo}}'",
        "python -m jobs.benchmark step --preset huge",
        "python -m jobs.benchmark steps",
        "python tuning/sweep.py toy algorithm=guess",
        "python tuning/sweep.py toy 'space.method.tau={uniform: [0.4, 0.8]}'",
        "python tests/faults/kill_sweep.py --kills 3 toy algorithm=guess",
        "ray job submit -- python -m rlvid.cli train toy train.stepz=3",
        "make nothing",
    ):
        with pytest.raises((Exception, SystemExit)):
            check(wrong)
    assert not check("ls runs")


def test_commands_in_running_text_name_a_verb_that_exists() -> None:
    verbs = set(typer.main.get_command(app).commands) | {"--help"}
    found = 0
    for path in PAGES.values():
        for verb in re.findall(r"`rlvid ([a-z-]+)", path.read_text(encoding="utf-8")):
            assert verb in verbs, f"{path.name}: rlvid {verb}"
            found += 1
    assert found > 20


def test_scripts_in_running_text_understand_their_arguments() -> None:
    found = [words for page in PAGES for words in code_in_text(page) if SCRIPT.match(words)]
    assert len(found) > 2
    assert all(map(check, found))


def test_scripts_understand_what_their_own_help_shows() -> None:
    paths = [path for folder in ("jobs", "tuning", "tests/faults") for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    lines = [line for text in texts for line in (ast.get_docstring(ast.parse(text)) or "").splitlines()]
    shown = [line.strip() for line in lines if re.match(r" +python (jobs/|tuning/|tests/|-m jobs)", line)]
    own = re.compile(r"--help|\bmy\b")  # which ends at once, and files that a reader has
    found = [line for line in shown if not own.search(line)]
    assert len(found) > 10
    assert all(map(check, found))


def test_most_pages_have_something_performed_and_what_they_show_trains() -> None:
    performed = [command for block in SHELL if block.performed for command in block.commands()]
    verbs = {shlex.split(command)[1] for command in performed if command.startswith("rlvid ")}
    assert verbs >= {"train", "evaluate", "report", "generate", "export", "plan", "doctor"}
    assert load_config("toy", list(SMALL)).train.steps == 2


def test_whatever_trains_or_evaluates_says_how_long_a_reader_waits() -> None:
    slow = re.compile(r"rlvid (train|evaluate) ")
    unsaid = [b for b in SHELL if b.performed and b.takes is None and any(map(slow.match, b.commands()))]
    assert unsaid == []


def test_descriptions_that_pages_show_are_valid() -> None:
    shown = [name for page in PAGES for name in files(page) if name.endswith(".yaml")]
    assert len(shown) >= 3
    everything = [name for page in PAGES for name in files(page)]
    assert len(set(everything)) == len(everything), "two pages show a file of one name"
    assert all(load_config(name).name != "run" for name in shown)


# ------------------------------------------------------------------------------------------------------------ site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}, timeout=120, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_site_builds_without_a_warning_and_asks_nothing_of_the_network(site: Path) -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert pages.keys() >= PAGES.keys() - {"README"}
    for name, text in pages.items():
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//', text), name
        assert 'src="offline-search.js"' in text, f"{name}: its search would need the network or a server"
        assert "needs: " not in text, f"{name}: a marker was not shown"
        assert "<!-- takes" not in text, f"{name}: a marker was not shown"
    assert "<em>Takes 5 minutes:</em>" in pages["first-hour"]
    assert "model.lora.rank" in pages["config"]
    assert not (site / "hooks.py").exists()


def test_search_of_the_site_works_from_disk(site: Path) -> None:
    with sync_playwright() as player:
        try:
            browser = launch(player)
        except ValueError as error:
            pytest.skip(str(error))
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for words, found in {"lambda": "Sweeps", "ZeRO": "Failures", "over-optimisation": "Over-optimisation"}.items():
            page.goto((site / "index.html").as_uri())
            page.keyboard.press("/")
            page.keyboard.type(words)
            page.locator(".md-search-result__item h1", has_text=found).first.wait_for()
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in asked), "the site asks the network"


def test_links_of_the_readme_lead_somewhere() -> None:
    readme = PAGES["README"].read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if not link.startswith("http")]
    assert len(links) > 15
    for link in links:
        name, _, anchor = link.partition("#")
        assert (ROOT / name).is_file(), link
        headings = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
        assert not anchor or anchor in anchors, link


def test_code_in_the_readme_is_the_code_of_the_named_files() -> None:
    readme = PAGES["README"].read_text(encoding="utf-8")
    shown = re.findall(r"\(`(rlvid/[\w/]+\.py)`\):\n\n```python\n(.*?)```", readme, re.DOTALL)
    assert len(shown) == readme.count("```python") == 2
    for file, code in shown:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert any(textwrap.indent(code, " " * depth) in source for depth in (4, 8)), file


def test_the_tree_in_the_readme_names_every_file_of_the_core_and_every_room() -> None:
    readme = PAGES["README"].read_text(encoding="utf-8")
    (tree,) = re.findall(r"^## The tree\n.*?```text\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
    named, folders = set(), [""]
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth + 1 :] = [folders[depth] + name] if name.endswith("/") else []
        named.add(folders[depth] + name)
    core = ("models", "diffusion", "reward", "algorithms")
    files = {str(path.relative_to(ROOT)) for room in core for path in (ROOT / "rlvid" / room).glob("[!_]*.py")}
    files |= {f"rlvid/{path.name}" for path in (ROOT / "rlvid").glob("[!_]*.py")}
    rooms = {f"rlvid/{path.name}/" for path in (ROOT / "rlvid").iterdir() if any(path.glob("*.py"))}
    assert files | rooms <= named, sorted((files | rooms) - named)
    assert all((ROOT / name).exists() for name in named), sorted(name for name in named if not (ROOT / name).exists())


# ---------------------------------------------------------------------------------------------------------- config


def _row(path: str, page: str) -> list[str]:
    (found,) = re.findall(rf"^\| `{re.escape(path)}` \|.*$", page, re.MULTILINE)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_every_key_of_the_config_is_described() -> None:
    page = reference()
    keys = dict(leaves())
    assert len(keys) > 50
    for path, field in keys.items():
        _, allowed, default, description = _row(path, page)
        assert field.description
        assert description.replace("&lt;", "<").replace("\\*", "*") == field.description, path
        assert allowed, path
        assert default, path
    assert _row("reward.mixture[].weight", page)[2] == "`1.0`"
    assert _row("train.zero_stage", page)[1] == "`0`, `1`, `2`, `3`"
    assert _row("model.frames", page)[1:3] == ["whole number ≥ 2, or `null`", "`null`"]
    page = fit_reference()
    assert _row("backbone.layers", page)[1:3] == ["whole number ≥ 0, or `null`", "`null`"]
    assert all(f"| `{key}" in page for key in FitConfig.model_fields)


@pytest.mark.parametrize("name", METHODS)
def test_every_key_of_every_method_is_described(name: str) -> None:
    section = reference().partition(f"### `method: {name}`\n")[2].partition("\n#")[0]
    keys = METHODS[name].model_fields.keys() - {"name"}
    assert keys
    for key in keys:
        description = METHODS[name].model_fields[key].description
        assert description
        assert _row(f"method.{key}", section)[3] == description.replace("|", "\\|"), key
    assert section.count("\n| `method.") == len(keys)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods_has_the_numbers_of_the_plan(name: str) -> None:
    rows, decoded = _row(name, PAGES["methods"].read_text(encoding="utf-8"))[3:5]
    counts = count(parse_config({"method": name, "train": {"group_size": 2}}), frames=8)
    if name == "alignprop":  # its cut is random
        assert rows == f"{counts.denoiser.plain + counts.denoiser.graph:g} in all"
    else:
        assert rows == f"{counts.denoiser.plain:g} + {counts.denoiser.graph:g}"
    assert int(decoded) == counts.decoder.plain + counts.decoder.graph


def test_the_parsers_that_check_stop_before_anything_is_done() -> None:
    parse_rlvid(["train", "toy", "name=nothing"])
    parse_script("tests/faults/chaos.py", ["--kills", "1"])
    assert not any(Path.cwd().glob("runs*"))
