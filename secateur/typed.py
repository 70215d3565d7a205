"""The command line that is being followed, for the record of what it leads to."""

from contextvars import ContextVar

#: as it was typed; None where Python called
COMMAND: ContextVar[str | None] = ContextVar("COMMAND", default=None)
