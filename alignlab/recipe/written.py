"""The settings that recipe files and overrides write down, each with the place it was written: file:line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import RecipeError
from alignlab.recipe.fields import suggest

Key = tuple[str, ...]  # ("dpo", "beta")
HERE = Path(__file__).parents[1]
SHIPPED = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"  # a wheel's, or a checkout's


@dataclass(frozen=True)
class Written:
    value: Any
    where: str  # recipes/mistral.yaml:9, or command line: 'dpo.beta=0.3'
    folder: Path  # that file names are relative to


@dataclass(frozen=True)
class Text:
    """YAML from a file, or from one override on the command line."""

    content: str
    name: str
    folder: Path
    is_file: bool

    def at(self, mark: yaml.Mark | None) -> str:
        return f"{self.name}:{mark.line + 1}" if self.is_file and mark else self.name

    def compose(self) -> tuple[yaml.SafeLoader, yaml.Node | None]:
        try:
            loader = _Loader(self.content)
            return loader, loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            at = self.at(error.problem_mark or error.context_mark)
            raise RecipeError(f"{at} is not YAML: {error.problem or error.context}") from error
        except yaml.YAMLError as error:  # a control character; its second line names a stream
            raise RecipeError(f"{self.name} is not YAML: {str(error).splitlines()[0]}") from error
        except RecursionError as error:
            raise RecipeError(f"{self.name} is nested too deeply to be a recipe") from error

    def leaves(
        self, loader: yaml.SafeLoader, node: yaml.Node, key: Key, faults: list[str]
    ) -> Iterator[tuple[Key, Any]]:
        """Every value below `node` that is not a mapping with keys of its own; `key` says where `node` stands."""
        if not isinstance(node, yaml.MappingNode) or not node.value:
            yield key, Written(self._construct(loader, node), self.at(node.start_mark), self.folder)
            return
        seen: dict[str, yaml.Mark] = {}
        for name, value in node.value:
            below = (*key, self._word(name))
            if below[-1] in seen:
                places = f"{self.at(seen[below[-1]])}, {self.at(name.start_mark)}"
                faults.append(f"{'.'.join(below)} is set twice ({places}); keep one")
                continue
            seen[below[-1]] = name.start_mark
            yield from self.leaves(loader, value, below, faults)

    def _word(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value or not node.value.isprintable():
            raise RecipeError(f"{self.at(node.start_mark)} has a key that is not a word; write key: value")
        return node.value

    def _construct(self, loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        try:
            return loader.construct_object(node, deep=True)
        except (
            yaml.MarkedYAMLError,
            ValueError,
            LookupError,
        ) as error:  # an unknown !tag, a 13th month
            raise RecipeError(f"{self.at(node.start_mark)} is not YAML: {getattr(error, 'problem', error)}") from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor} refers to another place; write its value out", event.start_mark
            )
        return super().compose_node(parent, index)


def read_recipe(path: Path, faults: list[str], chain: tuple[Path, ...] = ()) -> dict[Key, Written]:
    """Every setting of the file and of what it extends, the file's own winning; `about` is never inherited."""
    own = _read_file(path, faults)
    base = own.pop(("extends",), None)
    merged: dict[Key, Written] = {}
    if base is not None:
        above = _find_base(path, base, (*chain, path))
        merged = read_recipe(above, faults, (*chain, path))
        merged.pop(("about",), None)
    return merge(merged, own)


def read_overrides(overrides: Sequence[str], faults: list[str]) -> dict[Key, Written]:
    """The settings of `section.key=value` arguments; one given twice is a fault, as it would be ignored."""
    given: dict[Key, Written] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        where = f"command line: {override!r}"
        if not (equals and value.strip() and all(name.split(".")) and name.isprintable()):
            faults.append(f"{where} is not an override; write section.key=value, such as dpo.beta=0.3")
            continue
        text = Text(_plain(value), where, Path(), is_file=False)
        try:
            loader, node = text.compose()
            if node is None:  # a comment and nothing else
                faults.append(f"{where} has no value; quote one that begins with #")
                continue
            leaves = list(text.leaves(loader, node, tuple(name.split(".")), faults))
        except RecipeError as error:
            faults.append(str(error))
            continue
        for key, item in leaves:
            if twice := [other for other in given if _touch(key, other)]:
                faults.append(f"{'.'.join(key)} is set twice ({given[twice[0]].where}, {where}); keep one")
            else:
                given[key] = item
    return given


