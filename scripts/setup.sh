#!/usr/bin/env bash
# Makes .venv complete: the system packages that FFCV compiles against, then fastprune, at the versions of constraints.txt.
set -euo pipefail

usage='usage: scripts/setup.sh [--plan]

Makes .venv, or completes it; does nothing where it is complete already.

  --plan     say what would be installed, and install nothing

  PYTHON=... the Python to use (default: the first of python3, python3.13, python3.12, python3.11 that is new enough)
  TORCH=cpu  take a build of torch from the index of PyTorch: cpu (a tenth of the download), cu130 or another name that
             uv has for --torch-backend (default: the build of PyPI, or that of the last call)
  SYSTEM=0   install no system packages'

venv=.venv
stamp=$venv/.fastprune-setup # first line: unfinished or complete; it also marks the folder as ours to replace
declare -r oldest=3.11

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "error: $*" && exit 2; }
have() { command -v "$1" >/dev/null 2>&1; }

plan_only=0
case "${1-}" in
'') ;;
--plan) plan_only=1 ;;
-h | --help) echo "$usage" && exit 0 ;;
*) die "unknown argument '$1': the only one is --plan" ;;
esac
case "${SYSTEM:=1}" in 0 | 1) ;; *) die "SYSTEM is '$SYSTEM': give 1 (install system packages) or 0 (install none)" ;; esac
[[ ${TORCH-} =~ ^[a-z0-9.]*$ ]] || die "TORCH is '$TORCH': give cpu, auto, or a version of CUDA such as cu130"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Two calls at a time take turns. The lock is on the folder itself, and leaves no file behind.
if have flock; then
    exec 9<.
    flock 9
fi

# ---- the Python to use ----------------------------------------------------------------------------------------------

