"""The errors that a person has to act on. Their messages are one line: what is wrong and what to do about it."""


class InputError(Exception):
    """A setting, a file or a name that does not work.

    Not a ``ValueError``: the command line's parser takes those for its own and wraps their message in a box.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on. What it had learned by then is saved."""


class WorkerDied(RunFailed):
    """A simulation worker ended on its own. The message names it."""


class Diverged(RunFailed):
    """The learner's numbers are no longer finite. The message names them."""
