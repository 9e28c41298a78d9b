"""What all command lines share: exit codes, lines, signals, streams."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastprune.cli.command import BAD_INPUT, DONE, FAILED, INTERRUPTED, Parser, run_command
from fastprune.console import progress_bar
from fastprune.errors import InputError


@pytest.fixture(autouse=True)
def _handlers_stay():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a is b:\n  c"), BAD_INPUT, "x.py: a is b: c"),
        (InputError("file \x1b[2Jname"), BAD_INPUT, "x.py: file ?[2Jname"),
        (PermissionError(13, "Permission denied", "/f"), BAD_INPUT, "x.py: /f: Permission denied"),
        (KeyboardInterrupt(), INTERRUPTED, "x.py: interrupted: go on"),
        (KeyboardInterrupt("other"), INTERRUPTED, "x.py: interrupted: other"),
    ],
)
def test_what_ends_it_is_one_line_and_a_code(error, code, line, capsys):
    assert run_command("x.py", raising(error), "go on") == code
    assert capsys.readouterr() == ("", line + "\n")


def test_its_own_code_is_returned_and_a_defect_is_not_hidden():
    assert [run_command("x.py", lambda code=code: code) for code in (DONE, FAILED)] == [DONE, FAILED]
    with pytest.raises(ZeroDivisionError):
        run_command("x.py", raising(ZeroDivisionError()))


def test_bad_usage_is_bad_input(capsys):
    assert run_command("x.py", lambda: bool(Parser().parse_args(["--no"]))) == BAD_INPUT
    assert capsys.readouterr().err == "x.py: unrecognized arguments: --no (see --help)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_schedulers_and_closed_terminals_send_interrupts(number, capsys):
    signal.signal(number, signal.SIG_DFL)
    assert run_command("x.py", lambda: os.kill(os.getpid(), number) or 0) == INTERRUPTED
    assert capsys.readouterr().err == "x.py: interrupted\n"


def test_under_nohup_a_closed_terminal_is_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_command("x.py", lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == DONE


def child(code: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; from fastprune.cli.command import *; sys.exit(run_command('x.py', {code}))",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def test_an_output_that_lacks_a_character_shows_a_mark():
    out, err = child("lambda: print('0.5 ± 0.1')", PYTHONIOENCODING="ascii").communicate(timeout=60)
    assert (out, err) == (b"0.5 ? 0.1\n", b"")


def test_a_reader_who_has_seen_enough_ends_it_in_peace():
    with child("lambda: [print(i) for i in range(10**6)] and 0") as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 0)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_on_a_terminal_for_what_takes_longer(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar("verify", 3, " nodes", iter("abc")) as bar:
        assert [(item, time.sleep(0.15)) for item in bar] == [("a", None), ("b", None), ("c", None)]
    shown = capsys.readouterr().err
    assert ("verify: " in shown and "/3 " in shown) if terminal else shown == ""


def test_what_is_quick_shows_no_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("import", 100, "B") as bar:
        bar.update(100)
    assert capsys.readouterr().err == ""