# Sets exe, version, modern, in_usr, headers and venv_module from what the given Python says of itself.
probe() {
    local answer
    have "$1" && answer=$("$1" -c '
import importlib.util, os, sys, sysconfig
print(sys.executable)
print("%d.%d" % sys.version_info[:2])
print(int(sys.version_info >= tuple(map(int, sys.argv[1].split(".")))))
print(int(sys.base_prefix == "/usr"))
print(int(os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))))
print(int(bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"))))
' "$oldest" 2>/dev/null) || return 1
    { read -r exe && read -r version && read -r modern && read -r in_usr && read -r headers && read -r venv_module; } \
        <<<"$answer"
}

# The stamp, if it is of a complete environment: old_inputs, old_exe, old_ffcv, old_torch (empty: PyPI's build).
old_inputs='' old_exe='' old_ffcv='' old_torch=''
if [[ -x $venv/bin/python && -f $stamp ]]; then
    {
        read -r state && [[ $state == complete ]] && read -r old_inputs && read -r old_exe && read -r old_ffcv &&
            { read -r old_torch || true; } # a stamp of before has none
    } <"$stamp" || old_inputs=''
fi
torch=${TORCH:-$old_torch}
inputs="$PWD $(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)"
[[ -z ${PYTHON-} && $inputs == "$old_inputs" && $torch == "$old_torch" && $old_ffcv == yes && $plan_only == 0 ]] && exit 0

if [[ -n ${PYTHON-} ]]; then
    probe "$PYTHON" || die "PYTHON=$PYTHON does not run: give the name or the path of a Python $oldest or newer"
    ((modern)) || die "PYTHON=$PYTHON is Python $version: fastprune needs $oldest or newer"
else
    found=''
    for name in ${old_inputs:+"$old_exe"} python3 python3.13 python3.12 python3.11; do
        probe "$name" || continue
        ((modern)) && break
        found=" (python3 here is $version)"
        modern=0
    done
    ((${modern-0})) || die "no Python $oldest or newer was found$found: install one, or give its path as PYTHON=..."
fi

# ---- what is missing, and whether it can be had -----------------------------------------------------------------------

# Empty, or why apt-get cannot be used; sets as_root.
no_apt=''
as_root=''
check_apt() {
    if [[ $SYSTEM == 0 ]]; then
        no_apt='SYSTEM=0'
    elif ! have apt-get; then
        no_apt='there is no apt-get here'
    elif [[ $(id -u) != 0 ]]; then
        as_root='sudo -n'
        { have sudo && sudo -n true 2>/dev/null; } || no_apt='not root, and sudo does not work without a password'
    fi
}

need_venv='' # a system package without which there is no environment
need=''      # system packages without which there is no FFCV
cannot=''    # why FFCV cannot be had
((venv_module)) || need_venv="python$version-venv"
have g++ || need+=' g++'
have pkg-config || need+=' pkg-config'
pkg-config --exists opencv4 2>/dev/null || need+=' libopencv-dev'
pkg-config --exists libturbojpeg 2>/dev/null || need+=' libturbojpeg0-dev'
if ! ((headers)); then
    if ((in_usr)); then need+=" python$version-dev"; else cannot="$exe has no Python.h"; fi
fi
need=${need# }
[[ -z $need_venv$need ]] || check_apt

if ! ((venv_module)); then
    ((in_usr)) || die "$exe has no venv module: give another Python as PYTHON=..."
    [[ -z $no_apt ]] || die "$exe has no venv module, and $no_apt: install the package $need_venv first"
fi
if [[ -z $cannot && -n $need && -n $no_apt ]]; then
    cannot="$no_apt, and packages are missing (the next call adds FFCV if you install them): $need"
fi
[[ -z $cannot ]] || need=''

# Complete: the same inputs and Python, and FFCV is in, failed to build, or still cannot be had.
if [[ $inputs == "$old_inputs" && $exe == "$old_exe" && $torch == "$old_torch" && ($old_ffcv != no || -n $cannot) ]]; then
    if ((plan_only)); then say "nothing to do: $venv is complete"; fi
    exit 0
fi

# ---- say it -----------------------------------------------------------------------------------------------------------

to_apt="$need_venv $need"
to_apt=${to_apt# }
[[ -z ${to_apt// /} ]] ||
    say "system packages to install with apt-get (up to 1.6 GB; SYSTEM=0 installs none): $to_apt"
size='about 6 GB'
[[ $torch != cpu ]] || size='about 3 GB'
say "Python packages to install in $venv, from constraints.txt ($size): fastprune, torch $(
    sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt
)${torch:+ ($torch)}, its other dependencies and the development tools, with $exe ($version)"
[[ -z $cannot ]] || say "going on without FFCV, with the portable loader: $cannot"
((plan_only)) && exit 0

# ---- do it ------------------------------------------------------------------------------------------------------------

# Before anything is deleted or installed.
if [[ -n $torch && $torch != "$old_torch" ]]; then
    index=https://download.pytorch.org/whl/cpu/torch/
    "$exe" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)' "$index" 2>/dev/null ||
        die "TORCH=$torch takes torch from $index, which cannot be reached from here: leave TORCH out for PyPI's build"
fi
# An environment that is not complete, or is of another Python or build of torch, is made anew; only one that we made is
# deleted.
if [[ -e $venv && ! -f $stamp ]]; then
    rmdir "$venv" 2>/dev/null || die "$PWD/$venv was not made by scripts/setup.sh: move it away or delete it"
fi
if [[ -d $venv && (-z $old_inputs || $exe != "$old_exe" || $torch != "$old_torch") ]]; then
    find "$venv" -mindepth 1 -maxdepth 1 ! -name "${stamp##*/}" -exec rm -rf {} +
fi
mkdir -p "$venv"
echo unfinished >"$stamp"

apt_install() {
    local apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -o DPkg::Lock::Timeout=300"
    # One unreachable source among many makes the update fail: what counts is whether the packages can be installed.
    { $apt update || true; } >>"$venv/apt.log" 2>&1 </dev/null
    $apt install --no-install-recommends "$@" >>"$venv/apt.log" 2>&1 </dev/null
}
if [[ -n $need_venv ]]; then
    apt_install "$need_venv" || die "apt-get could not install $need_venv: see $venv/apt.log"
fi
ffcv=yes
if [[ -n $cannot ]]; then
    ffcv=no
elif [[ -n $need ]]; then
    # shellcheck disable=SC2086 # a list of names
    apt_install $need || {
        say "going on without FFCV, with the portable loader: apt-get failed, see $venv/apt.log ('make clean setup' tries again)"
        ffcv=failed
    }
fi

python=$venv/bin/python
[[ -x $python ]] || "$exe" -m venv "$venv" || die "$exe could not make $venv"
# uv, because it takes torch and torchvision from one place: pip can pick builds of the two that do not fit each other.
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv ||
    die "pip could not install uv in $venv (its message is above)"
uv_install() {
    "$python" -m uv pip install --python "$python" ${torch:+--torch-backend "$torch"} \
        -c constraints.txt --build-constraints constraints.txt "$@"
}
uv_install -e '.[dev,docs]' || die "uv could not install the Python packages in $venv (its message is above)"
"$python" -c 'import torch, torchvision, fastprune' || die "what was installed in $venv does not import (see above)"

if [[ $ffcv == yes ]]; then
    log=$venv/ffcv-build.log
    say "FFCV is compiled (log: $log)"
    build_ffcv() { uv_install "$@" -e '.[dev,docs,ffcv]' && "$python" -c 'import ffcv'; }
    # A wheel that uv kept from before a change of the system's libraries does not import: the second try builds it anew.
    { build_ffcv || build_ffcv --refresh-package ffcv --reinstall-package ffcv; } >"$log" 2>&1 || {
        "$python" -m uv pip uninstall --python "$python" ffcv >>"$log" 2>&1 || true
        say "going on without FFCV, with the portable loader: it did not build on Python $version, see $log ('make clean setup' tries again)"
        ffcv=failed
    }
elif [[ $old_ffcv == yes ]] && "$python" -c 'import ffcv' 2>/dev/null; then
    ffcv=yes # it was there before, and only could not be built again
fi

printf '%s\n' complete "$inputs" "$exe" "$ffcv" "$torch" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "$venv is complete"
