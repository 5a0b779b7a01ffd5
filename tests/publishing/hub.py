"""A model hub of a test's own: repositories in memory, the requests that huggingface_hub makes for one commit."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """repositories: {name: {"private": bool, "files": {path: bytes}, "messages": […]}}; refusal: (status, words) for everything."""

    def __init__(self):
        self.repositories, self.objects, self.refusal, self.asked = {}, {}, None, []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status >= 400:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(text)

    def handle_any(self):
        path, body, hub = self.path.split("?")[0], self.body(), self.hub
        hub.asked.append((self.command, path))
        if hub.refusal is not None:
            return self.answer({"error": hub.refusal[1]}, hub.refusal[0])
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = "/".join(filter(None, (wish.get("organization"), wish["name"])))
            private = wish.get("private", wish.get("visibility") == "private")
            hub.repositories.setdefault(name, {"private": private, "files": {}, "messages": []})
            return self.answer({"url": f"{hub.address}/{name}", "id": name, "name": name})
        if path.endswith(("/preupload/main", "/preupload/side")):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]
            return self.answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            wish = json.loads(body)
            actions = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{hub.address}/object/{o['oid']}", "header": {}}},
                }
                for o in wish["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": actions})
        if path.startswith("/object/"):
            hub.objects[path.rpartition("/")[2]] = body
            return self.answer({})
        if "/commit/" in path:
            return self.commit(path, body)
        return self.answer({"id": "x", "sha": "0" * 40, "siblings": [], "user": "me", "name": "me", "type": "user"})

    def commit(self, path, body):
        name, _, branch = path.removeprefix("/api/models/").partition("/commit/")
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository["messages"].append(f"{branch}: {value['summary']}")
            elif line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.hub.objects[value["oid"]]
        self.answer({"commitUrl": f"{self.hub.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any
