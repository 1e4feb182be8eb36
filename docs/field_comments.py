"""For the reference: what a field of a dataclass is for, from its `setting`, as in the command line's help, or from the
comment at the end of its line."""

import ast

from griffe import Attribute, Class, Docstring, Extension


class FieldComments(Extension):
    """A field without a docstring takes the help of its setting, or the comment at the end of its line."""

    def on_class(self, *, cls: Class, **_) -> None:
        if "dataclass" not in cls.labels:
            return
        for field in cls.members.values():
            if isinstance(field, Attribute) and field.docstring is None and (text := help_of(field)):
                field.docstring = Docstring(text, parent=field)


def help_of(field: Attribute) -> str:
    match ast.parse(str(field.value), mode="eval").body:
        case ast.Call(func=ast.Name(id="setting"), args=[_, ast.Constant(value=text), *_]):
            return text
    return "\n".join(field.lines).partition("  # ")[2].split("\n")[0]