def _plain(value: str) -> str:
    """The value, quoted where YAML would take the end of a plain one for a comment: a path may hold ` #`."""
    return json.dumps(value, ensure_ascii=False) if " #" in value and value.lstrip()[:1] not in "\"'[{" else value


def merge(below: dict[Key, Written], above: dict[Key, Written]) -> dict[Key, Written]:
    """Both, where `above` replaces what it touches; its `{}` takes nothing away from a mapping with keys."""
    merged = {key: item for key, item in below.items() if not _is_of_other_data(key, below, above)}
    for key, item in above.items():
        touching = [other for other in merged if _touch(key, other)]
        if item.value == {} and any(len(other) > len(key) for other in touching):
            continue
        for other in touching:
            if other != key:
                del merged[other]
        merged[key] = item
    return merged


# What a recipe says of `data.path`: its rows, and where it is a dataset of another name, the parts of it
_OF_ROWS, _OF_PARTS = ("source", "columns"), ("subset", "config", "split", "test_split")


def _is_of_other_data(key: Key, below: dict[Key, Written], above: dict[Key, Written]) -> bool:
    """Whether a setting describes the data of a path that `above` replaces by another one."""
    section = next((prefix for prefix in (("data", "sft"), ("data",)) if key[: len(prefix)] == prefix), None)
    new = section and above.get((*section, "path"))
    if not section or not new or len(key) == len(section):
        return False
    names = [Path(str(item.value)).name for item in (new, below.get((*section, "path"))) if item]
    gone = _OF_ROWS if len({*names}) == 1 and len(names) == 2 else _OF_ROWS + _OF_PARTS
    return key[len(section)] in gone


def _touch(one: Key, other: Key) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))


def find_recipe(name: str) -> Path:
    """The file of a name in ./recipes or among the shipped recipes; with a slash or .yaml it is a path."""
    if Path(name).suffix in (".yaml", ".yml") or len(Path(name).parts) > 1:
        return _first_file([Path(name).parent], Path(name).name, f"no recipe {name!r}")
    if Path(f"{name}.yaml").is_file() and not Path("recipes", f"{name}.yaml").is_file():
        raise RecipeError(f"no recipe {name!r} in recipes; the file in this folder is {name}.yaml, with its ending")
    return _first_file([Path("recipes"), SHIPPED], f"{name}.yaml", f"no recipe {name!r}")


def _find_base(path: Path, base: Written, chain: tuple[Path, ...]) -> Path:
    if not isinstance(base.value, str):
        raise RecipeError(f"extends is {base.value!r} ({base.where}); name one recipe")
    file = base.value if base.value.endswith(".yaml") else f"{base.value}.yaml"
    above = _first_file([path.parent, SHIPPED], file, f"extends is {base.value!r} ({base.where}), which is no recipe")
    if above.resolve() in [link.resolve() for link in chain]:
        circle = " → ".join(shown(link) for link in (*chain, above))
        raise RecipeError(f"extends goes in a circle ({base.where}): {circle}")
    return above


def _first_file(folders: Sequence[Path], file: str, fault: str) -> Path:
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    names = sorted({found.stem for folder in folders for found in folder.glob("*.yaml")})
    looked = " and ".join(dict.fromkeys(shown(folder) for folder in folders))
    near = suggest(Path(file).stem, names, 0.6) or "; `alignlab list` has the recipes that are there"
    raise RecipeError(f"{fault} (looked in {looked}){near}")


def shown(path: Path) -> str:
    """The path as a user would type it from here."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def _read_file(path: Path, faults: list[str]) -> dict[Key, Written]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown(path)} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{shown(path)} cannot be read: {error.strerror}") from error
    text = Text(content, shown(path), path.parent, is_file=True)
    loader, node = text.compose()
    if node is None or (isinstance(node, yaml.MappingNode) and not node.value):
        raise RecipeError(f"{shown(path)} is empty; a recipe needs at least data.source and model.name")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{text.at(node.start_mark)} is not a section; a recipe is sections such as data: and dpo:")
    return dict(text.leaves(loader, node, (), faults))
