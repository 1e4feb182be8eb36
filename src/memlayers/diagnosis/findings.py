"""What an examination found: an `Answer` to each question, a `Finding` of each memory, a `Report` of them all."""

import dataclasses
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from memlayers.checks import CommandFailed

State = Literal["pass", "warn", "fail", "skip"]

WIDTH = 80
_SHOWN = {"pass": "ok", "warn": "WARN", "fail": "FAIL", "skip": "-"}


class Answer(NamedTuple):
    """What the answer to a question is; the questions are functions that return one."""

    state: State
    message: str  # what was found
    advice: str = ""  # what to do about it


def passed(message: str) -> Answer:
    return Answer("pass", message)


def warns(message: str, advice: str) -> Answer:
    return Answer("warn", message, advice)


def fails(message: str, advice: str) -> Answer:
    return Answer("fail", message, advice)


def not_checked(why: str) -> Answer:
    return Answer("skip", f"not checked: {why}")


NOT_REACHED = not_checked("the memory is not reached")


class DoctorError(CommandFailed):
    """Something is wrong with a memory; the message holds the failures."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str  # stable name of the check
    memory: str | None  # name of the memory in the model; None: the model as a whole
    state: State
    message: str  # what was found
    advice: str = ""  # what to do about it

    def __str__(self) -> str:
        place = self.check if self.memory is None else f"{self.check} of {self.memory}"
        return ". ".join(filter(None, (f"{place}: {self.message}", self.advice)))


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the model's memories; those of the model as a whole come first."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings and what was not checked do not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return self._of("fail")

    def raise_for_failures(self) -> None:
        """Raises `DoctorError` naming every failure, if there is one."""
        if self.failures:
            raise DoctorError("\n".join(map(str, self.failures)))

    def with_failures_as_warnings(self, checks: Collection[str]) -> "Report":
        """The same report, in which these checks can warn but not fail."""
        return Report(
            tuple(
                dataclasses.replace(finding, state="warn")
                if finding.state == "fail" and finding.check in checks
                else finding
                for finding in self.findings
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"ok": self.ok, "findings": [dataclasses.asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        counts = {
            "failed": len(self.failures),
            "warned": len(self._of("warn")),
            "passed": len(self._of("pass")),
            "not checked": len(self._of("skip")),
        }
        lines = [", ".join(f"{count} {what}" for what, count in counts.items() if count)]
        width = max((len(finding.check) for finding in self.findings), default=0)
        for memory in dict.fromkeys(finding.memory for finding in self.findings):
            lines += ["", "model" if memory is None else memory]
            for finding in self.findings:
                if finding.memory == memory:
                    lines += _lines(finding, width)
        return "\n".join(lines)

    def _of(self, state: State) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == state)


def _lines(finding: Finding, width: int) -> Iterator[str]:
    start = f"  {_SHOWN[finding.state]:<4}  {finding.check:<{width}}  "
    for text, first in ((finding.message, start), (f"-> {finding.advice}", " " * len(start))):
        if text != "-> ":
            yield textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(start))
