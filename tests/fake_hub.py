"""A hub on this machine that speaks what huggingface_hub asks to download files and to commit them."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


class FakeHub:
    """Repositories of models in memory. `requests`: (method, path) of what was asked.

    answers: path in a repository -> (status, X-Error-Code) in place of the file. cut: paths of which half is sent.
    """

    def __init__(self, url):
        self.url, self.requests, self.answers, self.cut = url, [], {}, set()
        self.commits, self.branches, self.lfs, self.made = {}, {}, {}, {}

    def commit(self, repository, files, branch="main"):
        """Add a commit with exactly these files, {path: bytes}; returns its id."""
        text = json.dumps(
            [repository, *sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())]
        )
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = dict(files)
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def put(self, repository, folder, branch="main"):
        """Add a commit with the files of a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return self.commit(repository, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}, branch)

    def files(self, repository, branch="main"):
        return self.commits[repository][self.branches[repository][branch]]

    def downloads(self):
        """Paths of the files that were downloaded."""
        return [path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): ...

    def do_HEAD(self):
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self, status=200, body=b"", headers=(), sent=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.close_connection |= sent is not None

    def refuse(self, status, code, **headers):
        self.answer(status, b"{}", {"X-Error-Code": code, **{k.replace("_", "-"): v for k, v in headers.items()}})

    def route(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[2:3] == ["resolve"]:
            self.resolve(hub, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif path == "/api/repos/create":
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.made or name in hub.branches:
                return self.json({"url": f"{hub.url}/{name}", "name": name}, 409)
            hub.made[name] = asked
            hub.commit(name, {})
            self.json({"url": f"{hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            self.preupload(hub, "/".join(parts[2:4]), parts[5])
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(self.body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in objects]
            self.json({"transfer": "basic", "objects": upload})
        elif parts[0] == "lfs":
            if "lfs" in hub.answers:
                return self.refuse(*hub.answers["lfs"])
            hub.lfs[hashlib.sha256(self.body).hexdigest()] = self.body
            self.answer()
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            self.commit(hub, "/".join(parts[2:4]), parts[5])
        else:
            self.refuse(404, "")

    def json(self, content, status=200):
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def resolve(self, hub, repository, revision, name):
        if repository not in hub.commits:
            return self.refuse(404, "RepoNotFound")
        commit = hub.branches[repository].get(revision, revision)
        if commit not in hub.commits[repository]:
            return self.refuse(404, "RevisionNotFound")
        if name in hub.answers:
            return self.refuse(*hub.answers[name])
        files = hub.commits[repository][commit]
        if name not in files:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=commit)
        data = files[name]
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
        self.answer(200, data, headers, sent=len(data) // 2 if name in hub.cut else None)

    def preupload(self, hub, repository, revision):
        if revision not in hub.branches.get(repository, {}):
            return self.refuse(404, "RevisionNotFound")
        attributes = next(
            (
                base64.b64decode(f["sample"]).decode()
                for f in json.loads(self.body)["files"]
                if f["path"] == ".gitattributes"
            ),
            "",
        )
        ends = tuple(line.split()[0].removeprefix("*") for line in attributes.splitlines() if "filter=lfs" in line)
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(ends) else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self.json({"files": files})

    def commit(self, hub, repository, revision):
        files = dict(hub.files(repository, revision))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
        commit = hub.commit(repository, files, revision)
        self.json({"commitUrl": f"{hub.url}/{repository}/commit/{commit}", "commitOid": commit})


@contextmanager
def running_hub():
    """A hub while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asked_hub(monkeypatch, cache):
    """A hub in place of the real one for this process while the block runs, and a cache of the test's own."""
    with running_hub() as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, with servers of its own
        ask(monkeypatch, hub.url)
        yield hub


def ask(monkeypatch, url):
    """Let this process ask the hub at this address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def ask_nobody(monkeypatch):
    """Let this process ask where nothing listens, without waiting between its attempts."""
    ask(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
