"""From YAML and ``key=value`` overrides to a validated config, with errors that name the key and the nearest valid one."""

import contextlib
import functools
import operator
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel

from jaxreason.config.run import ALGORITHMS, RunConfig
from jaxreason.config.schema import Section
from jaxreason.config.text import read_yaml
from jaxreason.errors import UserError
from jaxreason.paths import expanded
from jaxreason.plugins import nearest

_DEPTH = 50  # of values in values

AnySection = typing.TypeVar("AnySection", bound=Section)


def find(name: str) -> Path:
    """The YAML file that ``--config NAME|PATH`` means. Raises UserError with the known names."""
    path = expanded(name, "--config")
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"--config {name}: no such file")
    for root in _roots():
        if (root / f"{name}.yaml").is_file():
            return root / f"{name}.yaml"
    known, searched = names(), ", ".join(map(str, _roots()))
    raise UserError(f"--config {name}: no such config{nearest(name, known)}; known: {', '.join(known)} (searched: {searched})")


def _roots() -> list[Path]:
    """Where configs are looked for by name: below the current directory, in the clone of the repository, in the package."""
    here = Path(__file__).resolve().parent.parent
    return [root for root in (Path.cwd() / "configs", here.parent / "configs", here / "configs") if root.is_dir()]


def names() -> list[str]:
    """The configs that ``--config`` takes by name."""
    return sorted({str(p.relative_to(r).with_suffix("")) for r in _roots() for p in r.rglob("*.yaml")})


