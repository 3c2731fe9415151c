"""How a command ends early, by a mistake that the user can mend or by a signal."""


class UserError(Exception):
    """Says what was expected, what was found and what to type instead; shown without a traceback."""


class Interrupted(Exception):
    """A signal ended a run, which was saved first.

    Args:
        signal: its number.
        step: how many steps are done and saved.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"interrupted by signal {signal} after step {step}")
        self.signal, self.step = signal, step
