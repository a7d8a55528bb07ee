"""Recipes: from a TOML file and the command line to a Config. Both are validated strictly.

    recipe file  ->  checked key by key  ->  --section.field overrides, checked the same way  ->  one frozen Config

A wrong key, type or value raises ConfigError: one line with the file and line number (or the flag), the value and what
would be right.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import re
import tomllib
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.config import SECTIONS, Config, ConfigError, SourceConfig
from training.deprecated_names import RENAMED

RECIPES = Path(__file__).resolve().parent.parent / "configs"
TOP = ("name", "init_from")  # fields above the sections
SOURCES = "data.sources"  # the tables [[data.sources]] of a mixture

OTHERS = {  # names in other projects
    "batch_size": "train.batch_tokens", "epochs": "train.steps", "max_iters": "train.steps",
    "block_size": "model.context", "learning_rate": "optim.lr",
}  # fmt: skip


def fields(section: str) -> dict[str, type]:
    """Field name -> type (int, float, str or bool) of a section, or of [[data.sources]]."""
    kind = SourceConfig if section == SOURCES else SECTIONS[section]
    return {f.name: f.type for f in dataclasses.fields(kind) if isinstance(f.type, type)}


def documentation(section: str) -> dict[str, str]:
    """Field name -> the docstring under it."""
    found = {}
    for above, below in pairwise(ast.parse(inspect.getsource(SECTIONS[section])).body[0].body):  # type: ignore[attr-defined]
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
            found[ast.unparse(above.target)] = ast.literal_eval(below.value)
    return found


def about_unknown_flag(flag: str) -> str:
    """The message about a flag that does not exist: it has a new name, or is like another one."""
    dotted = flag.lstrip("-")
    if dotted in RENAMED:
        return f"{flag}: renamed to --{RENAMED[dotted]}"
    known = {name: f"{section}.{name}" for section in SECTIONS for name in fields(section)} | OTHERS
    known |= {name: name for name in ("name", "init-from", "resume", "overwrite", "print-config")}
    name = dotted.rpartition(".")[2]
    if name not in known and "." in dotted:
        return f"{flag}: no such option{_closest(dotted, known.values(), '--')}"
    near = difflib.get_close_matches(name, known, 1)
    return f"{flag}: no such option" + (f"; did you mean --{known[near[0]]}?" if near else "")


def recipes() -> dict[str, str]:
    """Recipe name -> the first line of its header."""
    files = sorted(RECIPES.glob("*.toml"), key=lambda file: file.stem)
    return {f.stem: f.read_text().partition("\n")[0].lstrip("# ") for f in files}


def load(recipe: str, overrides: dict[str, str] | None = None) -> Config:
    """The recipe (a name in configs/ or a path to a TOML file), changed by overrides {"model.n_layer": "8"}.

    Raises ConfigError.
    """
    path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    if not path.is_file():
        wrong = "no such file" if recipe.endswith(".toml") else "no such recipe"
        raise ConfigError(f"{recipe}: {wrong}, only {', '.join(recipes())}{_closest(recipe, recipes())}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None

    values: dict[str, Any] = {"name": path.stem}
    for key, value in tree.items():
        table = value if isinstance(value, dict) else {"": value}
        for inner, leaf in table.items():
            dotted = f"{key}.{inner}" if inner else key
            check = partial(_sources, path, text) if dotted == SOURCES else partial(_check, dotted)
            values[dotted] = check(leaf, _place(path, text, dotted))
    if SOURCES in values:
        values.setdefault("data.source", "")
    for dotted, word in (overrides or {}).items():
        values[dotted] = _check(dotted, _parse(dotted, word), f"--{dotted}")
    # A budget or a source given on the command line replaces the recipe's, whichever kind it was.
    for given, other in (("train.steps", "train.minutes"), ("train.minutes", "train.steps"), ("data.source", SOURCES)):
        if overrides and given in overrides and other not in overrides:
            values.pop(other, None)
    return _build(values, lambda dotted: f"--{dotted}" if dotted in (overrides or {}) else _place(path, text, dotted))


def dump(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to an equal Config."""
    lines = [f"{key} = {json.dumps(getattr(config, key))}" for key in TOP]
    for section in SECTIONS:
        lines.append(f"\n[{section}]")
        values = dataclasses.asdict(getattr(config, section))
        sources = values.pop("sources", ())
        lines += _lines(values)
        for source in sources:
            lines += [f"\n[[{SOURCES}]]", *_lines(source)]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any]) -> list[str]:
    return [f"{k} = {json.dumps(v)}" for k, v in values.items()]  # JSON's strings, numbers and booleans are TOML's, too


