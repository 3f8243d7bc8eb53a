"""The options of a run in a YAML file, under the names that the command line has."""

from dataclasses import asdict, fields

from . import sources
from .settings import Output, Settings


def read(path):
    """The options in a file, for `settings.typed`.

    Raises:
        DataError: it cannot be read.
        ValueError: it has a name that is no option.
    """
    found = sources.read_yaml(path) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted names with values, got {type(found).__name__}")
    found = {str(key).replace("-", "_"): value for key, value in found.items()}
    known = {each.name for each in (*fields(Settings), *fields(Output))}
    if unknown := sorted(found.keys() - known):
        raise ValueError(f"{path}: there is no option {', '.join(unknown)}")
    return found


def dumped(settings, output):
    """The text of a file with which `read` gives the same."""
    import yaml

    return yaml.safe_dump({**asdict(settings), **asdict(output)}, sort_keys=False)
