"""Files, folders and the hub's data sets, as rows."""

import csv
import importlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..integrations.common import short


class DataError(Exception):
    """The data cannot be used; the message says why in one sentence."""


@dataclass(frozen=True)
class Source:
    """Rows, each a dict with its number in the words of `unit`; or one text, `is_text`."""

    name: str
    rows: list
    unit: str = "row"
    is_text: bool = False

    def place(self, number):
        return self.name if self.is_text else f"{self.name}, {self.unit} {number}"


def read(name, split="train", config=None):
    """The rows of a file; or of a split of a folder or of a hub's data set, by `datasets`.

    Args:
        name: a file, whose suffix says how it is read (`READERS`; others are plain text), a folder,
            or an id such as owner/name.
        split: "train", or "validation", for which "test" is taken where there is no other.
        config: of a data set that has several.

    Raises:
        DataError: which file, and what is wrong with it.
    """
    path = Path(name)
    if path.is_file():
        source = READERS.get(path.suffix.lower(), _plain)(path)
    elif path.is_dir() or _may_be_id(name):
        source = _data_set(name, split, config)
    else:
        raise DataError(f"there is no file {name}")
    if not source.rows:
        raise DataError(f"{name} is empty")
    return source


def _may_be_id(name):
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and Path(
        name
    ).suffix.lower() not in {*READERS, ".txt", ".md"}


def read_yaml(path):
    """What a YAML file says."""
    import yaml

    try:
        return yaml.safe_load(_text(Path(path)))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {short(error)}") from error


def is_data_set(folder):
    """Whether `datasets` wrote it by save_to_disk."""
    return any((Path(folder) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))


# -- readers ---------------------------------------------------------------------------------------


def _text(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte {error.start}): what is read is {_known()}"
        ) from error
    if "\0" in text:
        raise DataError(f"{path} is no text, it has null bytes: what is read is {_known()}")
    return text


def _known():
    return f"{', '.join(READERS)} and plain text"


def _plain(path):
    text = _text(path)
    return Source(str(path), [(1, {"text": text})] if text.strip() else [], is_text=True)


def _json_lines(path):
    rows = []
    # JSON allows U+2028 and its like inside a string, where splitlines() would cut.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            rows.append((number, _json(line, f"{path}, line {number}")))
    return _of_dicts(Source(str(path), rows, "line"))


def _json_file(path):
    """An array of objects, or an object a line."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    return _of_dicts(Source(str(path), list(enumerate(_json(text, path), 1)), "item"))


def _json(text, place):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{place}{line}: not JSON ({error.msg})") from error


def _of_dicts(source):
    for number, row in source.rows:
        if not isinstance(row, dict):
            raise DataError(f"{source.place(number)}: wanted an object, got {str(row)[:40]!r}")
    return source


def _csv(path):
    csv.field_size_limit(sys.maxsize)  # of a text; csv's own limit is 128 KiB
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), dialect=dialect, strict=True)
    source = Source(str(path), [])
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise DataError(
                    f"{source.place(number)}: wanted as many fields as the "
                    f"{len(reader.fieldnames)} columns of the first line"
                )
            source.rows.append((number, row))
    except csv.Error as error:
        raise DataError(f"{source.place(len(source.rows) + 1)}: not CSV ({error})") from error
    return source


def _parquet(path):
    parquet = _library("pyarrow.parquet", path)
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise DataError(f"{path} cannot be read as parquet: {short(error)}") from error
    return Source(str(path), list(enumerate(rows, 1)))


def _data_set(name, split, config):
    """A folder that `save_to_disk` wrote, one of files that `datasets` knows, or the hub's."""
    datasets = _library("datasets", name)
    try:
        if is_data_set(name):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config)
    except Exception as error:  # whatever a reader of any format, or a network, may raise
        where = "" if Path(name).is_dir() else "there is no file or folder of that name, and "
        raise DataError(f"{name}: {where}no data set can be loaded: {short(error)}") from error
    if isinstance(found, dict):
        wanted = ("train",) if split == "train" else (split, "test")
        part = next((each for each in wanted if each in found), None)
        if part is None:
            raise DataError(f"{name} has the parts {', '.join(found)}; wanted {wanted[0]}")
        found, name = found[part], f"{name} ({part})"
    return Source(str(name), list(enumerate(found, 1)))


def _library(module, name):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{name} needs {module.partition('.')[0]} to be read: pip install 'lomo_kernels[data]'"
        ) from error


READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
