"""A headless Chromium for tests, driven through chromedriver's WebDriver protocol; nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
KEYS = {'ArrowLeft': '\ue012', 'ArrowRight': '\ue014', 'Home': '\ue011', 'End': '\ue010', 'Space': ' '}
_SWITCHES = (
    'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
    'disable-component-update', 'disable-sync', 'hide-scrollbars', 'force-device-scale-factor=1',
)  # fmt: skip


class Browser:
    """One window."""

    def __init__(self, port, session):
        self._port, self._session = port, session

    def call(self, method, path, body=None):
        return _request(method, f'http://127.0.0.1:{self._port}/session/{self._session}/{path}', body)

    def open(self, path, fragment=''):
        self.call('POST', 'url', {'url': 'about:blank'})
        self.call('POST', 'url', {'url': f'{Path(path).resolve().as_uri()}#{fragment}'})

    def run(self, script, *args):
        """The value of a JavaScript function body."""
        return self.call('POST', 'execute/sync', {'script': script, 'args': list(args)})

    def wait(self, script, seconds=30):
        """Until the JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f'return Boolean({script})'):
            assert time.monotonic() < end, f'not true after {seconds} s: {script}'
            time.sleep(0.05)

    def press(self, key):
        action = [{'type': kind, 'value': KEYS[key]} for kind in ('keyDown', 'keyUp')]
        self.call('POST', 'actions', {'actions': [{'type': 'key', 'id': 'keys', 'actions': action}]})

    def drag(self, x0, y0, x1, y1):
        """With the left mouse button, in pixels of the window."""
        move = {'type': 'pointerMove', 'origin': 'viewport', 'duration': 50}
        actions = [{**move, 'x': round(x0), 'y': round(y0)}, {'type': 'pointerDown', 'button': 0},
                   {**move, 'x': round(x1), 'y': round(y1)}, {'type': 'pointerUp', 'button': 0}]
        self.call('POST', 'actions', {'actions': [{'type': 'pointer', 'id': 'mouse', 'actions': actions}]})

    def box(self, selector):
        """x, y, width, height of an element, scrolled into view."""
        return self.run('const e = document.querySelector(arguments[0]); e.scrollIntoView({block: "center"});'
                        'const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height];', selector)

    def log(self):
        """What the console said since the last call."""
        return self.call('POST', 'se/log', {'type': 'browser'})

    def resize(self, width, height):
        self.call('POST', 'window/rect', {'width': width, 'height': height})

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call('GET', 'screenshot')))


def _request(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)['value']
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)['value']['message']) from None


@contextlib.contextmanager
def chromium(width=1280, height=1000):
    """A fresh browser with a profile of its own."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, '--port=0'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        session = None
        try:
            port = None
            while port is None:
                line = driver.stdout.readline()
                assert line, 'chromedriver ended'
                if 'successfully on port' in line:
                    port = int(''.join(c for c in line.rsplit('port', 1)[1] if c.isdigit()))
            own = (f'user-data-dir={profile}', f'window-size={width},{height}')
            switches = [f'--{switch}' for switch in (*_SWITCHES, *own)]
            wanted = {'browserName': 'chrome', 'goog:chromeOptions': {'binary': CHROMIUM, 'args': switches},
                      'goog:loggingPrefs': {'browser': 'ALL'}}
            url = f'http://127.0.0.1:{port}/session'
            session = _request('POST', url, {'capabilities': {'alwaysMatch': wanted}})['sessionId']
            yield Browser(port, session)
        finally:
            if session:
                with contextlib.suppress(Exception):
                    _request('DELETE', f'http://127.0.0.1:{port}/session/{session}')
            driver.terminate()
            driver.wait(20)
