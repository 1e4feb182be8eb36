"""For the reference: the comment beside a field of a dataclass is its description, as in the command line's help."""

from griffe import Attribute, Class, Docstring, Extension


class FieldComments(Extension):
    """A field without a docstring takes the comment at the end of its line."""

    def on_class(self, *, cls: Class, **_) -> None:
        if "dataclass" not in cls.labels:
            return
        for field in cls.members.values():
            if isinstance(field, Attribute) and field.docstring is None:
                _, mark, comment = "\n".join(field.lines).partition("  # ")
                if mark:
                    field.docstring = Docstring(comment.split("\n")[0], parent=field)
