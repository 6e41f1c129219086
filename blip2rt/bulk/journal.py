"""What is done, so that a run that was killed goes on where it stood: a database beside the output.

The output is written and synced first, then one transaction says how much of it counts and which inputs it answers.
After a kill the output is cut back to what counts. So every input is answered exactly once, however often that happens.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError

FORMAT = 1  # of the database; raise it when an older blip2rt would misread it
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    key BLOB, occurrence INTEGER,  -- an id that occurs again is an input of its own, and an error
    pass INTEGER NOT NULL,         -- the run that met it last
    done INTEGER NOT NULL,         -- 0 met, 1 answered, 2 listed with its error
    PRIMARY KEY (key, occurrence)
) WITHOUT ROWID;
"""
MET, ANSWERED, FAILED = 0, 1, 2
Key = tuple[bytes, int]  # what stands for an input: its output's name, and which occurrence of it this is


class Journal:
    """The database of one output, locked for as long as it is open.

    `settings` is all that the output depends on: an output of other settings is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open or create it.

        Raises:
            InputError: another run holds it, or it belongs to a run with other settings.
            OutputError: it cannot be written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{folder} cannot be written ({error.strerror}): choose another --output") from error
        try:
            _lock(self._lock, folder)
            self._open(settings)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        self._database = sqlite3.connect(self.folder / "journal.sqlite", isolation_level=None)
        try:
            self._database.execute("BEGIN IMMEDIATE")
            if not self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                for statement in SCHEMA.split(";\n"):
                    self._database.execute(statement)
                self._set("format", FORMAT)
                self._set("settings", settings)
                self._set("pass", 0)
            self._check(settings)
            self._pass = self._get("pass") + 1
            self._set("pass", self._pass)
            self._database.execute("COMMIT")
            self._database.execute("BEGIN")
        except sqlite3.Error as error:
            self._database.close()
            raise _unusable(self.folder, error) from error
        except BaseException:
            self._database.close()
            raise

    def _check(self, settings: dict[str, Any]) -> None:
        if (found := self._get("format")) != FORMAT:
            raise InputError(f"{self.folder} has format {found}, and this blip2rt reads {FORMAT}: {_ELSE}")
        old = self._get("settings")
        new = json.loads(json.dumps(settings))
        refuse_other_settings(old, new)

    def state(self) -> dict[str, Any]:
        """What the last `commit` said of the outputs; empty at first."""
        state: dict[str, Any] = self._get("state") or {}
        return state

    def counts(self) -> tuple[int, int]:
        """Inputs answered and inputs failed, in all runs so far."""
        query = "SELECT count(*) FROM items WHERE done = ?"
        answered, failed = (self._database.execute(query, (done,)).fetchone()[0] for done in (ANSWERED, FAILED))
        return answered, failed

    def meet(self, name: str) -> tuple[Key, bool]:
        """An input of the source, in the source's order: its key, and whether it is done already.

        An occurrence above 1 means that the name came before in this very run.
        """
        key = name.encode("utf-8", "surrogateescape")
        try:
            query = "SELECT occurrence FROM items WHERE key = ? AND pass = ? ORDER BY occurrence DESC LIMIT 1"
            last = self._database.execute(query, (key, self._pass)).fetchone()
            occurrence = last[0] + 1 if last else 1
            query = "SELECT done FROM items WHERE key = ? AND occurrence = ?"
            known = self._database.execute(query, (key, occurrence)).fetchone()
            if known:
                update = "UPDATE items SET pass = ? WHERE key = ? AND occurrence = ?"
                self._database.execute(update, (self._pass, key, occurrence))
            else:
                self._database.execute("INSERT INTO items VALUES (?, ?, ?, ?)", (key, occurrence, self._pass, MET))
        except sqlite3.Error as error:
            raise _unusable(self.folder, error) from error
        return (key, occurrence), bool(known and known[0])

    def commit(self, answered: Iterable[Key], failed: Iterable[Key], state: dict[str, Any]) -> None:
        """From now on these inputs are done, and the outputs are as `state` says. They must be on the disk before."""
        update = "UPDATE items SET done = ? WHERE key = ? AND occurrence = ?"
        try:
            for done, keys in ((ANSWERED, answered), (FAILED, failed)):
                self._database.executemany(update, ((done, *key) for key in keys))
            self._set("state", state)
            self._database.execute("COMMIT")
            self._database.execute("BEGIN")
        except sqlite3.Error as error:
            raise _unusable(self.folder, error) from error

    def close(self) -> None:
        """What was not committed is forgotten."""
        self._database.close()
        os.close(self._lock)

    def _get(self, name: str) -> Any:
        row = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def _set(self, name: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))


def refuse_other_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compare what an output was made with and what it is to be made with.

    Raises:
        InputError: they differ.
    """
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        differences = ", ".join(f"{n} was {old.get(n)!r:.80} and is {new.get(n)!r:.80}" for n in changed)
        raise InputError(f"the output in place was made with other settings ({differences}): {_ELSE}")


def forget(folder: Path, remove: Callable[[], None]) -> None:
    """Call `remove`, for the output, and then remove the journal; nothing, where there is none.

    Raises:
        InputError: a run holds it.
    """
    if not folder.exists():
        return
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(lock, folder)
        remove()
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    import fcntl  # not above: everything else must work on Windows as well

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"another run is writing this output (it holds {folder}): wait for it, or stop it") from None


def _unusable(folder: Path, error: sqlite3.Error) -> OutputError:
    return OutputError(
        f"the journal in {folder} cannot be written ({error}): see to the disk and its space, and run the same command "
        "again; what is done stays done"
    )


_ELSE = "choose another --output, or add --force to throw that output away and begin anew"
