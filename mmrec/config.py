"""Version, errors and configuration: plain data that every other module may read."""

VERSION = "0.1.0"


class InputError(ValueError):
    """A user's mistake. Its text is one line that states the rule, what was expected, what came."""
