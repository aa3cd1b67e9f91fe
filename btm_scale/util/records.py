"""Records: the JSON files that btm-scale writes and reads, each a pydantic model with a schema number.

A record's JSON object has the key `schema` and one key per field. A file from before a record had a schema number
counts as schema 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from btm_scale.errors import UserError
from btm_scale.util.bounded_json import parse_json, read_bounded, shown
from btm_scale.util.files import write_file

_PROBLEMS = 3  # listed in a message
_LONGEST_NAME = 100  # characters of a key in a message
_LONGEST_FILE_NAME = 255  # bytes, of most file systems


def _name_inside(name: str) -> str:
    parts = name.split("/")
    if name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError("must be the name of a model or a file inside the run")
    if any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_FILE_NAME for part in parts):
        raise ValueError(f"must have at most {_LONGEST_FILE_NAME} bytes between slashes")
    return name


# A name from which a path in the run's folder is made: a record may be from another user.
InsideName = Annotated[str, AfterValidator(_name_inside)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def is_empty(value: Any) -> bool:
    """Return whether to leave a field out of its file: `exclude_if` of fields added after the first version."""
    return not value


class Part(BaseModel):
    """An object inside a record: strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Record(Part):
    """A JSON file with a schema number.

    A subclass sets `ERROR`, what `load` raises, and completes its messages: `ABSENT` if there is no file, and `REMEDY`
    if it is damaged. Both may name `{path}` and `{folder}`.
    """

    SCHEMA: ClassVar[int] = 1
    ERROR: ClassVar[type[UserError]] = UserError
    ABSENT: ClassVar[str] = "{path} does not exist. Give the path of an existing file."
    REMEDY: ClassVar[str] = "Restore {path} from a copy, or delete it."

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the record in a file. Raises `ERROR`, with file and field, if it is missing, damaged or newer.

        Types are checked strictly: a number in quotes is not a number.
        """
        values = read_object(path, cls.ERROR, absent=cls.ABSENT, remedy=cls.REMEDY, upgrade=cls.upgraded, unicode=False)
        schema = values.pop("schema", 1)
        if type(schema) is not int or schema != cls.SCHEMA:
            raise cls.ERROR(
                f"{path} has schema {shown(schema)}, and this version reads schema {cls.SCHEMA}. Update btm-scale."
            )
        try:
            # Strict validation knows from JSON alone that an array may become a tuple.
            text = json.dumps(values, ensure_ascii=False)
            try:
                content = text.encode()
            except UnicodeEncodeError:
                content = text.encode("utf-8", "replace")
                parse_json(content)  # raises if two keys have become one
            return cls.model_validate_json(content, strict=True)
        except ValidationError as error:
            raise cls.ERROR(_damaged(path, _sentence(error), cls.REMEDY)) from None
        except ValueError as problem:
            raise cls.ERROR(_damaged(path, str(problem), cls.REMEDY)) from None

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Return the record at `path`, or None if there is no such file. Raises as `load` does."""
        return cls.load(path) if path.is_file() else None

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """Return the JSON value of a file, written by any version, in the form of this version."""
        return content

    def save(self, path: Path) -> None:
        """Write the record atomically. Its folder must exist."""
        write_file(path, self._text())

    def write(self, path: Path) -> None:
        """Write the record into a directory that `files.publish_directory` will sync and name."""
        path.write_text(self._text(), encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """Return the JSON object: the schema number first, then the fields in their order."""
        return {"schema": self.SCHEMA, **self.model_dump()}

    def _text(self) -> str:
        return json.dumps(self.document(), indent=2) + "\n"


def read_object(
    path: Path,
    error: type[UserError],
    *,
    absent: str = Record.ABSENT,
    remedy: str = Record.REMEDY,
    upgrade: Callable[[Any], Any] = lambda content: content,
    unicode: bool = True,
) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `error` with the reason if there is none.

    `upgrade` converts the JSON value to the expected object. `unicode` is that of `parse_json`.
    """
    try:
        content = upgrade(parse_json(read_bounded(path), unicode=unicode))
    except FileNotFoundError:
        raise error(absent.format(path=path, folder=path.parent)) from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}. Make it readable for this user.") from None
    except ValueError as problem:
        raise error(_damaged(path, str(problem), remedy)) from None
    if not isinstance(content, dict):
        raise error(_damaged(path, f"a JSON {type(content).__name__}, and must be an object", remedy))
    return content


def _damaged(path: Path, problem: str, remedy: str) -> str:
    return f"{path} is {problem}. {remedy.format(path=path, folder=path.parent)}"


def _sentence(error: ValidationError) -> str:
    """Return the first problems of a record, each with its field."""
    problems = error.errors(include_url=False)
    words = []
    for problem in problems[:_PROBLEMS]:
        field = ".".join(str(part)[:_LONGEST_NAME] for part in problem["loc"])
        if problem["type"] == "missing":
            words.append(f"field '{field}' is missing")
        elif problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            words.append(f"field '{field}' is unknown to this version")
        elif problem["type"] == "value_error":
            words.append(f"field '{field}' {problem['ctx']['error']} and is {shown(problem['input'])}")
        else:
            rule = problem["msg"].replace("Input should be", "must be")
            words.append(f"field '{field}' {rule[0].lower()}{rule[1:]} and is {shown(problem['input'])}")
    more = f" and {len(problems) - _PROBLEMS} more" if len(problems) > _PROBLEMS else ""
    return f"not as this version writes it: {'; '.join(words)}{more}"
