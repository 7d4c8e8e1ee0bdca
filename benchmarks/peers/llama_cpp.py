"""llama.cpp as a method of the benchmarks: a Node process with `node-llama-cpp`, which brings prebuilt binaries for Linux."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from medhead.bench.measure import Answer, Method, Prompts
from medhead.errors import MedheadError

CLIENT = Path(__file__).with_name("llama.mjs")
PACKAGE = "node-llama-cpp@3.22.1"


def install(folder: Path) -> None:
    """Install the npm package in a folder (700 MB), unless it is there; raise a MedheadError if npm is missing or fails."""
    if (folder / "node_modules" / "node-llama-cpp").is_dir():
        return
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise MedheadError("llama.cpp needs Node.js with npm; install them, or leave --gguf out")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", PACKAGE]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        raise MedheadError(f"npm cannot install {PACKAGE} in {str(folder)!r}; is there a network?")


class LlamaCppMethod(Method):
    """Decodes with llama.cpp; texts start from the same token ids, and end with the end token as ours do."""

    def __init__(
        self, name: str, file: Path, arguments: dict[str, Any], seed: int, folder: Path, threads: int, rows: int, columns: int
    ) -> None:  # fmt: skip
        self.file, self.process = file, None  # type: tuple[Path, subprocess.Popen[str] | None]
        self._folder, self._numbers = folder, [str(number) for number in (threads, rows, columns)]
        super().__init__(name, arguments, seed=seed)

    @property
    def dtype(self) -> str:
        """Name of the file's quantisation."""
        return self.file.stem.rpartition(".")[2]

    @property
    def tree_size(self) -> int:
        """0: no trees."""
        return 0

    def answer(self, prompts: Prompts, **changes: Any) -> Answer:
        """Answer prompts together."""
        options = self.arguments | changes
        temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0
        request = {"prompts": prompts, "max_new_tokens": options["max_new_tokens"], "temperature": temperature}
        found = self._exchange(request | {"seed": self.seed})
        return Answer(found["texts"], [0] * len(prompts), found["seconds"])

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            client = self._folder / CLIENT.name  # Node looks for packages beside the script
            shutil.copyfile(CLIENT, client)
            command = ["node", str(client), str(self.file.resolve()), *self._numbers]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._read()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise MedheadError(f"llama.cpp ended with {str(self.file)!r}; its message is above")
        return dict(json.loads(line))
