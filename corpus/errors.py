"""What is wrong with input data, for the modules that read it."""


class BadRecord(ValueError):
    """A record of no known format, or with a field of the wrong type; the message says what is wrong."""


class WrongFile(ValueError):
    """A file that is not what its name says; the message says what it is and what to do."""
