"""Power losses: what may be on the disk of a folder at any moment, from a record of its writes and fsyncs.

A process that is killed leaves all that it has written; a machine that loses its power leaves what was flushed, and of
what was written since any 4 KB block, in any of the versions that it had, or torn in the middle into two of them. Names
(made, moved, removed) reach the disk in their order, as a journal has them, not after others that were flushed.

Linux alone: descriptors are followed by /proc.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK = 4096


class Disk:
    """A folder whose writes are recorded while `recording`; `image` is what a power loss would leave of it.

    Args:
        folder: flat; what is in it is taken to be on the disk.
        after_event: called after each write, flush and change of names, outside of the record.
    """

    def __init__(self, folder: Path, after_event: Callable[["Disk"], None] = lambda disk: None):
        self.folder = folder.resolve()
        self.events = 0
        self._after_event = after_event
        self._is_busy = False
        self._contents: dict[int, list[bytes]] = {}  # by inode: what is on the disk, and each version since
        self._names: list[dict[str, int]] = []  # the same of the folder
        for path in self.folder.iterdir():
            self._contents[path.stat().st_ino] = [path.read_bytes()]
        self._names = [self._listed()]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, what this process writes to the folder is recorded, and with it what went through maps before."""
        originals: dict[str, Any] = {}

        def patch(name: str, after: Callable[..., None]) -> None:
            original = originals[name] = getattr(os, name)

            def recorded(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                if not self._is_busy:
                    self._is_busy = True
                    try:
                        after(*args)
                    finally:
                        self._is_busy = False
                return result

            setattr(os, name, recorded)

        patch("write", lambda descriptor, *_: self._written(descriptor))
        patch("pwrite", lambda descriptor, *_: self._written(descriptor))
        patch("ftruncate", lambda descriptor, *_: self._written(descriptor))
        patch("fsync", lambda descriptor, *_: self._flushed(descriptor))
        for name in ("replace", "rename", "unlink"):
            patch(name, lambda *_: self._renamed())
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)

    def look(self) -> None:
        """Records what was written through maps, and by others than this process."""
        for path in self.folder.iterdir():
            self._keep_version(path)
        self._names.append(self._listed())
        self._event()

    def image(self, target: Path, draw: random.Random) -> None:
        """Writes to a new folder what a power loss at this moment might leave."""
        target.mkdir()
        for name, inode in draw.choice(self._names).items():
            versions = self._contents.get(inode, [b""])
            size = len(draw.choice(versions))
            blocks = [_block(versions, start, min(BLOCK, size - start), draw) for start in range(0, size, BLOCK)]
            (target / name).write_bytes(b"".join(blocks))

    # What is recorded.

    def _written(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.parent == self.folder and path.exists():
            self.look()

    def _flushed(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == self.folder:
            self._names = [self._listed()]
            self._event()
        elif path.parent == self.folder and path.exists():
            self._contents[path.stat().st_ino] = [path.read_bytes()]
            # A flushed file has a name.
            self._names = [names for names in self._names if path.name in names] or [self._listed()]
            self._event()

    def _renamed(self) -> None:
        if self.folder.is_dir():
            self._names.append(self._listed())
            self._event()

    def _keep_version(self, path: Path) -> None:
        versions, content = self._contents.setdefault(path.stat().st_ino, [b""]), path.read_bytes()
        if versions[-1] != content:
            versions.append(content)

    def _listed(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.folder.iterdir()}

    def _event(self) -> None:
        self.events += 1
        busy, self._is_busy = self._is_busy, True
        try:
            self._after_event(self)
        finally:
            self._is_busy = busy


def _block(versions: list[bytes], start: int, size: int, draw: random.Random) -> bytes:
    """A block in one of its versions, or torn into two."""
    found = [version[start : start + size].ljust(size, b"\0") for version in versions]
    if all(one == found[0] for one in found):
        return found[0]
    one, other = draw.choice(found), draw.choice(found)
    place = draw.choice((0, size, draw.randrange(size + 1)))
    return one[:place] + other[place:]
