"""`scripts/store.py`: lists, verifies, cleans up and exports a run store, and merges another one into it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastprune.cli.command import DONE, FAILED, Parser, run_command, to_path
from fastprune.console import printable
from fastprune.errors import InputError
from fastprune.store import RunStore
from fastprune.store.listing import existing_store

OK, CORRUPT = DONE, FAILED


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,
        prog="store.py",
        description="Manage a store of runs.",
        epilog="Exit codes: 0 done, 1 a node is corrupt, differs or was left out, 2 bad usage or input.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        c.add_argument("--store", type=to_path, default=Path("runs"), metavar="DIR", help="the store (default runs)")
        return c

    c = command("ls", "list one line a node, totals, running and failed nodes")
    c.add_argument("--kind", choices=["train", "prune", "channels"], help="nodes of this kind only")
    c.add_argument("--json", action="store_true", help="print a list of records: seconds, bytes, Unix time")
    c = command("show", "show everything recorded about one node")
    c.add_argument("key", metavar="KEY", help="its key, or a unique prefix of it")
    c = command("verify", "read every file and compare it with its checksum")
    c.add_argument("file", type=to_path, nargs="?", metavar="FILE", help="a tar that export wrote, in place of --store")
    c.add_argument("--delete", action="store_true", help="delete corrupt nodes; the next run computes them again")
    c = command("gc", "remove leftovers: temporary files, checkpoints of finished runs, old caches")
    c.add_argument("--unneeded", action="store_true", help="list also the nodes that no recorded figure needs")
    c.add_argument("--states", action="store_true", help="list also weights and momentum that only finished nodes read")
    c.add_argument("--forget", metavar="NAME", help="ignore the record of this figure, and list it")
    c.add_argument("--yes", action="store_true", help="remove what is listed")
    c = command("export", "write the nodes to one tar file")
    c.add_argument("file", type=to_path, metavar="FILE")
    c.add_argument("--figure", action="append", default=[], metavar="NAME", help="only what it needs (may be repeated)")
    c.add_argument("--no-states", action="store_true", help="without weights and momentum")
    c = command("merge", "adopt the nodes of another store's folder or of an exported tar file; published nodes stay")
    c.add_argument("source", type=to_path, metavar="FOLDER|FILE")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 a node is corrupt, differs or was left out, 2 bad usage or
    input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        # merge may create the store, and a tar is verified without one.
        if args.command != "merge" and not (args.command == "verify" and args.file is not None):
            existing_store(args.store)
        try:
            return _COMMANDS[args.command](args)
        except RecursionError:  # printing or walking a corrupt node.json, which json.loads could still read
            raise InputError("a node.json is nested too deeply; run verify to find it") from None

    return run_command("store.py", work, "what was done is complete")


# Each command imports what it needs when it is called: --help and bad usage answer at once.


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
    return CORRUPT if any("corrupt" in r for r in records) else OK


def _show(args: argparse.Namespace) -> int:
    from fastprune.store.listing import show

    said, complete = show(args.store, args.key)
    _print(*said)
    return OK if complete else CORRUPT


def _verify(args: argparse.Namespace) -> int:
    from fastprune.store.merge import opened
    from fastprune.store.verify import check_store, delete_corrupt, remedy

    if args.file is not None:
        if args.delete:
            raise InputError("--delete requires a store; no node can be deleted from a tar file")
        with opened(args.file) as folder:
            found = check_store(folder)
            _print(*(printable(f"{path.relative_to(folder)}: {why}") for path, why in found.corrupt.items()))
    else:
        found = check_store(args.store)
        _print(*(printable(f"{path}: {why}; {remedy(args.store, path, why)}") for path, why in found.corrupt.items()))
        if args.delete and found.corrupt:
            # The exit code stays 1: the store was corrupt, and the deleted nodes are still to be computed.
            _print(*map(printable, delete_corrupt(RunStore(args.store), found)))
    _print(str(found))
    return CORRUPT if found.corrupt else OK


def _gc(args: argparse.Namespace) -> int:
    from fastprune.store.gc import collect
    from fastprune.store.listing import size

    removed = collect(
        RunStore(args.store), unneeded=args.unneeded, states=args.states, forget=args.forget, yes=args.yes
    )
    # Leftovers are removed without --yes: no run can use them. Published files are results: the user must confirm.
    _print(*(printable(f"removed {path} ({size(count)})") for path, count in removed.leftovers.items()))
    done = "removed" if args.yes else "would remove"
    _print(*(printable(f"{done} {path} ({size(count)})") for path, count in removed.published.items()))
    _print(*removed.left)
    _print(f"{len(removed.leftovers):,} leftovers removed, {sum(removed.leftovers.values()):,} bytes")
    if removed.published:
        rest = "removed" if args.yes else "to remove with --yes"
        _print(f"{len(removed.published):,} more {rest}, {sum(removed.published.values()):,} bytes")
    return OK


def _export(args: argparse.Namespace) -> int:
    from fastprune.store.listing import size
    from fastprune.store.merge import CorruptError, export

    try:
        count, of = export(args.store, args.file, args.figure, states=not args.no_states)
    except CorruptError as error:
        print("store.py:", printable(error), file=sys.stderr)
        return CORRUPT
    rest = f", {of - count:,} are not published yet" if count < of else ""
    _print(f"{count:,} nodes in {args.file} ({size(args.file.stat().st_size)}){rest}")
    return OK


def _merge(args: argparse.Namespace) -> int:
    from fastprune.store.merge import merge

    merged = merge(args.store, args.source)
    for what, lines in (("conflict", merged.conflicts), ("corrupt", merged.corrupt), ("left out", merged.busy)):
        _print(*(printable(f"{what}: {line}") for line in lines))
    counts = f"{len(merged.new):,} new, {len(merged.same):,} the same, {len(merged.gained):,} gained files"
    bad = f"{len(merged.conflicts):,} in conflict, {len(merged.corrupt):,} corrupt, {len(merged.busy):,} left out"
    _print(f"{counts}, {bad}; records of figures: {merged.records:,}")
    return CORRUPT if merged.conflicts or merged.corrupt or merged.busy else OK


def _print(*lines: str) -> None:
    for line in lines:
        print(line)


_COMMANDS = {"ls": _ls, "show": _show, "verify": _verify, "gc": _gc, "export": _export, "merge": _merge}
