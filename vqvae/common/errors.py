"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Says what was expected, what was found and what to type instead; shown without a traceback."""
