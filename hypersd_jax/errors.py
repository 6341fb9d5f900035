"""Errors that the person at the keyboard can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad usage or bad input: one line that names the file or key at fault.

    The command line prints the message alone and exits with status 2; everything else is a defect of ours and keeps
    its traceback.
    """
