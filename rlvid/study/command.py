"""`rlvid study`: serves pairs to people, prints and exports their answers; heavy modules are imported inside."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlvid.interrupt import kept
from rlvid.terminal import console, say, shell, short

if TYPE_CHECKING:
    from rlvid.study.results import Scores
    from rlvid.study.store import Answer, Store, Study

study = typer.Typer(
    no_args_is_help=True,
    help="""Asks people which video is better, and prints the results.

[bold]rlvid study serve EVALUATION[/bold] shows pairs of videos in the browser; EVALUATION is what rlvid evaluate wrote.
[bold]rlvid study invite EVALUATION NAME...[/bold] makes people links of their own.
[bold]rlvid study results EVALUATION[/bold] counts; [bold]rlvid study export[/bold] writes preference pairs.""",
)
File = Annotated[Path, typer.Argument(help="The study's file, or the folder that holds study.sqlite.")]
Folder = Annotated[
    Path | None, typer.Option(help="Where the evaluation is now; default: where it was when the study began.")
]
Without = Annotated[str | None, typer.Option(help="Annotators to leave out, separated by commas.")]


@study.command()
def serve(
    evaluation: Annotated[Path, typer.Argument(help="Folder that rlvid evaluate wrote.")],
    models: Annotated[
        str | None, typer.Option(help="Two or more of its models, separated by commas; default: all.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, max=10_000, help="Pairs that each person answers.")] = 40,
    checks: Annotated[int, typer.Option(min=0, max=100, help="Attention checks: a video and itself in noise.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of pairs, of their order and sides.")] = 0,
    annotators: Annotated[
        str | None, typer.Option(help="Who may answer, names separated by commas; default: whoever gives a name.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="SQLite file for the answers; default: study.sqlite in the evaluation.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8300,
    shared: Annotated[
        bool, typer.Option("--shared", help="Keep the shared link open though people have links of their own.")
    ] = False,
) -> None:
    """Shows pairs of videos for the same prompt and noise, blind and in random order, and saves the answers.

    An answer is on disk before the next pair appears. After an interruption, start the same command again: everybody
    continues with the same link. Stop it (Ctrl-C) when all have answered.
    """
    from rlvid.study.app import create_app
    from rlvid.study.pairs import choose_pairs, without_frames
    from rlvid.study.serve import address_of, is_local, listen, run
    from rlvid.study.store import Store
    from rlvid.study.videos import Videos

    videos = Videos(evaluation)
    asked = choose_pairs(videos, _names(models, "--models"), pairs, checks, seed)
    named = {name: videos.models[name] for name in _names(models, "--models") or videos.models}
    people, path, local = _names(annotators, "--annotators"), out or evaluation / "study.sqlite", is_local(host)
    if lacking := without_frames(videos, [*named]):
        lacks = ", ".join(f"{name} lacks {len(cases)}" for name, cases in lacking.items())
        many = f"{len(set().union(*lacking.values()))} of {len(videos.cases)}"
        say(f"left out     {many} prompts, whose videos have no frames because a pixel was not finite: {lacks}")
    with listen(host, port) as listening:
        store = Store.begin(path, evaluation, seed, named, asked, private=not local)
        token = None if local else store.token()
        store.served_at(address_of(listening, None))
        app = create_app(store, videos, people, token, local, shared)
        say(f"{len(asked)} pairs{f' ({checks} of them checks)' if checks else ''}, answers in {short(path)}")
        if shared or not store.invited(revoked=True):
            say(f"open         {address_of(listening, token)}")
        if invited := store.invited():
            say(f"invited      {', '.join(invited)}, each by their own link")
        say(f"afterwards   rlvid study results {shell(path)}")
        with kept(f"the answers are in {short(path)}"):
            run(app, listening)


@study.command()
def invite(
    file: File,
    names: Annotated[list[str] | None, typer.Argument(help="Names, each of whom gets a link.")] = None,
    revoke: Annotated[
        str | None, typer.Option(help="People whose links shall not work any more, separated by commas.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Where people reach the study; default: where it was served last.")
    ] = None,
) -> None:
    """Makes each person their own link, by which they alone can answer under their name.

    From the first invitation on the shared link is closed (but see serve --shared). A second invitation replaces the
    first link. Links are shown once: the study's file holds no more than their digests. A server that runs need not
    be started again.
    """
    from rlvid.study.store import Store

    store = Store(_database(file))
    store.study()
    if not names and revoke is None:
        raise ValueError("no NAME; name the people to invite, or those to --revoke")
    base = (address or store.served_at() or "").rstrip("/")
    if names and not base.startswith(("http://", "https://")):
        raise ValueError(f"--address {base!r}: expected where people reach the study, such as http://HOST:8300/")
    if revoke is not None:
        store.revoke(_names(revoke, "--revoke"))
        say(f"revoked      {revoke}")
    for name, token in store.invite(names or []).items():
        say(f"{name:<12} {base}/{token}/")


@study.command()
def results(file: File, evaluation: Folder = None, without: Without = None) -> None:
    """Prints the results: wins, a ranking, agreement between people and with each metric.

    Prints tables, and writes them beside the study's file as STUDY-results.md and .json.
    """
    from rlvid.evaluate.tables.table import json_text
    from rlvid.files import write_atomic
    from rlvid.study.results import summarise
    from rlvid.study.tables import markdown, render

    store, asked, answers = _answered(file, without)
    scores, rewards, lacking = _measured(asked, evaluation)
    found = summarise(asked, answers, scores, rewards)
    for table in render(found):
        console.print(table)
    if not scores:
        say(f"note         nothing on agreement with metrics, see --evaluation. {lacking}")
    base = store.path.with_suffix("")
    for suffix, text in ((".md", markdown(found)), (".json", json_text(asdict(found)))):
        write_atomic(base.with_name(f"{base.name}-results{suffix}"), text.encode())
    say(f"tables       {short(base.with_name(f'{base.name}-results.md'))} (.json)")


@study.command()
def export(
    file: File,
    out: Annotated[Path, typer.Option(help="Parquet file for the preference pairs.")],
    evaluation: Folder = None,
    without: Without = None,
) -> None:
    """Writes preference pairs: the prompt, the frames of both videos, the preference, the axis, the annotator."""
    from rlvid.study.preferences import check_same, write_preferences
    from rlvid.study.videos import Videos

    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    _, asked, answers = _answered(file, without)
    videos = Videos(evaluation or asked.evaluation)
    check_same(asked, videos)
    count, ties = write_preferences(out, asked, answers, videos)
    say(f"{count} preference pairs in {short(out)}, {ties} of them ties")


def _names(text: str | None, option: str) -> list[str]:
    names = [" ".join(part.split()) for part in text.split(",")] if text is not None else []
    if not all(names) or len({name.casefold() for name in names}) < len(names):
        raise ValueError(f"{option} {text!r}: expected names separated by commas, each once")
    return names


def _measured(asked: "Study", evaluation: Path | None) -> tuple["Scores", dict[str, str], str]:
    """Scores, the names of the two rewards, and what is lacking where there are no scores.

    Raises ValueError if the evaluation that was named is another one, or damaged.
    """
    from rlvid.study.preferences import check_same
    from rlvid.study.videos import Videos

    folder = evaluation or asked.evaluation
    lacking = f"{folder}: no evaluation.parquet there"
    try:
        if evaluation or (folder / "evaluation.parquet").is_file():
            videos = Videos(folder)
            check_same(asked, videos)
            return videos.scores(), videos.rewards, lacking
    except ValueError as error:  # what people said does not depend on videos that are gone since
        if evaluation:
            raise
        lacking = str(error)
    return {}, {}, lacking


def _database(file: Path) -> Path:
    return file / "study.sqlite" if file.is_dir() else file


def _answered(file: Path, without: str | None) -> tuple["Store", "Study", list["Answer"]]:
    """Returns the study's store, its questions, and its answers without those of some annotators."""
    from rlvid.study.store import Store

    store = Store(_database(file))
    asked = store.study()
    left_out, people = _names(without, "--without"), store.annotators()
    for name in left_out:
        if name not in people:
            raise ValueError(f"--without {name!r}: nobody of that name has answered; there: {', '.join(people) or '-'}")
    answers = [answer for answer in store.answers() if answer.annotator not in left_out]
    if not answers:
        raise ValueError(f"{store.path}: nobody has answered anything yet")
    return store, asked, answers
