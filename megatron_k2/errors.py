"""The one exception that is shown to a person without a traceback."""


class UserError(ValueError):
    """A wrong input. The message names the value, what was expected, and the way out."""
