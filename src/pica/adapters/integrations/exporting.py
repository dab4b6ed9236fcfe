"""Exports in a process of their own, so that a server neither waits for them nor holds the base model twice for long.

    python -m pica.adapters.integrations.exporting

reads one job a line, as JSON, and writes one answer a line. It keeps the base model for the next job, and ends when its
input does or when nothing was asked of it for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pica.errors import OutputError, PicaError

IDLE_SECONDS = 300.0


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        adapter, output: The adapter's folder, and the LoRA folder to make.
        base: Folder or hub name of the base model.
        engine, rank, energy: As in `export_lora`.
        compact: Store each matrix once; see `compact`.
    """

    adapter: str
    output: str
    base: str
    engine: str
    rank: int | None = None
    energy: float | None = None
    compact: bool = False


class RefusedError(PicaError, ValueError):
    """An adapter cannot be served, and could not be if it was asked for again: it is damaged, or of another base model."""


class Exporter:
    """The other end of the process, which is started when it is needed."""

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle = idle_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def run(self, job: Job) -> None:
        """Have an export made; it is there when this returns.

        Raises:
            RefusedError: the adapter cannot be exported for this base model.
            OutputError: it could not be written, or the process died; another attempt may succeed.
        """
        async with self._turn:
            for _ in range(2):  # it may have gone, idle, just as it was asked
                process = await self._started()
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(ConnectionError):
                    process.stdin.write(f"{json.dumps(asdict(job))}\n".encode())
                    await process.stdin.drain()
                if line := await process.stdout.readline():
                    break
                status = await process.wait()
                self._process = None
                if status != 0:
                    raise OutputError(f"The process that exports adapters ended with status {status}; see the log.")
            else:
                raise OutputError("The process that exports adapters ended before it had begun; see the log.")
        answer = json.loads(line)
        if answer["error"]:
            raise (RefusedError if answer["final"] else OutputError)(answer["error"])

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PICA_EXPORT_IDLE_SECONDS": str(self._idle)}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                __name__,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
            )
        return self._process

    async def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
            self._process = None


def main() -> int:
    """Work off the jobs of standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    idle = float(os.environ.get("PICA_EXPORT_IDLE_SECONDS", IDLE_SECONDS))
    bases: dict[tuple[str, str], Any] = {}
    while select.select([sys.stdin], [], [], idle)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            break
        error, final = "", False
        try:
            _export(Job(**json.loads(line)), bases)
        except PicaError as found:
            error, final = str(found), not isinstance(found, OutputError)
        except Exception as found:  # a library's, for what no check of ours foresaw
            traceback.print_exc()
            error = f"{type(found).__name__} while it was exported; the server's log has the details."
        print(json.dumps({"error": error, "final": final}), file=answers, flush=True)
    return 0


def _export(job: Job, bases: dict[tuple[str, str], Any]) -> None:
    """Export, with the base model of the last job where that is the same."""
    from pica.adapters.base_model import load_base_model, read_peft_config
    from pica.adapters.export.lora import export_lora
    from pica.adapters.fitting import whole_shapes
    from pica.adapters.integrations.compact import BASES, compact
    from pica.adapters.integrations.export_cache import is_whole
    from pica.files.claims import claimed
    from pica.files.folders import put_in_place

    adapter, output = Path(job.adapter), Path(job.output)
    with claimed(output, patience=3600.0):  # another server may be at it
        if is_whole(output):
            return
        shutil.rmtree(output, ignore_errors=True)  # damaged: else it would have been taken
        config = read_peft_config(adapter)
        key = (job.base, str(config.task_type))
        if whole_shapes(adapter):  # a head of its own size: the model is made to fit it
            base = load_base_model(job.base, config, folder=adapter)
        else:
            if key not in bases:
                bases.clear()
                bases[key] = load_base_model(job.base, config)
            base = bases[key]
        made = output.with_name(f".{output.name}.whole") if job.compact else output
        shutil.rmtree(made, ignore_errors=True)
        export_lora(adapter, made, base, engine=job.engine, rank=job.rank, energy=job.energy, base_model_name=job.base)
        if job.compact:
            try:
                compact(made, output.parent / BASES)
                put_in_place(made, output)
            finally:
                shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
