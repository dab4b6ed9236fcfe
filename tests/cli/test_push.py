"""`pica push`: which files go, what is refused, and the hub's real client against a server that plays the hub."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from peft import PeftModel, get_peft_model

from pica import PicaConfig, save_adapter
from pica.errors import ConfigError
from pica.experiments.sharing import plan_upload


class Hub(ThreadingHTTPServer):
    """The few endpoints that pushing needs; keeps repositories with whether they are private and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.status = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if self.headers["Authorization"] != "Bearer hf_secret":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif name in self.server.repositories:
            self.reply(200, {"id": name, "private": self.server.repositories[name]["private"], "tags": []})
        else:
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.status:
            self.reply(self.server.status, {"error": "no, not you"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.server.repositories[name] = {"private": private, "files": {}}
            self.reply(200, {"url": f"{self.server.address}/{name}", "id": name, "name": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif "/commit/" in self.path:
            name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
            for line in body.splitlines():
                if (each := json.loads(line))["key"] == "file":
                    data = base64.b64decode(each["value"]["content"])
                    self.server.repositories[name]["files"][each["value"]["path"]] = data
            self.reply(200, {"commitUrl": f"{self.server.address}/{name}/commit/0", "commitOid": "0", "success": True})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        else:
            self.reply(500, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def run(tiny_llama, tmp_path: Path) -> Path:
    """What a run leaves, its base model in a folder of this machine."""
    tiny_llama().save_pretrained(tmp_path / "smol")
    base = type(tiny_llama()).from_pretrained(tmp_path / "smol")
    model = get_peft_model(base, PicaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "run" / "predictions-adapter.jsonl").write_text("{}\n")
    (tmp_path / "run" / ".run.lock").write_text("")
    return tmp_path / "run"


ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]


def test_a_run_s_adapter_goes_to_a_private_repository(pica, hub: Hub, run: Path):
    card = (run / "adapter" / "README.md").read_bytes()
    found = pica("push", run, "me/style", "--base", "org/Smol")
    assert found.status == 0, found.err
    assert found.out == f"Private: {hub.address}/me/style\n"
    assert hub.repositories["me/style"]["private"] is True
    files = hub.repositories["me/style"]["files"]
    assert sorted(files) == ADAPTER
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/Smol"
    text = files["README.md"].decode()
    assert ModelCard(text).data.to_dict()["base_model"] == "org/Smol"
    assert 'PeftModel.from_pretrained(base, "me/style")' in text
    assert 'from_pretrained("org/Smol")' in text
    assert all(str(run.parent).encode() not in data for data in files.values()), "no path of this machine"
    assert (run / "adapter" / "README.md").read_bytes() == card, "nothing here has changed"
    assert pica("push", run, "me/style", "--base", "org/Smol").status == 0  # once more, into the same


def test_public_only_when_asked(pica, hub: Hub, run: Path):
    assert pica("push", run, "me/style", "--base", "org/Smol", "--public").out.startswith("Public: ")
    assert hub.repositories["me/style"]["private"] is False
    again = pica("push", run, "me/style", "--base", "org/Smol")
    assert again.status == 2
    assert "anybody may read it" in again.err


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_the_hub_refuses_is_one_sentence(pica, hub: Hub, run: Path, status: int):
    hub.status = status
    found = pica("push", run, "me/style", "--base", "org/Smol")
    assert found.status == 2
    assert found.err.count("error:") == 1
    assert "hf_secret" not in found.err
    reason = {401: "the token is not valid", 403: "the token may not write to me", 500: "no, not you"}[status]
    assert f"The hub refuses to take me/style: {reason}" in " ".join(found.err.split())


def test_no_network_no_token_no_name(pica, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with monkeypatch.context() as changed:
        changed.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "cannot be reached" in pica("push", run, "me/style", "--base", "org/Smol").err
        changed.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in pica("push", run, "me/style", "--base", "org/Smol").err
    for name in ("style", "a/b/c", "me/my style"):
        found = pica("push", run, name, "--base", "org/Smol")
        assert found.status == 2
        assert "is no name on the hub" in found.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    found = pica("push", run, "me/style", "--base", "org/Smol")
    assert found.status == 2
    assert "There is no token" in found.err
    assert hub.repositories == {}


def test_a_base_model_that_nobody_else_has_is_refused(run: Path):
    with pytest.raises(ConfigError, match="which nobody else has; say what it is called on the hub with --base"):
        plan_upload(run, "me/style")
    with pytest.raises(ConfigError, match="nobody else has"):
        plan_upload(run, "me/style", base=str(run.parent / "smol"))


def test_anything_but_an_adapter_goes_only_when_asked(run: Path):
    adapter = run / "adapter"
    (adapter / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/adapter_config.json", "checkpoint-5/optimizer.pt", "notes.txt"):
        (adapter / name).write_text("{}")
    (adapter / ".env").write_text("TOKEN=1")
    with pytest.raises(ConfigError, match=r"no part of an adapter: checkpoint-5/adapter_config.json, .* --all"):
        plan_upload(adapter, "me/style", base="org/Smol")
    (adapter / "checkpoint-5" / "adapter_config.json").unlink()
    found = plan_upload(adapter, "me/style", base="org/Smol", everything=True)
    assert sorted(found.files) == [*ADAPTER, "checkpoint-5/optimizer.pt", "notes.txt"]
    whole = plan_upload(run, "me/style", base="org/Smol", everything=True)
    assert sorted(whole.files) == [*ADAPTER, "checkpoint-5/optimizer.pt", "notes.txt", "predictions-adapter.jsonl"]


def test_a_card_of_ones_own_goes_as_it_is_and_an_empty_form_does_not(run: Path):
    card = run / "adapter" / "README.md"
    card.write_text("# Mine, for OWNER/NAME\n")
    assert plan_upload(run, "me/style", base="org/Smol").files["README.md"] == b"# Mine, for OWNER/NAME\n"
    card.write_text("---\nbase_model: /home/me/smol\n---\n# Model Card for Model ID\n")
    found = plan_upload(run, "me/style", base="org/Smol").files["README.md"]
    assert isinstance(found, bytes)
    assert b"me/style" in found
    assert b"/home/me" not in found


def test_a_dry_run_says_what_would_go(pica, run: Path):
    found = pica("push", run, "me/style", "--base", "org/Smol", "--dry-run")
    assert found.status == 0
    assert "Would push 4 files" in found.out
    assert "predictions" not in found.out
