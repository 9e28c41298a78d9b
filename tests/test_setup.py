"""scripts/setup.sh on machines that lack this or that: every outside program is a fake on a PATH of its own."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "bash cat cksum cp dirname env find flock mkdir mv rm rmdir sed sh true".split()

# Answers the probe from the file PROBE; makes an environment whose python is itself; fails where FAIL says so.
PYTHON = """#!/bin/sh
case "$*" in
*sysconfig*) echo "$0"; cat "$PROBE"; exit ;;
esac
echo "python $*" >> "$CALLS"
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
case "${FAIL:-nothing} $*" in
"index -c "*urlopen*) exit 1 ;;
"kill -m uv "*) kill -9 $PPID ;;
"uv -m uv "*) exit 1 ;;
"build "*ffcv]*) echo "no OpenCV"; exit 1 ;;
"import -c import ffcv") exit 1 ;;
esac
"""
LOGS = '#!/bin/sh\necho "${0##*/} $*" >> "$CALLS"\n'


def probe(version: str = "3.11", *, modern: int = 1, in_usr: int = 1, headers: int = 1, venv: int = 1) -> str:
    return f"{version}\n{modern}\n{in_usr}\n{headers}\n{venv}\n"


@dataclass(frozen=True)
class Machine:
    """A checkout and the programs that it sees. As made: root, apt-get, and all that FFCV compiles against."""

    repo: Path
    bin: Path

    def has(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def lacks(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def python_says(self, answer: str) -> None:
        (self.bin / "probe").write_text(answer)

    def setup(self, *arguments: str, **env: str) -> tuple[int, list[str]]:
        """Exit code and the lines on stderr. `calls()` then tells what was run."""
        calls = self.bin / "calls"
        calls.write_text("")
        base = {"PATH": str(self.bin), "CALLS": str(calls), "PROBE": str(self.bin / "probe")}
        command = [str(self.repo / "scripts/setup.sh"), *arguments]
        done = subprocess.run(command, env=base | env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr.splitlines()

    def calls(self, program: str = "") -> list[str]:
        return [call for call in (self.bin / "calls").read_text().splitlines() if call.startswith(program)]

    def has_ffcv(self) -> bool:
        return (self.repo / ".venv/.fastprune-setup").read_text().splitlines()[3] == "yes"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "repo", tmp_path / "bin")
    (made.repo / "scripts").mkdir(parents=True)
    made.bin.mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, made.repo / name)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (made.bin / tool).symlink_to(found)
    made.has("id", "#!/bin/sh\necho 0\n")
    made.has("python3", PYTHON)
    made.python_says(probe())
    for name in ("apt-get", "g++"):
        made.has(name, LOGS)
    made.has("pkg-config", "#!/bin/sh\nexit 0\n")
    return made


def one(lines: list[str], part: str) -> str:
    found = [line for line in lines if part in line]
    assert len(found) == 1, lines
    assert found[0].startswith("setup: ")
    return found[0]


def test_second_call_does_nothing(machine: Machine) -> None:
    code, lines = machine.setup()
    assert code == 0
    assert lines[-1] == "setup: .venv is complete"
    assert machine.has_ffcv()
    installs = machine.calls("python -m uv pip install")
    assert len(installs) == 2
    assert all("-c constraints.txt --build-constraints constraints.txt -e .[dev" in call for call in installs)
    assert machine.calls("apt-get") == []
    assert machine.setup() == (0, [])
    assert machine.calls() == []


def test_plan_says_what_would_be_installed_and_installs_nothing(machine: Machine) -> None:
    machine.lacks("g++", "pkg-config")
    machine.python_says(probe(headers=0, venv=0))
    code, lines = machine.setup("--plan")
    assert code == 0
    names = "python3.11-venv g++ pkg-config libopencv-dev libturbojpeg0-dev python3.11-dev"
    assert one(lines, "system packages").endswith(f": {names}")
    assert "Python packages" in one(lines, ".venv")
    assert machine.calls() == []
    assert not (machine.repo / ".venv").exists()


def test_plan_of_a_complete_environment(machine: Machine) -> None:
    machine.setup()
    assert machine.setup("--plan") == (0, ["setup: nothing to do: .venv is complete"])


@pytest.mark.parametrize("sudo", [False, True], ids=["root", "sudo"])
def test_says_and_installs_missing_system_packages(machine: Machine, sudo: bool) -> None:
    if sudo:
        machine.has("id", "#!/bin/sh\necho 1000\n")
        machine.has("sudo", '#!/bin/sh\n[ "$1" = -n ] && shift && exec "$@"\n')
    machine.lacks("g++")
    code, lines = machine.setup()
    assert code == 0
    assert one(lines, "system packages").endswith(": g++")
    update, install = machine.calls("apt-get")
    assert update.endswith(" update")
    assert install.endswith(" install --no-install-recommends g++")
    assert machine.has_ffcv()


@pytest.mark.parametrize("reason", ["SYSTEM=0", "there is no apt-get here", "not root"])
def test_goes_on_without_ffcv_and_adds_it_once_it_can(machine: Machine, reason: str) -> None:
    machine.lacks("g++")
    env = {}
    if reason == "SYSTEM=0":
        env = {"SYSTEM": "0"}
    elif reason == "not root":
        machine.has("id", "#!/bin/sh\necho 1000\n")
        machine.has("sudo", "#!/bin/sh\nexit 1\n")
    else:
        machine.lacks("apt-get")
    code, lines = machine.setup(**env)
    assert code == 0
    line = one(lines, "going on without FFCV")
    assert reason in line
    assert "packages are missing" in line
    assert line.endswith(": g++")
    assert lines[-1] == "setup: .venv is complete"
    assert machine.calls("apt-get") == []
    assert [call for call in machine.calls() if "ffcv" in call] == []
    assert not machine.has_ffcv()

    assert machine.setup(**env) == (0, [])
    machine.has("g++", LOGS)
    assert machine.setup(**env)[0] == 0
    assert machine.has_ffcv()
    assert machine.calls("python -m venv") == []


def test_python_without_headers_that_no_package_brings(machine: Machine) -> None:
    machine.python_says(probe(in_usr=0, headers=0))
    code, lines = machine.setup()
    assert code == 0
    assert "has no Python.h" in one(lines, "going on without FFCV")
    assert machine.calls("apt-get") == []


@pytest.mark.parametrize("failure", ["build", "import"])
def test_ffcv_that_does_not_build_leaves_a_log_and_no_half(machine: Machine, failure: str) -> None:
    code, lines = machine.setup(FAIL=failure)
    assert code == 0
    assert ".venv/ffcv-build.log" in one(lines, "going on without FFCV")
    assert (machine.repo / ".venv/ffcv-build.log").exists()
    assert machine.calls("python -m uv pip uninstall")
    assert not machine.has_ffcv()
    assert machine.setup(FAIL=failure) == (0, [])


def test_apt_that_fails(machine: Machine) -> None:
    machine.lacks("g++")
    machine.has("apt-get", "#!/bin/sh\necho E: no such package\nexit 100\n")
    code, lines = machine.setup()
    assert code == 0
    assert "apt-get failed, see .venv/apt.log" in one(lines, "going on without FFCV")
    assert "no such package" in (machine.repo / ".venv/apt.log").read_text()
    assert [call for call in machine.calls() if "ffcv" in call] == []
    assert machine.setup() == (0, [])


@pytest.mark.parametrize(
    ("answer", "env", "message"),
    [
        (probe("3.10", modern=0), {}, "no Python 3.11 or newer was found (python3 here is 3.10)"),
        (probe("3.10", modern=0), {"PYTHON": "python3"}, "PYTHON=python3 is Python 3.10"),
        (probe(), {"PYTHON": "python3.99"}, "PYTHON=python3.99 does not run"),
        ("", {}, "no Python 3.11 or newer was found: install one"),
        (probe(venv=0), {"SYSTEM": "0"}, "install the package python3.11-venv first"),
        (probe(venv=0, in_usr=0), {}, "has no venv module: give another Python"),
        (probe(), {"SYSTEM": "no"}, "SYSTEM is 'no'"),
        (probe(), {"TORCH": "CPU!"}, "TORCH is 'CPU!'"),
    ],
)
def test_what_cannot_go_on_is_one_line_and_code_2(
    machine: Machine, answer: str, env: dict[str, str], message: str
) -> None:
    machine.python_says(answer)
    code, lines = machine.setup(**env)
    assert code == 2
    assert len(lines) == 1
    assert message in one(lines, "setup: error: ")
    assert not (machine.repo / ".venv").exists()


def test_unknown_argument(machine: Machine) -> None:
    code, lines = machine.setup("--plam")
    assert code == 2
    assert "unknown argument '--plam'" in one(lines, "error")


def test_takes_the_first_python_that_is_new_enough(machine: Machine) -> None:
    machine.has("python3", f"#!/bin/sh\nprintf '%s' '{machine.bin}/python3\n{probe('3.9', modern=0)}'\n")
    machine.has("python3.12", PYTHON)
    machine.python_says(probe("3.12"))
    code, lines = machine.setup("--plan")
    assert code == 0
    assert "bin/python3.12 (3.12)" in one(lines, "Python packages")


@pytest.mark.parametrize("failure", ["kill", "uv"])
def test_interrupted_set_up_is_completed_by_the_next_call(machine: Machine, failure: str) -> None:
    assert machine.setup(FAIL=failure)[0] == {"kill": -9, "uv": 2}[failure]
    half = machine.repo / ".venv/half"
    half.touch()
    code, lines = machine.setup()
    assert (code, lines[-1]) == (0, "setup: .venv is complete")
    assert not half.exists()


def test_environment_that_others_made_is_left_alone(machine: Machine) -> None:
    theirs = machine.repo / ".venv/bin/python"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    code, lines = machine.setup()
    assert code == 2
    assert "was not made by scripts/setup.sh" in one(lines, "error")
    assert theirs.exists()


def test_changed_requirements_are_installed_in_place(machine: Machine) -> None:
    machine.setup()
    with (machine.repo / "constraints.txt").open("a") as file:
        file.write("extra==1\n")
    assert machine.setup()[1][-1] == "setup: .venv is complete"
    assert machine.calls("python -m venv") == []
    assert machine.calls("python -m uv pip install")
    assert machine.setup() == (0, [])


def test_another_python_makes_the_environment_anew_and_stays(machine: Machine) -> None:
    machine.setup()
    machine.has("python3.12", PYTHON)
    machine.python_says(probe("3.12"))
    assert machine.setup(PYTHON="python3.12")[1][-1] == "setup: .venv is complete"
    assert machine.calls("python -m venv")
    assert machine.setup(PYTHON="python3.12") == (0, [])
    machine.python_says(probe())
    assert machine.setup() == (0, [])


def test_a_build_of_torch_for_cpus_and_it_stays(machine: Machine) -> None:
    code, lines = machine.setup(TORCH="cpu")
    assert code == 0
    assert "(about 3 GB): fastprune, torch" in one(lines, "Python packages")
    assert "(cpu)" in one(lines, "Python packages")
    installs = machine.calls("python -m uv pip install")
    assert len(installs) == 2
    assert all(" --torch-backend cpu -c constraints.txt" in call for call in installs)
    assert machine.setup() == machine.setup(TORCH="cpu") == (0, [])
    with (machine.repo / "constraints.txt").open("a") as file:
        file.write("extra==1\n")
    assert machine.setup()[0] == 0
    assert all(" --torch-backend cpu " in call for call in machine.calls("python -m uv pip install"))
    assert machine.calls("python -m venv") == []


def test_another_build_of_torch_makes_the_environment_anew(machine: Machine) -> None:
    machine.setup()
    assert machine.setup(TORCH="cpu")[0] == 0
    assert machine.calls("python -m venv")
    assert machine.setup(TORCH="cu130")[0] == 0
    assert machine.calls("python -m venv")


def test_an_index_that_cannot_be_reached_is_one_line_and_changes_nothing(machine: Machine) -> None:
    machine.setup()
    code, lines = machine.setup(TORCH="cpu", FAIL="index")
    assert code == 2
    assert "cannot be reached from here: leave TORCH out" in one(lines, "error")
    assert machine.setup() == (0, [])