def _build(values: dict[str, Any], place: Any) -> Config:
    """Dotted values to dataclasses; their own checks' messages ("model.n_head = 3: ...") get the place in front."""
    try:
        parts: dict[str, Any] = {key: values[key] for key in TOP if key in values}
        for section, kind in SECTIONS.items():
            own = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{section}.")}
            if section == "train" and not {"steps", "minutes"} & own.keys():
                own["steps"] = Config("x").train.steps
            parts[section] = kind(**own)
        return Config(**parts)
    except ValueError as error:
        raise ConfigError(f"{place(str(error).partition(' ')[0])}: {error}") from None


def _sources(path: Path, text: str, tables: Any, place: str) -> tuple[SourceConfig, ...]:
    """The tables [[data.sources]], each checked like a section."""
    if type(tables) is not list or not tables or not all(type(table) is dict for table in tables):
        raise ConfigError(f"{place}: {SOURCES} = {tables!r}: must be one or more tables, [[{SOURCES}]]")
    sources = []
    for number, table in enumerate(tables):
        where = {name: _place(path, text, f"{SOURCES}.{name}", number) for name in table}
        values = {name: _field(SOURCES, name, value, where[name]) for name, value in table.items()}
        for name in ("source", "weight"):
            if name not in values:
                raise ConfigError(f"{next(iter(where.values()), path)}: {SOURCES}.{name}: is missing in this table")
        try:
            sources.append(SourceConfig(**values))
        except ValueError as error:
            name = str(error).partition(" ")[0].rpartition(".")[2]
            raise ConfigError(f"{where[name]}: {error}") from None
    return tuple(sources)


def _check(dotted: str, value: Any, place: str) -> Any:
    """The value, if the field exists and has the value's type; an int serves as a float."""
    section, _, name = dotted.partition(".")
    if dotted in TOP:
        return _typed(dotted, value, str, place)
    if dotted in SECTIONS:
        raise ConfigError(f"{place}: {dotted} = {value!r}: must be a section, [{dotted}]")
    if section not in SECTIONS:
        raise ConfigError(f"{place}: {section}: no such section{_closest(section, SECTIONS)}")
    if dotted in RENAMED:
        raise ConfigError(f"{place}: {dotted}: renamed to {RENAMED[dotted]}")
    return _field(section, name, value, place)


def _field(section: str, name: str, value: Any, place: str) -> Any:
    if name not in fields(section):
        raise ConfigError(f"{place}: {section}.{name}: no such field{_closest(name, fields(section), section + '.')}")
    return _typed(f"{section}.{name}", value, fields(section)[name], place)


def _typed(dotted: str, value: Any, expected: type, place: str) -> Any:
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{place}: {dotted} = {value!r}: must be {_named(expected)}, is {_named(type(value))}")
    return value


def _parse(dotted: str, word: str) -> Any:
    """A command-line word as the TOML value that it looks like, except that a string field takes it as it stands."""
    section, _, name = dotted.partition(".")
    if section not in SECTIONS or fields(section).get(name) is str:
        return word
    try:
        return tomllib.loads(f"x = {word}")["x"]
    except tomllib.TOMLDecodeError:
        return word


def _named(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", list: "a list"}
    return names.get(kind, kind.__name__)


def _closest(word: str, candidates: Any, prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(candidates), 1, 0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _place(path: Path, text: str, dotted: str, table: int = 0) -> str:
    """`file:line` of a dotted key in a TOML text, in the [[section]] with number `table`; only the file where the key
    does not stand in it."""
    section, _, name = dotted.rpartition(".")
    current, seen = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            current = header[1]
            seen += current == section
        elif current == section and seen in (0, table + 1) and re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=", line):
            return f"{path}:{number}"
    return str(path)