def load(name: str, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads config ``name``, applies ``key=value`` overrides, validates. Raises UserError."""
    path = find(name)
    try:
        values = read_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: the file is {found}; a config is made of sections with keys, as configs/sft.yaml")
    return build(values, overrides, str(path))


def build(values: dict[str, Any], overrides: typing.Sequence[str] = (), where: str = "config") -> RunConfig:
    """A validated config from plain values and ``key=value`` overrides; ``where`` names the file in messages."""
    values = _copy(values)
    words = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not of the form key=value, e.g. optimizer.learning_rate=1e-4")
        words[key] = word
        _assign(values, key, _word_value(_class_of(values), key, text, word), word)
    _check_depth(values, where)
    algorithm = values.get("algorithm")
    if (config_class := _class_of(values)) is None:
        raise UserError(f"{where}: algorithm is {algorithm!r}; it is one of {', '.join(ALGORITHMS)}")
    try:
        return config_class.model_validate(_numbers(values, config_class, ""))
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, config_class, where, words)) from None


def _class_of(values: dict) -> type[RunConfig] | None:
    algorithm = values.get("algorithm")
    return ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None


def parse_words(
    section: type[AnySection], words: typing.Sequence[str], values: dict[str, Any] | None = None, where: str = "command line"
) -> AnySection:
    """A section from ``key=value`` overrides, and the plain values of a file that they change. Raises UserError."""
    values = _copy(values or {})
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not of the form key=value, e.g. temperature=0.6")
        _assign(values, key, _word_value(section, key, text, word), word)
    try:
        return section.model_validate(_numbers(values, section, ""))
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, section, where, {})) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every key present."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys (dotted) whose values differ between two dumped configs, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def json_schema() -> dict:
    """JSON Schema of the config files, for editors."""
    return pydantic.TypeAdapter(functools.reduce(operator.or_, ALGORITHMS.values())).json_schema(by_alias=True)


def _word_value(section: type[BaseModel] | None, key: str, text: str, word: str) -> Any:
    """The value of a ``key=value`` word: YAML, but what goes to a text stays as typed (``run.name=1``, ``a: b``)."""
    annotation: Any = section
    for part in key.split("."):
        section = _section(annotation) if annotation is not None else None
        fields = {field.alias or name: field for name, field in section.model_fields.items()} if section else {}
        annotation = fields[part].annotation if part in fields else None
    if annotation is str or typing.get_args(annotation) == (str, types.NoneType):
        with contextlib.suppress(UserError):
            value = read_yaml(text, word)
            if isinstance(value, str) or (value is None and annotation is not str):
                return value
        return text
    return read_yaml(text, word)


def _check_depth(value: Any, where: str, left: int = _DEPTH) -> None:
    """Raises UserError for values that are nested more deeply than any config is."""
    if left == 0:
        raise UserError(f"{where}: values are nested more than {_DEPTH} deep; a config needs no more than five levels")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, where, left - 1)


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, dict) else values


def _assign(values: dict, key: str, value: Any, word: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{word}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The Section in an annotation, looking through Optional and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if found := _section(inner):
            return found
    return None


def _wants_float(annotation: Any) -> bool:
    if annotation is float:
        return True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return any(_wants_float(inner) for inner in typing.get_args(annotation))
    return False


def _wants(annotation: Any, kinds: tuple[type, ...]) -> bool:
    """Whether one of ``kinds`` is what the annotation takes, or what the list does that it takes."""
    return annotation in kinds or any(_wants(inner, kinds) for inner in typing.get_args(annotation))


def _check_plain(value: Any, annotation: Any, key: str) -> None:
    """Raises UserError for what pydantic would take for something else: a truth value for 1, nothing for a text."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bool) and _wants(annotation, (int, float)) and not _wants(annotation, (bool,)):
            raise UserError(f"{key} is {str(item).lower()}: a number is expected, not a truth value")
    if value == "" and annotation is str:
        raise UserError(f"{key} is empty; give it a value")


def _numbers(values: Any, section: type[BaseModel], prefix: str) -> Any:
    """YAML 1.1 reads ``3e-4`` as a string; where the schema wants a float, make it one."""
    if not isinstance(values, dict):
        return values
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    done = {}
    for key, value in values.items():
        field = fields.get(key)
        if field is not None:
            _check_plain(value, field.annotation, f"{prefix}{key}")
        if field is not None and isinstance(value, str) and _wants_float(field.annotation):
            try:
                value = float(value)
            except ValueError:
                raise UserError(f"{prefix}{key} is {value!r}, which is not a number") from None
        elif field is not None and (inner := _section(field.annotation)) and isinstance(value, dict):
            value = _numbers(value, inner, f"{prefix}{key}.")
        elif isinstance(value, dict):
            value = _loose_numbers(value)
        done[key] = value
    return done


def _loose_numbers(values: dict) -> dict:
    """The same for free-form options, where no schema says what is a number."""
    done = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _loose_numbers(value)
        elif isinstance(value, str) and value[:1] in "+-.0123456789" and value[:1]:
            with contextlib.suppress(ValueError):
                value = float(value)
        done[key] = value
    return done


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key below ``section``."""
    found = []
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        inner = _section(field.annotation)
        found += keys(inner, key + ".") if inner else [key]
    return found


def _explain(error: pydantic.ValidationError, config_class: type[BaseModel], where: str, words: dict) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        place = f"{words[key]} (command line)" if key in words else f"{where}{_line(where, item['loc'])}"
        if item["type"] == "extra_forbidden":
            known = keys(config_class)
            sections = sorted({k.split(".")[0] for k in known})
            if (owner := [name for name, other in ALGORITHMS.items() if other is not config_class
                          and any(k == key or k.startswith(key + ".") for k in keys(other))]):  # fmt: skip
                lines.append(f"{place}: {key} is a key of algorithm {owner[0]}, not of this config's")
            else:
                pool = known if "." in key else known + sections
                lines.append(f"{place}: unknown key {key}{nearest(key, pool)}")
        elif item["type"] == "missing":
            lines.append(f"{place}: {key} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{place}: {item['ctx']['error']}")
        else:
            lines.append(f"{place}: {key} is {item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def _line(where: str, loc: tuple) -> str:
    """``, line N`` of a key in a YAML file, if it is there."""
    path = Path(where)
    if not path.is_file():
        return ""
    node, line = yaml.compose(path.read_text()), None
    for part in loc:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = [(k, v) for k, v in pairs if k.value == str(part)]
        if not match:
            break
        line, node = match[0][0].start_mark.line + 1, match[0][1]
    return f", line {line}" if line else ""

