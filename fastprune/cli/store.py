"""`scripts/store.py`: shows what is in a run store and whether it is whole, clears it up, takes it along, merges it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastprune.cli.command import DONE, FAILED, Parser, run_command
from fastprune.console import printable
from fastprune.errors import InputError
from fastprune.store import RunStore
from fastprune.store.read import existing_store

OK, DAMAGED = DONE, FAILED


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,
        prog="store.py",
        description="Look after a store of runs.",
        epilog="Exit codes: 0 all is well, 1 something is damaged, differs or was left out, 2 bad usage or input.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        c.add_argument("--store", type=Path, default=Path("runs"), metavar="DIR", help="the store (default runs)")
        return c

    c = command("ls", "one line a node, totals, and what is going on")
    c.add_argument("--kind", choices=["train", "prune", "filters"], help="nodes of this kind only")
    c.add_argument("--json", action="store_true", help="a list of records: seconds, bytes, Unix time")
    c = command("show", "all that is known of one node")
    c.add_argument("key", metavar="KEY", help="its key, or as much of its beginning as no other has")
    c = command("verify", "read every file and compare it with its checksum")
    c.add_argument("--delete", action="store_true", help="delete what is damaged: the next run makes it again")
    c = command("gc", "remove what is worthless: temporary files, checkpoints of finished runs, old caches")
    c.add_argument("--unneeded", action="store_true", help="also nodes that no recorded figure needs")
    c.add_argument("--states", action="store_true", help="also weights and momentum that only finished nodes have read")
    c.add_argument("--forget", metavar="NAME", help="remove the record of a figure first")
    c.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    c = command("export", "write the nodes to one tar file")
    c.add_argument("file", type=Path, metavar="FILE")
    c.add_argument("--figure", action="append", default=[], metavar="NAME", help="only what it needs (may be repeated)")
    c.add_argument("--no-states", action="store_true", help="without weights and momentum")
    c = command("import", "take over the nodes of a tar file, or of another store's folder; ours win")
    c.add_argument("source", type=Path, metavar="FILE|FOLDER")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 all is well, 1 something is damaged, differs or was left out, 2 bad
    usage or input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        if args.command != "import":
            existing_store(args.store)
        try:
            return _COMMANDS[args.command](args)
        except RecursionError:
            raise InputError("a file is nested too deeply; see verify") from None

    return run_command("store.py", work, "what was done is whole")


def _ls(args: argparse.Namespace) -> int:
    from fastprune.files import tree_bytes
    from fastprune.store.listing import Listing, going_on, table, totals

    listing = Listing(args.store)
    records = [listing.record(node) for node in listing.nodes]
    if args.kind is not None:
        records = [r for r in records if r.get("kind", args.kind) == args.kind]
    if args.json:
        print(json.dumps(records, indent=1))
    else:
        _print(*table(records))
        _print("", totals(records, tree_bytes(args.store)), *map(printable, going_on(args.store)))
    return DAMAGED if any("damaged" in r for r in records) else OK


def _show(args: argparse.Namespace) -> int:
    from fastprune.store.listing import show

    said, whole = show(args.store, args.key)
    _print(*said)
    return OK if whole else DAMAGED


def _verify(args: argparse.Namespace) -> int:
    from fastprune.store.verify import check_store, delete_damaged, remedy

    found = check_store(args.store)
    _print(*(printable(f"{path}: {why}; {remedy(args.store, path, why)}") for path, why in found.damaged.items()))
    if args.delete and found.damaged:
        _print(*map(printable, delete_damaged(RunStore(args.store), found)))
    _print(str(found))
    return DAMAGED if found.damaged else OK


def _gc(args: argparse.Namespace) -> int:
    from fastprune.store.gc import collect
    from fastprune.store.listing import size

    removed = collect(
        RunStore(args.store), unneeded=args.unneeded, states=args.states, forget=args.forget, dry_run=args.dry_run
    )
    done = "would remove" if args.dry_run else "removed"
    _print(*(printable(f"{done} {path} ({size(count)})") for path, count in removed.sizes.items()))
    _print(*removed.left)
    _print(f"{done} {len(removed.sizes):,} files and folders, {removed.bytes:,} bytes")
    return OK


def _export(args: argparse.Namespace) -> int:
    from fastprune.store.listing import size
    from fastprune.store.transfer import DamagedError, export

    try:
        count, of = export(args.store, args.file, args.figure, states=not args.no_states)
    except DamagedError as error:
        print("store.py:", printable(error), file=sys.stderr)
        return DAMAGED
    rest = f", {of - count:,} are not there yet" if count < of else ""
    _print(f"{count:,} nodes in {args.file} ({size(args.file.stat().st_size)}){rest}")
    return OK


def _import(args: argparse.Namespace) -> int:
    from fastprune.store.transfer import import_from

    done = import_from(args.store, args.source)
    for title, lines in (("conflict", done.conflicts), ("left out", done.busy)):
        _print(*(printable(f"{title}: {line}") for line in lines))
    conflicts = len({line.split()[0] for line in done.conflicts})
    counts = f"{len(done.new):,} new, {len(done.same):,} the same, {len(done.gained):,} gained files"
    left = f", {len(done.busy):,} left out" if done.busy else ""
    _print(f"{counts}, {conflicts:,} in conflict{left}; records of figures: {done.figures:,}")
    return DAMAGED if done.conflicts or done.busy else OK


def _print(*lines: str) -> None:
    for line in lines:
        print(line)


_COMMANDS = {"ls": _ls, "show": _show, "verify": _verify, "gc": _gc, "export": _export, "import": _import}
