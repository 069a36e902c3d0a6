"""Signals and errors at the end of a command: one line, the right exit code, nobody left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

import rlvid.__main__ as program
from rlvid.faults import describe, one_line

HEAD = """
import os, signal, subprocess, sys, time
from rlvid import interrupt
from rlvid.interrupt import kept, starting_ray
from rlvid.terminal import console, run_command, say
def end(run):
    sys.exit(run_command(run))
def wait():
    say("ready")
    sys.stdout.flush()
    time.sleep(60)
"""
WAITS = """
def run():
    with kept("all is lost"), kept(lambda: "two of three are in OUT"):
        wait()
end(run)
"""


def start(tmp_path: Path, body: str, **options: object) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a terminal starts it."""
    script = tmp_path / "a script.py"
    script.write_text(HEAD + textwrap.dedent(body))
    # As in a terminal: what a script starts with & ignores Ctrl-C, and nohup ignores SIGHUP.
    command = ["env", "--default-signal=INT,HUP", sys.executable, str(script), "an argument", "key=a;b"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]


def until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_says_what_it_keeps_and_how_to_continue(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, WAITS)
    until_ready(process)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    (line,) = error.splitlines()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    command = f"python '{tmp_path}/a script.py' 'an argument' 'key=a;b'"
    assert line == f"interrupted ({name}): two of three are in OUT; continue: {command}"


def test_the_second_signal_ends_at_once_and_takes_children_along(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        """
        def run():
            child = subprocess.Popen(["sleep", "60"], start_new_session=True)
            say(str(child.pid))
            try:
                wait()
            finally:
                wait()
        end(run)
        """,
    )
    assert process.stdout
    child = int(process.stdout.readline())
    until_ready(process)
    process.terminate()
    until_ready(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(error.splitlines()) == 1
    assert "ended at once; continue: python" in error
    deadline = time.monotonic() + 10
    while "sleep" in Path(f"/proc/{child}/cmdline").read_text() if Path(f"/proc/{child}").exists() else False:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("def run():\n    os.kill(os.getpid(), 15)\n    raise KeyError", 143, "interrupted (SIGTERM): nothing was"),
        (
            "def run():\n    try:\n        os.kill(os.getpid(), 1)\n    finally:\n        raise ValueError",
            129,
            "interrupted (SIGHUP)",
        ),
        (  # as Ray's own handler does, while it starts
            "def run():\n    with kept('all of it'), starting_ray():\n        sys.exit(15)",
            143,
            "interrupted (SIGTERM): all of it",
        ),
        ("def run():\n    raise KeyboardInterrupt", 130, "interrupted (Ctrl-C)"),
        ("def run():\n    raise ValueError('a\\n  b')", 2, "error: a b"),
        ("def run():\n    raise RuntimeError", 1, "error: RuntimeError"),
        ("def run():\n    raise MemoryError", 1, "error: MemoryError"),
        ("def run():\n    raise Exception('Ray: no start')", 1, "error: Ray: no start"),
        ("def run():\n    open('/nowhere')", 2, "error: [Errno 2] No such file or directory: '/nowhere'"),
    ],
)
def test_whatever_ends_a_command_is_one_line(tmp_path: Path, body: str, code: int, words: str) -> None:
    process = start(tmp_path, body + "\nend(run)\n")
    _, error = process.communicate(timeout=20)
    assert (process.returncode, len(error.splitlines())) == (code, 1), error
    assert words in error


def test_interrupted_training_waits_for_the_workers_and_not_for_ever(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        """
        import threading
        from rlvid.train import fit
        stop = threading.Event()
        def request_end(progress):
            if not progress:
                stop.set()
            return True
        fit._request_end = request_end
        def train():
            say("ready")
            sys.stdout.flush()
            stop.wait(60)
            time.sleep(1)
            say("saved")
        def run():
            with kept("step 7"):
                fit.run_fit(train, "busy", 0.3, console)
        def quick():
            interrupt.SECONDS_TO_END = 0.5
            with kept("step 8"):
                fit.run_fit(train, "", 60, console)
        code = run_command(run)
        print(code, interrupt.line(), file=sys.stderr)
        interrupt.unlisten()
        sys.exit(run_command(quick))
        """,
    )
    until_ready(process)
    process.terminate()
    assert process.stdout
    assert "the workers have 0.3 s to finish the step" in process.stdout.readline()
    until_ready(process)
    process.terminate()
    out, error = process.communicate(timeout=20)
    assert "saved" in out
    assert process.returncode == 143
    assert [line.partition(";")[0].split(": ")[1] for line in error.splitlines()] == ["step 7", "step 7", "step 8"]


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    process = start(tmp_path, "signal.signal(1, signal.SIG_IGN)\n" + WAITS)
    until_ready(process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_an_interruption_that_is_swallowed_ends_the_command_all_the_same(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        """
        interrupt.SECONDS_TO_END = 0.5
        def run():
            try:
                wait()
            except KeyboardInterrupt:
                time.sleep(60)
        end(run)
        """,
    )
    until_ready(process)
    process.terminate()
    _, error = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "continue" in error


def test_a_signal_after_the_end_cuts_short_what_libraries_do_at_exit(tmp_path: Path) -> None:
    process = start(tmp_path, "import atexit\natexit.register(wait)\nend(lambda: 0)\n")
    until_ready(process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 130


def test_output_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    much = "def run():\n    for n in range(100_000):\n        say(str(n))\nend(run)\n"
    process = start(tmp_path, much)
    assert process.stdout
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait() == 1
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = start(tmp_path, "def run():\n    sys.stdout.write('a')\nend(run)\n", stdout=full)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (2, "error: [Errno 28] No space left on device\n")


def test_a_terminal_without_a_letter_costs_the_letter(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start(tmp_path, "end(lambda: say('2 × 2'))\n", env=environment)
    assert process.communicate(timeout=20) == ("2 \\xd7 2\n", "")


def test_an_interruption_while_the_command_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "rlvid.cli", Slow("rlvid.cli"))
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 130


def test_an_error_is_its_cause_in_one_line() -> None:
    def raised(error: BaseException) -> BaseException:
        try:
            raise error
        except BaseException as caught:
            return caught

    assert one_line(ValueError("first\n\n   second")) == "first second"
    assert one_line(KeyError()) == "KeyError"
    remote = (
        "\x1b[36mray::f()\x1b[39m\nTraceback (most recent call last):\n  File 'a', line 1\n    f()\nValueError: a\nb"
    )
    assert one_line(RuntimeError(remote)) == "ValueError: a b"
    assert describe(raised(ValueError("plain"))) == "plain"
    assert describe(raised(ZeroDivisionError("by zero"))) == "ZeroDivisionError: by zero"
    assert describe(raised(AssertionError())).startswith("AssertionError at test_interrupt.py:")


def test_every_program_beside_the_package_ends_as_its_commands_do() -> None:
    root = Path(program.__file__).parents[1]
    programs = [path for folder in ("jobs", "tuning", "tests/faults") for path in (root / folder).rglob("*.py")]
    programs = [path for path in programs if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    assert len(programs) >= 6
    for path in programs:
        text = path.read_text(encoding="utf-8")
        assert "run_command(" in text or "from rlvid.cli import main" in text, path
