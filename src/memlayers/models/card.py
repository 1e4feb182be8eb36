"""The README.md of a folder with a memory: what it is and how it is loaded, for people and for the Hub."""

from collections.abc import Sequence
from pathlib import Path

from memlayers.models.classes import REGISTERED
from memlayers.models.identity import BaseIdentity
from memlayers.models.memory_folder import is_hub_id
from memlayers.models.placement import MemoryPlacement

CARD = "README.md"
# A card with this line is replaced by the next save, any other is left alone.
_OURS = "<!-- Written by memlayers. Remove this line, and the next save keeps your changes. -->"

_TEXT = """\
---
library_name: memlayers
{base_model}tags:
- memory-layer
- product-key-memory
---
{ours}

# A memory for {title}

{modules}, trained beside a base model that is not in here. Needs `pip install "memlayers[lm]"`.

```python
{load}
```

| | |
|---|---|
| kind | {kind} |
| mode | {mode} |
| at | {names} |
| slots of a table | {slots:,} of width {width} |
| tables | {tables} |
| read for a token, by a memory | {read} slots ({heads} heads, {topk} each) |
| parameters | {parameters:,} |
| base | {base} |
"""

_MODES = {"replace": "in place of each module", "parallel": "beside each module, behind a gate"}


def keeps_card(folder: Path) -> bool:
    """Whether `folder` has a card that somebody else wrote."""
    card = folder / CARD
    return card.exists() and _OURS not in card.read_text(encoding="utf-8", errors="replace")


def card(
    placement: MemoryPlacement, names: Sequence[str], base: BaseIdentity, parameters: int, *, auto_class: str | None
) -> str:
    """The text of the card. `auto_class`: which class of `transformers` loads base and memory at once."""
    config, count = placement.config, len(names)
    is_public = is_hub_id(base.name_or_path) and not Path(base.name_or_path).exists()
    return _TEXT.format(
        base_model=f"base_model: {base.name_or_path}\n" if is_public else "",
        ours=_OURS,
        title=base.name_or_path if is_public else f"a {base.class_name}",
        modules="A memory layer" if count == 1 else f"{count} memory layers",
        load=_loading(base, auto_class if is_public else None),
        kind=placement.kind,
        mode=f"{placement.mode}, {_MODES[placement.mode]}",
        names=", ".join(f"`{name}`" for name in names),
        slots=config.slots,
        width=config.width,
        tables="1, shared" if placement.share_values and count > 1 else count,
        read=config.heads * config.topk,
        heads=config.heads,
        topk=config.topk,
        parameters=parameters,
        # The path of a folder means nothing to others.
        base=base if is_public else f"a {base.class_name} in {base.dtype}",
    )


def _loading(base: BaseIdentity, auto_class: str | None) -> str:
    if auto_class is not None:
        first = ""
        trust = ", trust_remote_code=True"
        if base.class_name in REGISTERED:
            first, trust = "import memlayers.models  # or trust_remote_code=True below\n", ""
        return (
            f"{first}from transformers import {auto_class}\n\n"
            f'model = {auto_class}.from_pretrained("path/to/this/folder"{trust})'
        )
    return (
        f"from memlayers import load_memory\n\n"
        f"model = ...  # the base, a {base.class_name} with the weights that this was trained with\n"
        f'load_memory(model, "path/to/this/folder")'
    )
