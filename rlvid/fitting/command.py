"""`rlvid reward`: fits rewards to preference pairs; heavy modules are imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from rlvid.terminal import console, say, shell, short

reward = typer.Typer(
    no_args_is_help=True,
    help="""Makes a reward from people's votes.

[bold]rlvid reward fit PAIRS --out FOLDER[/bold] fits one; [bold]rlvid train ... reward.name=fitted
reward.path=FOLDER[/bold] trains with it.""",
)


@reward.callback()
def options() -> None:
    """Makes a reward from people's votes."""


@reward.command()
def fit(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="What rlvid study export wrote, a folder NAME.parquet of such files, or a table (.csv, .tsv, .jsonl, "
            ".parquet) with the columns prompt, a, b (files of images or videos), preference (1 for a, 0 for b, 0.5 "
            "for a tie), and where it has them axis, annotator, kind, a_model, b_model."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as kind=video steps=200."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the reward, to be made.")] = "reward",
    outside: Annotated[
        bool, typer.Option("--outside", help="Let the table name files outside its own folder.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster; default: RAY_ADDRESS, else Ray on this machine.")
    ] = None,
) -> None:
    """Fits a reward to preference pairs, and says how well it agrees with votes that it has not seen.

    After an interruption, start the same command again: it goes on from its last checkpoint, with the same result.
    """
    from rlvid.config.fit import load_fit
    from rlvid.fitting.launch import fit_reward
    from rlvid.fitting.report import show_report

    report, folder = fit_reward(load_fit(overrides or []), pairs, out, console, address, outside), Path(out).absolute()
    if report is None:
        say(f"{short(folder)} is there already, fitted on these pairs with these settings")
    else:
        show_report(report, console)
        say(f"took         {report.seconds:.0f} s")
    say(f"reward       {short(folder)} (README.md, report.json, calibration.png)")
    say(f"next         rlvid train toy reward.name=fitted reward.path={shell(folder)}")
