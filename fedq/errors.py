"""The base of all errors that a person can mend."""


class FedqError(Exception):
    """Its text is one clear sentence: what is wrong, where, and what to do. Programs show it without a traceback."""


class MissingPackage(FedqError, ImportError):
    """A package is needed that the installation did not ask for; says which extra brings it."""
