"""Declared options: type, default, range and help of an input, stated once; and the sentence on a value that is not accepted.

An option is a field of an `options_class`, `steps: Annotated[Whole, option(HEADING, ge=1, le=200)] = 50`, with its help as the
docstring below it. The command line, the YAML file, the checks and the tables in docs/ follow from these fields. train.py
and predict.py repeat them, because Cog reads nothing but literals; a test compares.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, SecretStr, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from placeholder.errors import label, reason, shown

MAX_TEXT_CHARACTERS = 20_000
MAX_SEED = 2**32 - 1
MAX_YAML_BYTES = 2 * 1024**2  # half a dozen texts of MAX_TEXT_CHARACTERS fit, also with every character escaped
Model = TypeVar("Model")

# The decorator of a class whose fields are options.
options_class = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))


def _number(value: Any) -> Any:
    """Text that is a number counts as one (YAML 1.1 reads 1e-5, without a dot, as text); true and false do not."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return float(value) if isinstance(value, str) else value


def _tokens(value: Any) -> Any:
    """Tokens separated by commas, as a list; a comma at the end adds none."""
    return [token.strip(" ") for token in value.strip().rstrip(", ").split(",")] if isinstance(value, str) else value or ()


NUMERIC = BeforeValidator(_number)
Whole = Annotated[int, NUMERIC]
Number = Annotated[float, NUMERIC]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
Flag = StrictBool
Tokens = Annotated[tuple[Text, ...], BeforeValidator(_tokens)]
TOKENS = "give text, tokens separated by commas"
DRAWN = AfterValidator(lambda seed: None if seed == -1 else seed)  # a seed of -1 counts as blank, as in other tools


def option(heading: str, section: str | None = None, accepts: str = "", **field: Any) -> FieldInfo:
    """The annotation of a field that is an option.

    `heading` is the one of --help, `section` the one of the YAML file. `accepts` says what is accepted where type, range and
    choices do not. `resume_may_change=True`: a resumed training may have another value. `blank=True`: the input may be left
    blank, whatever the default of the field. The other keywords are those of pydantic's Field.
    """
    extra = {name: field.pop(name, False) for name in ("resume_may_change", "blank")}
    return Field(json_schema_extra={"heading": heading, "section": section, "accepts": accepts, **extra}, **field)


@dataclass(frozen=True)
class Option:
    """An option as an input: `default` None where it has none, `low` and `high` None without a range."""

    name: str
    kind: type  # int, float, bool, str, Path or SecretStr
    default: Any
    low: float | None
    high: float | None
    choices: tuple
    description: str
    heading: str
    section: str | None
    resume_may_change: bool
    accepts: str
    blank: bool  # may be left blank: None, or empty text
    deprecated: bool = False

    @classmethod
    def of(cls, name: str, field: FieldInfo) -> "Option":
        """The option that a field declares."""
        kind, choices = _kind(field.annotation)
        low, high = (
            next((getattr(part, bound) for part in field.metadata if hasattr(part, bound)), None) for bound in ("ge", "le")
        )
        extra = dict(field.json_schema_extra)
        extra["accepts"] = extra["accepts"] or _accepts(kind, low, high, choices)
        default = None if extra["blank"] or field.is_required() else field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default)) or None
        extra["blank"] = default is None and not field.is_required()
        return cls(name, kind, default, low, high, choices, field.description, **extra)


@cache
def options_of(model: type) -> dict[str, Option]:
    """The options that a pydantic dataclass declares, by name, in their order."""
    return {name: Option.of(name, field) for name, field in model.__pydantic_fields__.items()}


def checked(model: type[Model], values: dict[str, Any]) -> Model:
    """The dataclass with these values; a blank one counts as not given, unless the option is required.

    Raises ValueError, one sentence, for the first value that is not accepted.
    """
    options, fields = options_of(model), model.__pydantic_fields__
    given = {name: value for name, value in values.items() if fields[name].is_required() or not is_blank(value)}
    try:
        return model(**given)
    except ValidationError as error:
        name = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0]
        raise ValueError(_sentence(name, values.get(name), options[name].accepts)) from None


def is_blank(value: Any) -> bool:
    """Whether an input was left empty: None, or text of nothing but white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within [low, high]. Raises ValueError, one sentence, for anything else."""
    try:
        return TypeAdapter(Annotated[Whole, Field(ge=low, le=high)]).validate_python(value)
    except ValidationError:
        raise ValueError(_sentence(name, value, _accepts(int, low, high))) from None


def _kind(annotation: Any) -> tuple[type, tuple]:
    """The plain type of an annotation, and its choices."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType, Annotated):  # X | None
        return _kind(args[0])
    if origin is Literal:
        return type(args[0]), args
    return (str if origin is tuple else annotation), ()


def _accepts(kind: type, low: float | None, high: float | None, choices: tuple = ()) -> str:
    if choices:
        return f"choose one of {', '.join(map(str, choices))}"
    if kind in (int, float):
        return f"give {'a whole number' if kind is int else 'a number'} from {low} to {high}"
    if kind in (Path, SecretStr):
        return "give a path" if kind is Path else "give text"
    return "give true or false" if kind is bool else f"give text of at most {MAX_TEXT_CHARACTERS} characters"


def _sentence(name: str, value: Any, accepts: str) -> str:
    too_long = isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS
    return f"{name} is {f'{len(value)} characters long' if too_long else shown(value)}: {accepts}"


def read_sections(path: Path | str, known: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The options of a YAML file, as they are written; `known` holds the names of each section.

    Raises ValueError, one sentence, where it is no such file or names an option that its section does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config {label(path.name or str(path))} is not a file: give a YAML file")
    content = path.read_bytes()
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"config is {len(content)} bytes: a configuration file has at most {MAX_YAML_BYTES}")
    try:
        document = _PlainLoader(content).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # also an impossible date or number
        raise ValueError(f"config is not a YAML file: {reason(error)}") from error
    if not isinstance(document, dict | None):
        raise ValueError(f"config holds a {type(document).__name__}: expected the sections {', '.join(known)}")
    options: dict[str, Any] = {}
    for section, entries in (document or {}).items():
        if section not in known:
            raise ValueError(f"config has an unknown section {shown(section)}: known are {', '.join(known)}")
        if not isinstance(entries, dict | None):
            raise ValueError(f"config section {section} holds a {type(entries).__name__}: expected option names with values")
        for name in (entries or {}).keys() - set(known[section]):
            named = label(name) if isinstance(name, str) else shown(name)
            names = "; ".join(f"{part}: {', '.join(names)}" for part, names in known.items())
            raise ValueError(f"config has an unknown key {section}.{named}: known are {names}")
        options |= entries or {}
    return options


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, aliases and names that stand twice.

    A tag can fail in any way, and aliases within merge keys grow without bound.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("tags (!name) and aliases (*name) are not read, write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As before; YAMLError for a name that stands twice."""
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, times in names.items() if times > 1]:
            raise yaml.YAMLError(f"{label(twice[0])} stands twice in one section")
        return super().construct_mapping(node, deep)
