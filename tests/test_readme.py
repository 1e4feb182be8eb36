"""The README's example runs, and prints what the README says."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_prints_what_the_readme_shows(capsys):
    code, printed = re.search(r"```python\n(.*?)```\n\n?```\n(.*?)```", README.read_text(), re.DOTALL).groups()
    assert len(code.splitlines()) <= 25
    exec(compile(code, str(README), "exec"), {})
    assert capsys.readouterr().out.strip() == printed.strip()
