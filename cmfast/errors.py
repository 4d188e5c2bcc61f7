"""An error that several parts raise."""


class Unavailable(RuntimeError):
    """What was asked for cannot be had on this machine, or of this model; the message says why."""
