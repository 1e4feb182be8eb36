"""explore: a page about what a model's memories read and say."""

import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from memlayers.checks import require_int
from memlayers.explorer.collect import Findings, answering, read_memories, read_text
from memlayers.explorer.pack import Room, Strings, figures, most_shown, pack
from memlayers.extras import require_extra
from memlayers.files import write_text
from memlayers.version import __version__

MOST_BYTES = 5_000_000  # of a page
ROOM = Room(reads=1_300_000, details=1_300_000, cells=300_000)
STRONGEST = 5  # reads of a slot that are shown in their context


def explore(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    output: str | os.PathLike[str] | None = None,
    *,
    name: str = "model",
    compare: nn.Module | None = None,
    compare_name: str = "other model",
    tokens: int = 50_000,
) -> str:
    """A page of HTML that shows what the memories of a language model read of a text, and what their slots say.

        memlayers.explore(model, tokenizer, [text], "explorer.html")

    The page is one file of at most 5 MB that asks the network for nothing. It has the text with the slots and weights
    of each token; of a slot its strongest reads in context, its top tokens, its nearest output words, and how often it
    is read; a map of all slots by use; and usage, KL and dead slots by memory and head. Where not everything fits it
    holds a sample, and says which. Memories that are not active (`set_active`) are left out. The model is called in
    evaluation mode, without gradients.

    Args:
        model: a causal language model with memories, as `transformers` has them.
        tokenizer: its tokenizer.
        texts: a text, or several; each begins with the tokenizer's token for that.
        output: a file to write the page to; one that is there must be such a page.
        name: what the page calls the model.
        compare: another model of the same tokenizer with memories of the same names and sizes, such as an earlier
            checkpoint; the page says what differs.
        compare_name: what the page calls that one.
        tokens: how many to read, at most.

    Returns:
        The page.

    Raises:
        ValueError: a model without active memories, or whose values are not finite; no text; a tokenizer of another
            model; a model to compare whose memories differ in name or size; an output that cannot be written to, or
            that holds something else.
        ModuleNotFoundError: Jinja2 is not installed.
    """
    require_extra("lm", "memlayers.explore", "jinja2")
    require_int("tokens", tokens, least=1)
    file = None if output is None else Path(output)
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"output must be a file in a folder that is there, got {str(output)!r}")
    if file is not None and not os.access(file.parent, os.W_OK | os.X_OK):
        raise ValueError(f"output must be a file in a folder that can be written to, got {str(output)!r}")
    if file is not None and not _may_be_replaced(file):
        raise ValueError(
            f"output must be a new file, or a page of an earlier call, which is replaced, got {str(output)!r}, which "
            f"holds something else: name another file, or remove it"
        )
    subjects = answering(model)
    if compare is not None:
        _require_alike(model, compare)
    text = read_text(model, tokenizer, [texts] if isinstance(texts, str) else texts, tokens)
    shown = min(most_shown(subjects, ROOM), len(text.tokens))
    found = read_memories(model, text, shown=shown, strongest=STRONGEST)
    other = None if compare is None else read_memories(compare, text, shown=shown, strongest=1)
    room, page = ROOM, ""
    while not page or len(page.encode()) > MOST_BYTES:
        page = _page(found, other, tokenizer, room, name, compare_name)
        room = room.half()
    if file is not None:
        write_text(file, page)
    return page


def _may_be_replaced(file: Path) -> bool:
    """Whether nothing is lost: there is no such file, or it is empty, or a page."""
    if not file.is_file():
        return True
    with file.open("rb") as opened:
        start = opened.read(10_000)
    return not start or _TITLE in start


def _page(found: Findings, other: Findings | None, tokenizer: Any, room: Room, name: str, other_name: str) -> str:
    import jinja2  # optional

    strings = Strings(tokenizer)
    data = pack(found, other, strings, room)
    data["strings"], data["names"] = strings.all, [name, other_name]
    templates = {file: (resources.files(__package__) / "page" / file).read_text("utf-8") for file in _FILES}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(templates), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        # Nothing in the text can end the element that holds it.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        style=templates["page.css"],
        script=templates["page.js"],
        name=name,
        other_name=other_name,
        version=__version__,
        tokens=len(found.text.tokens),
        is_cut=found.text.is_cut,
        shown=data["shown"],
        memories=data["memories"],
        usage=figures(found),
        other_usage=None if other is None else figures(other),
        loss=found.loss,
        other_loss=None if other is None else other.loss,
    )


_FILES = ("page.html", "page.css", "page.js")
_TITLE = b": what its memories read</title>"  # of page.html


def _require_alike(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = ({one.name: one.layer.config for one in answering(each)} for each in (model, other))
    if [*ours] != [*theirs]:
        raise ValueError(f"compare must have memories at {', '.join(ours)}, got {', '.join(theirs)}")
    for name, config in ours.items():
        for field in ("slots", "heads", "topk", "dim", "width"):
            if getattr(config, field) != getattr(theirs[name], field):
                raise ValueError(
                    f"compare must have {getattr(config, field)} as {field} of {name}, got "
                    f"{getattr(theirs[name], field)}: slots of different tables cannot be set side by side"
                )
