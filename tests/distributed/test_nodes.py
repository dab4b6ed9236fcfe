"""Several machines: torchrun with a rendezvous, here twice on one, and the launch files of the documentation."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.run import start
from tests.distributed.conftest import environment
from tests.distributed.jobs import recipe
from tests.experiments.tiny import write_tiny_llama

FILES = Path(__file__).parents[2] / "docs" / "launch"


@pytest.mark.slow
def test_two_nodes_leave_what_one_process_leaves(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fields = recipe(tmp_path, tmp_path / "out", trainer__learning_rates=[0.1])
    options = [word for key, value in fields.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "two"]
    launch += ["--local_addr", "127.0.0.1", "-m", "pica", "train", *options]
    nodes = [
        subprocess.Popen(
            launch,
            env=environment(PICA_CACHE_DIR="", GLOO_SOCKET_IFNAME="lo"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=500)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-3000:] for text in said)
    assert sorted(text.count("Adapter:") for text in said) == [0, 1]  # one of all processes speaks
    alone = recipe(tmp_path, tmp_path / "alone", trainer__learning_rates=[0.1], trainer__batch_size=4)
    start(load_recipe(None, list(alone.items())), reporter=Silent())
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "out"))
    assert two["processes"] == 2
    assert two["adapter"]["training"]["last_loss"] == pytest.approx(one["adapter"]["training"]["last_loss"], rel=1e-5)
    right, trained = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("alone", "out"))
    for key, value in right.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-6)
    assert max(float(value.abs().max()) for value in right.values() if value.is_floating_point()) > 1e-4


def test_the_launch_files_start_what_the_test_starts() -> None:
    """Both name torchrun's own options, a rendezvous on the first node, and `pica train`; the shell's parses."""
    script = (FILES / "slurm.sh").read_text()
    assert subprocess.run(["bash", "-n", FILES / "slurm.sh"]).returncode == 0
    service, job = yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    words = container["command"] + container["args"]
    assert words[0] == "torchrun"
    assert " ".join(words[6:9]) == "-m pica train"
    assert set(re.findall(r"--(\w+)", " ".join(words))) == set(re.findall(r"--(\w+)", script.partition("srun")[2]))
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--rdzv_endpoint={first}:29500" in words
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--nnodes={job['spec']['completions']}" in words
