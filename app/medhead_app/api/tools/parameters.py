"""The parameters of a function, for formats that write each argument by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from medhead.errors import MedheadError

NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}  # of a schema, without effect
_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", *NOTES}


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: of the parameter.
        schema: JSON schema of its values, with the definitions that it may refer to.
        required: whether every call has it.
    """

    name: str
    schema: dict[str, Any]
    required: bool

    @property
    def is_free(self) -> bool:
        """Whether nothing but the type of the values is said."""
        return all(set(one) <= {"type", *NOTES} for one in alternatives(self.schema))


def not_constrained(function: str, what: str) -> MedheadError:
    """Return the error for arguments that a format cannot constrain."""
    others = "the formats hermes, llama3_json and mistral can"
    return MedheadError(f"the calls of {function} cannot be constrained in the format of this model: {what}; {others}")


def parameters_of(function: str, schema: dict[str, Any]) -> list[Parameter] | None:
    """Return the parameters of a function in their order, None where any arguments are allowed.

    Properties that the schema does not name are left out, also where it allows them.

    Raises:
        MedheadError: the schema says more than which properties there are.
    """
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if odd := sorted(set(schema) - _OBJECT):
        raise not_constrained(function, f"the schema of its parameters has {odd[0]!r}")
    if unknown := [name for name in required if name not in properties]:
        raise not_constrained(function, f"{unknown[0]!r} is required and no property")
    if not properties and schema.get("additionalProperties", True) is not False:
        if schema.get("additionalProperties", True) not in (True, {}):
            raise not_constrained(function, "additionalProperties has a schema")
        return None
    found = []
    for name, one in properties.items():
        if one is False:
            raise not_constrained(function, f"{name!r} has no value")
        found.append(Parameter(name, with_definitions(schema, one), name in required))
    if _refers_elsewhere(schema):
        raise not_constrained(function, "a $ref does not begin with #/$defs/ or #/definitions/")
    return found


def with_definitions(root: dict[str, Any], schema: dict[str, Any] | bool) -> dict[str, Any]:
    """Return a part of a schema with the definitions of the whole."""
    return {**_definitions(root), **({} if schema is True or schema is False else schema)}


def alternatives(schema: dict[str, Any], depth: int = 8) -> list[dict[str, Any]]:
    """Return the schemas of which a value has one, references and alternatives resolved as far as this depth."""
    definitions = _definitions(schema)
    own = {key: value for key, value in schema.items() if key not in definitions}
    said = set(own) - NOTES
    if depth and said == {"$ref"} and (found := _definition(own["$ref"], definitions)) is not None:
        return alternatives({**definitions, **found}, depth - 1)
    for key in ("anyOf", "oneOf"):
        if depth and said == {key} and all(isinstance(one, dict) for one in own[key]):
            return [found for one in own[key] for found in alternatives({**definitions, **one}, depth - 1)]
    return [own]


def types_of(schema: dict[str, Any]) -> frozenset[str]:
    """Return the types that values may have, none where they are not known."""
    found: set[str] = set()
    for one in alternatives(schema):
        values = listed_values(one)
        types: Any = one.get("type") if values is None else [_type_of(value) for value in values]
        if not types:
            return frozenset()
        found |= {types} if isinstance(types, str) else set(types)
    return frozenset(found)


def listed_values(schema: dict[str, Any]) -> list[Any] | None:
    """Return the values that a schema lists by `enum` or `const`, None where it lists none."""
    values: list[Any] | None = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values


def has_type(value: Any, types: frozenset[str]) -> bool:
    """Return whether a value of JSON has one of these types."""
    whole = isinstance(value, float) and value.is_integer() and "integer" in types
    return _type_of(value) in types or whole or (_type_of(value) == "integer" and "number" in types)


def _type_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null" if value is None else "")


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _definition(ref: Any, definitions: dict[str, Any]) -> dict[str, Any] | None:
    path = re.fullmatch(r"#/(\$defs|definitions)/([^/~%]+)", str(ref))
    found = definitions.get(path[1], {}).get(path[2]) if path else None
    return found if isinstance(found, dict) else None


def _refers_elsewhere(value: Any) -> bool:
    """Return whether a schema in this value refers to anything but definitions."""
    if isinstance(value, list):
        return any(_refers_elsewhere(one) for one in value)
    if not isinstance(value, dict):
        return False
    ref = value.get("$ref")
    if isinstance(ref, str) and not ref.startswith(("#/$defs/", "#/definitions/")):
        return True
    return any(_refers_elsewhere(one) for one in value.values())
