"""What may stand under the stages' sections and `model.lora:`, read from the installed TRL, transformers and PEFT.

Importing those classes takes seconds, so their field names, types and defaults are kept as JSON in
`$ALIGNLAB_CACHE` (default ~/.cache/alignlab), in a file named after the versions it was read from.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from alignlab.disk import cache_folder, read_record, write_record
from alignlab.errors import MachineError
from alignlab.recipe.objectives import STAGES, config_class

log = logging.getLogger(__name__)

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 5e-6, which YAML 1.1 reads as a string


@dataclass(frozen=True)
class Setting:
    """What one key may hold; `types` are those of YAML: bool, int, float, str, null, mapping, list[…], any."""

    types: tuple[str, ...]
    choices: tuple[str, ...] = ()  # of a str, or of the strings in a list
    default: Any = None
    required: bool = False

    def read(self, value: Any) -> Any:
        """`value` as this setting takes it; ValueError says what was expected.

        Nothing is cast but what YAML cannot write otherwise: `5e-6` becomes a float where no string may stand, in a
        list too, and a single item becomes a list where only a list may stand.
        """
        value = _with_numbers(value, self.types)
        if not any(_fits(value, kind) for kind in self.types):
            if not any(_fits([value], kind) for kind in self.types):
                raise ValueError(f"expected {' or '.join(self.types)}" + self._quoting(value))
            value = [value]
        for text in value if isinstance(value, list) else [value]:
            if self.choices and isinstance(text, str) and text not in self.choices:
                known = ", ".join(self.choices) if len(self.choices) <= 16 else "a known name"
                raise ValueError(f"expected {known}{suggest(text, self.choices)}")
        return value

    def _quoting(self, value: Any) -> str:
        return "; write it in quotes" if "str" in self.types and not isinstance(value, (list, dict)) else ""


def suggest(word: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """`; did you mean 'beta'?` for `bta`, or nothing where no known word is near."""
    begun = [name for name in known if len(word) > 2 and name.startswith(word)]
    near = begun or get_close_matches(word, list(known), 1, cutoff=likeness)
    return f"; did you mean {near[0]!r}?" if near else ""


def _with_numbers(value: Any, kinds: Iterable[str]) -> Any:
    """`5e-6` as the number it is where these kinds admit one and no string, alone or as an item of a list."""
    of_items = [each for kind in kinds for each in _item_kinds(kind)]
    if isinstance(value, list):
        return [_with_numbers(item, of_items) for item in value]
    admitted = {*kinds, *of_items}
    is_number = isinstance(value, str) and "float" in admitted and not admitted & {"str", "any"}
    return float(value) if is_number and EXPONENT.fullmatch(value) else value


def _item_kinds(kind: str) -> list[str]:
    return kind[5:-1].split("|") if kind.startswith("list[") else []


def _fits(value: Any, kind: str) -> bool:
    if kind.startswith("list["):
        return isinstance(value, list) and all(any(_fits(item, k) for k in _item_kinds(kind)) for item in value)
    if isinstance(value, bool):
        return kind in ("bool", "any")
    python: dict[str, Any] = {
        "int": int,
        "float": (int, float),
        "str": str,
        "null": type(None),
        "mapping": dict,
        "any": object,
    }
    return isinstance(value, python.get(kind, ()))


def setting(hint: Any, default: Any = MISSING, choices: tuple[str, ...] = ()) -> Setting:
    """The setting that a type hint describes, as it can be written in YAML."""
    kinds = dict(_kinds(hint))
    named = choices or tuple(text for texts in kinds.values() for text in texts)
    if any("[" in text for text in named):  # a pattern such as peft's 'pissa_niter_[number of iters]'
        named = ()
    required = default is MISSING
    return Setting(tuple(kinds), named, None if required else _plain(default), required)


def _kinds(hint: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Each YAML type that `hint` admits, with the strings it is limited to."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        merged: dict[str, tuple[str, ...]] = {}
        for kind, texts in (pair for arg in args for pair in _kinds(arg)):
            merged[kind] = merged.get(kind, ()) + texts
        return list(merged.items())
    if origin is Literal:
        names = tuple(arg for arg in args if isinstance(arg, str))
        return [("str", names)] if names else [(type(args[0]).__name__, ())]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [("str", tuple(str(member.value) for member in hint))]
    if origin in (list, tuple, set):
        return [(f"list[{'|'.join(kind for kind, _ in _kinds(args[0]))}]", ())]
    if hint is type(None):
        return [("null", ())]
    if hint in (bool, int, float, str):
        return [(hint.__name__, ())]
    if hint is Any:
        return [("any", ())]
    return [("mapping", ())]  # dicts, and the nested config classes that peft builds from dicts


def _plain(default: Any) -> Any:
    if isinstance(default, Enum):
        return default.value
    return default if isinstance(default, (bool, int, float, str, list, dict)) else None


@cache
def library_settings() -> Mapping[str, Mapping[str, Setting]]:
    """The keyword arguments of each stage's config of TRL, by stage, and `lora` (peft.LoraConfig)."""
    path = cache_folder() / f"fields-{_versions()}.json"
    try:
        return _decode(read_record(path))
    except OSError:
        pass
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        log.warning("%s cannot be used (%s: %s); the libraries are read again", path, type(e).__name__, e)
    described = _describe_libraries()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {name: {k: asdict(s) for k, s in of.items()} for name, of in described.items()})
    return described


def _versions() -> str:
    from importlib.metadata import version

    libraries = "-".join(f"{name}{version(name)}" for name in ("trl", "transformers", "peft"))
    return f"{libraries}-{sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"  # and of how they are read, this file


def _decode(cached: dict) -> dict[str, dict[str, Setting]]:
    return {
        library: {
            key: Setting(tuple(s["types"]), tuple(s["choices"]), s["default"], s["required"]) for key, s in of.items()
        }
        for library, of in ((name, cached[name]) for name in (*STAGES, "lora"))
    }


def _describe_libraries() -> dict[str, dict[str, Setting]]:
    from peft import LoraConfig

    return {stage: _describe(_config_or_like(stage)) for stage in STAGES} | {"lora": _describe(LoraConfig)}


def _config_or_like(stage: str) -> Any:
    """Where TRL has a config no longer, DPO's stands in, so that recipes with its section can still be read."""
    try:
        return config_class(stage)
    except MachineError:
        return config_class("dpo")


def _describe(config: Any) -> dict[str, Setting]:
    hints = get_type_hints(config)
    fields: Mapping[str, Field] = config.__dataclass_fields__
    return {
        name: setting(hints[name], _default(field), _listed_choices(field))
        for name, field in fields.items()
        if field.init
    }


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _listed_choices(field: Field) -> tuple[str, ...]:
    """The choices that a field declares, or that its help lists after "Possible values are"."""
    if "choices" in field.metadata:
        return tuple(field.metadata["choices"])
    _, found, listed = field.metadata.get("help", "").partition("Possible values are")
    return tuple(re.findall(r"`'?(\w+)'?`", listed.partition(".")[0])) if found else ()
