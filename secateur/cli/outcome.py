"""What became of a command: its exit code, and what it says where it failed."""

import sys
from dataclasses import dataclass

from secateur.utils.errors import printable

INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code; 0 where all is well, 2 for what the user can put right.
        message: why it failed; nothing where it is said elsewhere.
        usage: how the command is used, where it was not used so.
    """

    code: int
    message: str = ""
    usage: str = ""

    def show(self) -> int:
        """Say on stderr what went wrong; the exit code."""
        if self.usage:
            print(self.usage, file=sys.stderr)
        if self.message:
            print(f"error: {printable(self.message)}", file=sys.stderr)
        elif self.code == INTERRUPTED:
            print("interrupted. To resume a compress or sweep command, repeat it.", file=sys.stderr)
        return self.code
