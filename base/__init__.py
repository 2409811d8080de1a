"""Atomic files, versions of packages, the command line. Standard library only; imports no other package of the project.

Importing it lets Ctrl-C end a script without a traceback while the script still loads its modules, which takes seconds.
"""

import sys


def _hide_interrupt(kind: type[BaseException], *error):
    if kind is not KeyboardInterrupt or sys.flags.dev_mode:
        sys.__excepthook__(kind, *error)


sys.excepthook = _hide_interrupt  # cli.run handles it from there on
