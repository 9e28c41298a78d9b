"""What all command lines share: exit codes, lines, signals, streams, home folders; the list of commands."""

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import fastprune
from fastprune.cli import prepare, reproduce, store
from fastprune.cli.__main__ import COMMANDS
from fastprune.cli.command import BAD_INPUT, DONE, FAILED, INTERRUPTED, Parser, expanded, run_command, to_path
from fastprune.console import bf16_advice, progress_bar
from fastprune.errors import InputError


@pytest.fixture(autouse=True)
def _handlers_stay():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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


class Finalized:
    """Runs `then` in its finalizer, where Python ignores exceptions."""

    def __init__(self, then):
        self.then = then

    def __del__(self):
        self.then()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["finalizer", "callback of a weakref"])
def test_an_interrupt_that_python_ignores_is_raised_again(number, where, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hook, began = sys.unraisablehook, time.monotonic()

    def work() -> int:
        if where == "finalizer":
            Finalized(lambda: signal.raise_signal(number))
        else:
            gone = Finalized(lambda: None)
            called = weakref.ref(gone, lambda _: signal.raise_signal(number))
            del gone
            assert called() is None
        threading.Event().wait(30)
        return DONE

    assert run_command("x.py", work) == INTERRUPTED
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err == "x.py: interrupted\n"
    assert sys.unraisablehook is hook


def test_an_interrupt_that_comes_as_the_work_ends_changes_nothing(capsys):
    assert run_command("x.py", lambda: Finalized(lambda: signal.raise_signal(signal.SIGTERM)) and 0) == DONE
    time.sleep(0.2)  # longer than it takes to raise one again
    assert capsys.readouterr().err == ""


def test_what_else_a_finalizer_raises_is_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: shown.append(what.exc_type))
    assert run_command("x.py", lambda: Finalized(lambda: 1 // 0) and 0) == DONE
    assert shown == [ZeroDivisionError]


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


# Home folders


def test_a_leading_tilde_is_the_home_folder_and_nothing_else_changes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cases = {"~": "/home/me", "~/x y": "/home/me/x y", "a/~": "a/~", "./~": "./~", "a~b": "a~b", "": "", "/~/x": "/~/x"}
    assert {text: expanded(text) for text in cases} == cases
    assert expanded("~no-such-user/x") == "~no-such-user/x"  # as a shell does
    assert {text: to_path(text) for text in cases} == {text: Path(path) for text, path in cases.items()}


@pytest.mark.parametrize(
    ("module", "command", "paths"),
    [
        (reproduce, ["--fig", "A2"], ["--out", "--store", "--data", "--miniplaces"]),
        (prepare, [], ["--source", "--out"]),
        (store, ["ls"], ["--store"]),
        (store, ["verify", "~/f"], ["--store"]),
        (store, ["export", "~/f"], ["--store"]),
        (store, ["merge", "~/f"], ["--store"]),
    ],
)
def test_every_path_of_a_command_may_begin_with_a_tilde(module, command, paths, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = vars(module.parser().parse_args([*command, *(f"{flag}=~/d" for flag in paths)]))
    assert {str(args[flag[2:]]) for flag in paths} == {"/home/me/d"}
    if "~/f" in command:
        assert args["source" if command[0] == "merge" else "file"] == Path("/home/me/f")


def test_a_figure_module_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = reproduce.parser().parse_args(["--fig", "A2", "--figure-module=~/mine.py", "--figure-module", "mine"])
    assert args.figure_module == ["/home/me/mine.py", "mine"]


def test_a_home_folder_is_where_the_data_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reproduce.main(["--fig", "A2", "--plan", "--data=~/missing", "--store=~/none"]) == BAD_INPUT
    assert capsys.readouterr().err == f"reproduce.py: no such data folder: {tmp_path}/missing\n"
    assert prepare.main(["--source=~/missing", "--out=~/out"]) == BAD_INPUT
    assert capsys.readouterr().err == f"prepare.py: no such data folder: {tmp_path}/missing\n"
    assert store.main(["ls", "--store=~/missing"]) == BAD_INPUT
    assert f"{tmp_path}/missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# python -m


def python_m(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["fastprune", "fastprune.cli"])
def test_python_m_lists_the_commands(name):
    bare, asked = python_m(name), python_m(name, "--help")
    assert (bare.returncode, bare.stdout) == (BAD_INPUT, "")
    assert (asked.returncode, asked.stderr) == (DONE, "")
    assert bare.stderr == asked.stdout
    assert all(f"  {command} " in asked.stdout for command in COMMANDS)
    wrong = python_m(name, "nothing", "--help")
    assert (wrong.returncode, wrong.stdout) == (BAD_INPUT, "")
    names = ", ".join(COMMANDS)
    assert wrong.stderr == f"fastprune: unknown command 'nothing': choose one of {names}\n"


def test_the_version_is_a_line_with_those_of_what_matters():
    done = python_m("fastprune", "--version")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout.startswith(f"fastprune {fastprune.__version__}, Python {platform.python_version()}, torch ")
    assert done.stdout.count("\n") == 1
    assert re.search(r", (ffcv \d|no ffcv)", done.stdout)


def test_every_script_is_a_command():
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    assert set(COMMANDS) == {path.stem for path in scripts.glob("*.py")}


@pytest.mark.parametrize("command", COMMANDS)
def test_python_m_starts_each_command_with_its_arguments(command):
    done = python_m("fastprune", command, "--no-such-flag")
    assert (done.returncode, done.stdout) == (BAD_INPUT, "")
    assert done.stderr.startswith(f"{command}.py: ")
    assert done.stderr.count("\n") == 1
    assert python_m("fastprune.cli", command, "--help").stdout.startswith(f"usage: {command}.py")


def test_python_m_plans_a_figure(tmp_path):
    done = python_m("fastprune", "reproduce", "--fig", "A2", "--plan", "--store", str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout.startswith("Figure A2, preset smoke: ")


@pytest.mark.parametrize(
    ("content", "slow"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx2\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),  # ARM: unknown
        ("", False),
        (None, False),  # no Linux
    ],
)
def test_bf16_is_advised_against_only_where_it_is_known_to_be_slow(tmp_path, content, slow):
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    line = bf16_advice("add --precision fp32", path)
    assert line.endswith("computes sparsely: add --precision fp32") if slow else line == ""
