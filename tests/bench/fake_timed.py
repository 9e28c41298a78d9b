"""Stands for bench/timed.py: tasks of made-up rows, some of which break their process. Usage: fake_timed.py FOLDER."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from bench.child import attach, send

NAMES = ("fine", "wrong row", "wrong", "crashing row", "crashing", "lost", "hanging row", "slow", "last")


def row(ms: float, ours: bool = False) -> dict:
    return {"ours": ours, "ms": ms, "bytes": 1e6, "images": None}


def main(folder: Path) -> None:
    attach()
    for line in sys.stdin:
        given = json.loads(line)
        name, without = given["task"], given["without"]
        with (folder / "done").open("a") as seen:
            seen.write(f"{os.getpid()} {name} {','.join(without)}\n")
        rows, errors, lost = {"ours": row(2.0, ours=True), "theirs": row(6.0)}, {}, False
        if name == "wrong":
            rows, errors = {}, {"": "ValueError: no inputs"}
        if name == "wrong row":
            del rows["theirs"]
            errors = {"theirs": "ValueError: no such thing"}
        for what in ("ours", "theirs"):
            if what in without:
                rows.pop(what)
                continue
            if "row" in name:
                send(row=what)
            if name == "crashing row" and what == "theirs":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "hanging row" and what == "theirs":
                time.sleep(600)
        if name == "crashing":
            print("about to crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "slow":
            (folder / "slow").write_text(str(os.getpid()))
            while not (folder / "go on").exists():
                time.sleep(0.01)
        if name == "lost" and "ours" not in without:
            errors, lost = {"ours": "RuntimeError: CUDA error: an illegal memory access was encountered"}, True
        send(ended=name, rows={} if lost else rows, errors=errors, lost=lost)
        if lost:
            os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
