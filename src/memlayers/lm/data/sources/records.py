"""From a record with a text, and perhaps an id, to a document."""

from collections.abc import Mapping
from typing import Any

from memlayers.lm.data.sources.base import Document


def to_document(record: Mapping[str, Any], place: str, *, text_field: str, id_field: str) -> Document:
    """The document of a record. One without an id, or with an empty one, has its text as its key.

    Raises `ValueError` naming the `place` if the text is missing or no string, or the id no string or integer.
    """
    if text_field not in record:
        raise ValueError(f"{place}: no field {text_field!r} (text_field); it has {', '.join(map(repr, record))}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {text_field!r} is {type(text).__name__}, expected a string")
    key = record.get(id_field)
    if key is None or key == "":
        key = text
    elif isinstance(key, bool) or not isinstance(key, str | int):
        raise ValueError(f"{place}: field {id_field!r} is {type(key).__name__}, expected a string or an integer")
    try:
        f"{key}{text}".encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise ValueError(f"{place}: a string holds a lone surrogate, which UTF-8 cannot encode") from None
    return Document(str(key), text)
