"""Load a user's own classes by path: `mylab.nets.Mine`, from the working directory or an installed package.

Importing a module runs its code. So a module is imported only if the user's own command or config names it:
its top-level name is *trusted*. What a store says never is. Everything else is refused in one line, before
any import. An installed package may give its classes short names by entry points of the group `jebm.parts`.
"""

import difflib
import hashlib
import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from jebm.errors import ConfigError
from jebm.plain import converted, is_plain

__all__ = [
    "arguments_of",
    "built",
    "failure",
    "full_path",
    "loaded",
    "module_of",
    "origin_of",
    "parameters_of",
    "short_names",
    "trusted_name",
]

_GROUP = "jebm.parts"
"""Entry points that give classes short names."""
_PLAIN = (bool, int, float, str)
_OWN = "jebm"

T = TypeVar("T")


def loaded(path: str, base: type[T], trusted: Collection[str], key: str) -> type[T]:
    """Return the class of this path, or short name, that derives from `base`; `key` begins an error.

    Raises:
        ConfigError: its module is not trusted, is missing, private or cannot be imported, or the path leads
            to anything but a complete class derived from `base`.
    """
    path = full_path(path, key)
    module, _, name = path.rpartition(".")
    if any(part.startswith("_") for part in path.split(".")):
        raise ConfigError(f"{key}: {path} is private; name a public class")
    top = module_of(path)
    if top not in {*trusted, _OWN}:
        raise ConfigError(
            f"{key}: {path} would run code of {top}, which is not trusted here; "
            f"if you know that code, add --trust {top}"
        )
    found = getattr(_imported(module, key), name, None)
    # Only a class of the right kind, which can be built.
    if found is None:
        public = [each for each in dir(sys.modules[module]) if not each.startswith("_")]
        close = difflib.get_close_matches(name, public, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}: {module} has no {name}{hint}")
    if not isinstance(found, type):
        raise ConfigError(f"{key}: {path} is no class")
    if not issubclass(found, base):
        raise ConfigError(f"{key}: {path} does not derive from {base.__module__}.{base.__name__}")
    if inspect.isabstract(found):
        raise ConfigError(
            f"{key}: {path} lacks {', '.join(sorted(getattr(found, '__abstractmethods__', ())))}"
        )
    return found


def full_path(path: str, key: str) -> str:
    """Return the path of a class, for a short name that of its entry point; nothing is imported.

    Raises ConfigError if no installed package, or more than one, brings this short name.
    """
    if "." in path:
        return path
    entries = metadata.entry_points(group=_GROUP)
    paths = sorted({entry.value.replace(":", ".") for entry in entries if entry.name == path})
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise ConfigError(f"{key}: {path} is the short name of {' and '.join(paths)}; give the path of one")
    names = ", ".join(short_names()) or "none"
    raise ConfigError(f"{key}: no installed package brings {path} (short names: {names}); give module.Class")


def short_names() -> list[str]:
    """Return the short names that installed packages bring, sorted; nothing is imported."""
    return sorted({entry.name for entry in metadata.entry_points(group=_GROUP)})


def module_of(path: str) -> str:
    """Return the top-level module of a full path: what has to be trusted."""
    return path.partition(".")[0]


def trusted_name(name: str) -> str:
    """Return the module's name of a --trust option; raises `ConfigError` for anything else."""
    if not name.isidentifier():
        raise ConfigError(f"--trust {name}: needs the name of a top-level module, such as mylab")
    return name


def parameters_of(kind: type, leading: int) -> dict[str, inspect.Parameter]:
    """Return the arguments that a config may give a class, by name: all but the first `leading` ones."""
    try:
        signature = inspect.signature(kind, eval_str=True)
    except Exception:  # annotations that only type checkers understand
        try:
            signature = inspect.signature(kind)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{kind.__name__} tells nothing of its arguments ({error})") from error
    named = [each for each in signature.parameters.values() if each.kind is not each.VAR_POSITIONAL]
    return {each.name: each for each in named[leading:] if each.kind is not each.POSITIONAL_ONLY}


def arguments_of(kind: type, given: Mapping[str, Any], key: str, *, leading: int) -> dict[str, Any]:
    """Return the arguments converted to the types of the class's `__init__`.

    Raises ConfigError, one line that names the dotted key, if one is unknown, missing or of another type.
    """
    try:
        parameters = parameters_of(kind, leading)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = {name: each for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    values = {}
    for name, value in given.items():
        if name not in named and not takes_any:
            close = difflib.get_close_matches(name, named, n=1)
            takes = f"it takes {', '.join(named)}" if named else "it takes none"
            hint = f"did you mean {close[0]}?" if close else takes
            raise ConfigError(f"{key}.{name}: {kind.__name__} has no such argument; {hint}")
        annotation = named[name].annotation if name in named else inspect.Parameter.empty
        values[name] = converted(value, annotation, f"{key}.{name}") if _convertible(annotation) else value
    for name, each in named.items():
        if name not in values and each.default is each.empty:
            raise ConfigError(f"{key}.{name}: is missing; {kind.__name__} needs it")
    return values


def built(kind: type[T], leading: tuple[Any, ...], given: Mapping[str, Any], key: str) -> T:
    """Return an object of the class, made of the leading arguments and the config's, converted.

    Raises ConfigError as `arguments_of`, and if the class's own code fails: one line with its place.
    """
    arguments = arguments_of(kind, given, key, leading=len(leading))
    try:
        return kind(*leading, **arguments)
    except Exception as error:
        raise ConfigError(f"{key}: {kind.__name__} cannot be built: {failure(error)}") from error


def origin_of(kind: type) -> dict[str, str]:
    """Return where a class comes from: its path, the SHA-256 of its file, its package's version if any."""
    facts = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    try:
        facts["source_sha256"] = hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        facts["source_sha256"] = "unknown"
    top = module_of(kind.__module__)
    for name in metadata.packages_distributions().get(top, [])[:1]:
        facts["package"] = f"{name} {metadata.version(name)}"
    return facts


def _imported(module: str, key: str) -> types.ModuleType:
    # The working directory comes last, so that no file there takes the place of an installed module.
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key}: {module} cannot be imported: {failure(error)}") from error
        raise ConfigError(
            f"{key}: there is no module {error.name} in {here} or among the installed packages"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: {module} cannot be imported: {failure(error)}") from error


def failure(error: BaseException) -> str:
    """Return an error of a user's code in one line, with the file and line where it was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, SyntaxError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({last.filename}, line {last.lineno})"


def _convertible(annotation: object) -> bool:
    """Return whether an annotation is made of plain types, so that a value can be held to it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return all(each is types.NoneType or _convertible(each) for each in inner)
    if origin is Literal:
        return all(map(is_plain, inner))
    if origin in (tuple, list):
        return all(each is Ellipsis or _convertible(each) for each in inner)
    return annotation in _PLAIN
