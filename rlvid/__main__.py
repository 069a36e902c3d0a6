"""The command as a program: listens for signals before anything that takes time is imported."""

from rlvid import interrupt


def main() -> None:
    """Runs the command, see ``rlvid.cli.main``."""
    interrupt.listen()
    try:
        from rlvid.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(interrupt.exit_code()) from None
    run()


if __name__ == "__main__":
    main()
