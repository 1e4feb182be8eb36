"""A headless Chromium, spoken to by its DevTools protocol through a pipe, so that no package is needed for it."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """One page; remembers all requests that it makes, and all that goes wrong in it."""

    def __init__(self, folder):
        self.requests, self.faults, self._number = [], [], 0
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()
        # The browser reads from 3 and writes to 4, whatever numbers they have here.
        start = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        executable = next(path for name in BROWSERS if (path := shutil.which(name)))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--no-first-run", "--disable-background-networking",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}"]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", start, executable, *options, "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in), os.close(theirs_out)
        self._rest, self._session, self._loaded = b"", None, False
        while not (pages := [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]):
            time.sleep(0.1)
        found = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            piece = os.read(self._read, 2**20)
            assert piece, "the browser has ended"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(line)
        name, about = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.faults.append(about["exceptionDetails"])
        elif name == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.faults.append(about["entry"])
        elif name == "Page.loadEventFired":
            self._loaded = True
        return event

    def open(self, url, *, width=1280, height=900, is_dark=False):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._loaded = False
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self._loaded = False
        while not self._loaded:
            self._next()

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys):
        for key in keys:
            typed = {"key": key, "code": key} | ({"text": "\r", "windowsVirtualKeyCode": 13} if key == "Enter" else {})
            self.call("Input.dispatchKeyEvent", type="keyDown", **typed)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def click(self, selector):
        script = f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
        script += "const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        x, y = self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file, *, whole=False):
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))

    def close(self):
        with contextlib.suppress(OSError):
            os.close(self._write)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._read)


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip(f"no headless browser ({', '.join(BROWSERS)}) is installed")
    opened = Page(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
