"""A cluster of three nodes in one process of the built program, on ports that were free a moment ago."""

import json
import hashlib
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

KEY = "bf-of-the-checks"
START_WITHIN_S = 120


def free_port(kind: int) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Starts with `with`, and stops at its end. `ingest` are further lines of the ingest stage."""

    def __init__(self, binary: str, ingest: str = "", keyed: bool = True, init: tuple = ()):
        self.binary, self.ingest, self.keyed, self.init = str(pathlib.Path(binary).resolve()), ingest, keyed, init
        self.folder = tempfile.TemporaryDirectory(prefix="butterfly-")
        self.process = None

    def __enter__(self):
        folder = pathlib.Path(self.folder.name)
        cluster = folder / "cluster"
        command = [self.binary, "init", "--dir", str(cluster), *self.init]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        topology = cluster / "topology.toml"
        text = topology.read_text()
        text = re.sub(r'(listen_address = "127\.0\.0\.1):\d+', lambda m: f"{m[1]}:{free_port(socket.SOCK_DGRAM)}", text)
        text = re.sub(r'(admin_address = "127\.0\.0\.1):\d+', lambda m: f"{m[1]}:{free_port(socket.SOCK_STREAM)}", text)
        port = free_port(socket.SOCK_STREAM)
        text = re.sub(r'bind_address = "127\.0\.0\.1:\d+"', f'bind_address = "127.0.0.1:{port}"', text)
        lines = self.ingest
        if self.keyed:
            tokens = cluster / "tokens.txt"
            tokens.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} checks\n")
            lines += '\ntokens_file = "tokens.txt"'
        text = text.replace('kind = "ingest"', f'kind = "ingest"\n{lines}', 1)
        topology.write_text(text)
        self.url = f"http://127.0.0.1:{port}"
        self.log = open(folder / "log", "w")
        self.process = subprocess.Popen(
            [self.binary, "-q", "serve", str(topology)], cwd=folder, stdout=self.log, stderr=self.log
        )
        self.wait()
        return self

    def wait(self):
        until = time.monotonic() + START_WITHIN_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health") as answer:
                    if json.load(answer)["healthy"]:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("the cluster did not start:\n" + self.last_words)

    def output(self) -> str:
        return (pathlib.Path(self.folder.name) / "log").read_text()

    def kill(self):
        """As a power cut would."""
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        self.last_words = self.output()
        self.folder.cleanup()
