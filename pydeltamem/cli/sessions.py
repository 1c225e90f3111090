"""`deltamem sessions`: the sessions that a server keeps."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..formats.memory_file import MemorySnapshot
from .model_options import note
from .parser import sentence

if TYPE_CHECKING:
    from ..server.records import Record
    from ..server.store import Store


_WIDE = 400  # columns, more than a line has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="URL", help="where the sessions are, as for deltamem serve")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, help=help, description=sentence(help))
        # behind the action, too, where the other options are
        action.add_argument("--store", metavar="URL", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return action

    listed = add("list", "list sessions, the latest first")
    listed.add_argument("--json", action="store_true", help="print JSON")
    for name, help in (("export", "write the memory of a session to a memory file"),
                       ("import", "replace the memory of a session by a memory file")):  # fmt: skip
        action = add(name, help)
        action.add_argument("session", metavar="SESSION", help="name of the session")
        action.add_argument("file", metavar="FILE", help="memory file")
        _add_owner(action)
    delete = add("delete", "delete sessions")
    delete.add_argument("session", metavar="SESSION", nargs="+", help="names of the sessions")
    _add_owner(delete)
    add("vacuum", "give the space of deleted sessions back")


def _add_owner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--owner", default="", metavar="ID", help="owner of the session, if the server has keys; `list` shows it"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from ..server.records import checked_name
        from ..server.store import Store
    except ImportError as error:
        raise InputError(f"a package of the server is missing ({error}): pip install 'pydeltamem[server]'") from error
    is_import = args.action == "import"
    given = getattr(args, "session", [])
    args.session = checked_name(given) if isinstance(given, str) else list(map(checked_name, given))
    if is_import:  # before a store is made
        args.snapshot = MemorySnapshot.load(args.file)
    store = Store(args.store, must_exist=not is_import)
    try:
        actions = {"list": _list, "export": _export, "import": _import, "delete": _delete}
        if args.action == "vacuum":
            store.vacuum()
        else:
            actions[args.action](store, args)
    finally:
        store.close()
    return 0


def _list(store: Store, args: argparse.Namespace) -> None:
    records = store.list()
    if args.json:
        print(json.dumps([_about(record) for record in records], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("session", "owner", "version", "turns", "tokens", "bytes", "updated"):
        table.add_column(name, overflow="fold")  # to delete or export it, all of its name is needed
    for record in records:
        table.add_row(*(str(value) for value in _about(record).values()))
    console = Console()
    if not console.is_terminal:  # a line a session, whatever its length
        console.width = _WIDE
    console.print(table)


def _about(record: Record) -> dict[str, Any]:
    return {
        "session": record.name,
        "owner": record.owner[:12],
        "version": record.version,
        "turns": record.turns,
        "tokens": record.tokens,
        "bytes": record.size,
        "updated": record.updated.isoformat(timespec="seconds") + "Z",
    }


def _owner(store: Store, args: argparse.Namespace) -> str:
    """The owner whose id begins as given."""
    if not args.owner:
        return ""
    found = {record.owner for record in store.list() if record.owner.startswith(args.owner)}
    if len(found) != 1:
        raise InputError(f"--owner {args.owner}: {len(found)} owners begin so")
    return found.pop()


def _record(store: Store, owner: str, session: str) -> Record:
    record = store.get(owner, session)
    if record is None:
        raise InputError(f"{session}: there is no such session in {store.shown}")
    return record


def _export(store: Store, args: argparse.Namespace) -> None:
    from ..server.session import stored_memory

    record = _record(store, _owner(store, args), args.session)
    if not record.memory:
        raise InputError(f"{args.session}: its memory is empty")
    stored_memory(record).save(args.file)
    note(f"{args.file}: the memory of {args.session}, {record.tokens} tokens")


def _import(store: Store, args: argparse.Namespace) -> None:
    from ..server.records import Record
    from ..server.session import imported

    snapshot = args.snapshot
    owner = _owner(store, args)
    record = store.get(owner, args.session) or Record(owner, args.session)
    adapter = snapshot.metadata.get("adapter", "")
    if record.version and record.adapter and record.adapter != adapter:
        raise InputError(f"{args.file}: the memory of another adapter than that of session {args.session}")
    store.commit(imported(record, snapshot))
    note(f"{args.session}: its memory is that of {args.file}; a running server has it at the next turn")


def _delete(store: Store, args: argparse.Namespace) -> None:
    owner, sessions = _owner(store, args), dict.fromkeys(args.session)
    for session in sessions:  # all or none: who corrects the one that is not there asks for the others again
        _record(store, owner, session)
    for session in sessions:
        store.delete(owner, session)
