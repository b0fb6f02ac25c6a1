"""The texts of errors that other libraries raise, for messages of one line."""

from __future__ import annotations


def first_line(error: BaseException, default: str = "") -> str:
    r"""Return the first line of the message of an error; without a message, `default` or the name of its class.

    >>> first_line(ValueError("no such file\nmore details")), first_line(KeyError())
    ('no such file', 'KeyError')
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else default or type(error).__name__
