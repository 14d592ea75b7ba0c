"""The one exception that a person's input can cause."""


class UserError(ValueError):
    """Something the user gave cannot be used: the message names the file, key or row, what was found, and the fix.

    Scripts print the message alone and exit with status 2. Everything else that is raised is a defect of jaxreason.
    """
