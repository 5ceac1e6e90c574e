"""The one exception that means: the user asked for something that cannot be."""


class UserError(ValueError):
    """A user's mistake, told in one line: what is wrong, the value, what would be right.

    The command line prints the message and exits with status 2, without a traceback.
    """
