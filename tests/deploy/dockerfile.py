"""Runs a Dockerfile without a container engine: a folder per stage, chroot for RUN, namespaces around the service.

Only what deploy/Dockerfile uses is supported; anything else is refused, never skipped. Needs root on Linux.
"""

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ENGINE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # what engines set where an image has none
TOOLS = ("apt-get", "chroot", "debootstrap", "ip", "mount", "nsenter", "unshare")
NAMES = (Path("/etc/hosts"), Path("/etc/resolv.conf"))  # engines provide them to every container, with localhost in it
# What an engine mounts for every container. The new mount namespace is private, so all of it ends with the process.
MOUNTS = """
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null:3 zero:5 full:7 random:8 urandom:9; do
  mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/dev/shm"
"""


class UnsupportedError(Exception):
    """The Dockerfile uses something that is not supported here."""


class StepError(Exception):
    """A step of the Dockerfile failed."""


@dataclass(frozen=True)
class Instruction:
    word: str
    flags: tuple[tuple[str, str], ...]  # from `--name=value`, in order
    text: str

    def flag(self, name):
        return next((value for flag, value in self.flags if flag == name), None)


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: tuple[Instruction, ...]


@dataclass
class Image:
    """The result of a stage: its files, and how to start them."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": ENGINE_PATH})
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    def derive(self, root):
        """A copy with its own files, as the start of another stage."""
        run("cp", "--archive", "--reflink=auto", self.root, root)
        copied = {name: type(value)(value) for name, value in vars(self).items() if name != "root"}
        return Image(root, **copied)


def read(text):
    """(the ARGs before the first FROM, the stages in order)."""
    arguments, stages = {}, []
    for instruction in _instructions(text):
        if instruction.word == "FROM":
            base, _, name = instruction.text.partition(" AS ")
            stages.append((name or str(len(stages)), base, []))
        elif stages:
            stages[-1][2].append(instruction)
        elif instruction.word == "ARG":
            name, _, value = instruction.text.partition("=")
            arguments[name] = value
        else:
            raise UnsupportedError(f"{instruction.word} before FROM")
    return arguments, [Stage(name, base, tuple(instructions)) for name, base, instructions in stages]


def _instructions(text):
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, rest = line.split(maxsplit=1)
        flags = []
        while match := re.match(r"--([\w-]+)=(\S+)\s+", rest):
            flags.append((match[1], match[2]))
            rest = rest[match.end() :]
        yield Instruction(word, tuple(flags), rest)


def fill(text, variables):
    """Substitutes Docker's own variables, `$NAME` and `${NAME}`; in RUN, the shell does that."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: variables.get(match[1] or match[2], ""), text)


def ignored(path, patterns):
    """Whether .dockerignore excludes this path: the last line that matches it, or a folder above it, decides."""
    prefixes = ["/".join(path.parts[:depth]) for depth in range(1, len(path.parts) + 1)]
    verdict = False
    for pattern in patterns:
        expression = _expression(pattern.removeprefix("!"))
        if any(expression.fullmatch(prefix) for prefix in prefixes):
            verdict = not pattern.startswith("!")
    return verdict


def context_files(folder):
    """The files that a build may COPY: those of the folder, except what its .dockerignore excludes."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    patterns = [line.strip("/") for line in lines if line and not line.startswith("#")]
    if patterns[0] != "*":
        raise UnsupportedError("a .dockerignore that does not leave out everything first")
    included = {pattern[1:].split("/")[0] for pattern in patterns if pattern.startswith("!")}
    everything = (path for top in sorted(included) for path in _files(folder / top))
    return [path for path in (file.relative_to(folder) for file in everything) if not ignored(path, patterns)]


def _files(path):
    if not path.is_dir():
        return [path][: path.exists()]
    return (file for file in sorted(path.rglob("*")) if file.is_file() or file.is_symlink())


def _expression(pattern):
    """Like Go's filepath.Match, plus `**/` for any folders."""
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    wildcards = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(wildcards.get(part) or re.escape(part) for part in parts))


class Build:
    """Builds stages of a Dockerfile below `folder`, each once, and only those that are needed."""

    def __init__(self, text, context, folder, bases, secrets, arguments=None):
        """bases(name, root) creates the root of an external base image.

        secrets: id -> (file, local paths that the file names), mounted while a RUN that requests the secret runs.
        """
        self.defaults, stages = read(text)
        self.stages = {stage.name: stage for stage in stages}
        self.context, self.files = context, context_files(context)
        self.folder, self.bases, self.secrets = folder, bases, secrets
        self.arguments = arguments or {}
        self.images = {}

    def image(self, name):
        if name not in self.images:
            self.images[name] = self._stage(self.stages[name]) if name in self.stages else self._base(name)
        return self.images[name]

    def _base(self, name):
        root = self.folder / re.sub(r"\W", "-", name)
        self.bases(name, root)
        return Image(root)

    def _stage(self, stage):
        image = self.image(fill(stage.base, self.defaults | self.arguments)).derive(self.folder / f"stage-{stage.name}")
        arguments = {}
        for instruction in stage.instructions:
            text = instruction.text
            if instruction.word not in ("RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"):
                text = fill(text, arguments | image.environment)
            if instruction.word == "ARG":
                name, _, value = text.partition("=")
                arguments[name] = self.arguments.get(name, value)
            elif instruction.word == "RUN":
                self._run(image, instruction, arguments)
            elif instruction.word == "COPY":
                self._copy(image, instruction, shlex.split(text))
            else:
                _configure(image, instruction.word, text)
        return image

    def _run(self, image, instruction, arguments):
        if image.user != "0:0":
            raise UnsupportedError("RUN after USER")
        binds = []
        for name, value in instruction.flags:
            mount = dict(part.split("=", 1) for part in value.split(","))
            if name != "mount" or mount["type"] not in ("cache", "secret"):
                raise UnsupportedError(f"RUN --{name}={value}")
            if mount["type"] == "secret" and mount["id"] in self.secrets:
                file, paths = self.secrets[mount["id"]]
                binds += [(file, mount["target"]), *((path, str(path)) for path in paths)]
        environment = arguments | image.environment
        command = inside(image, ["/bin/sh", "-c", instruction.text], binds=binds, environment=environment)
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if finished.returncode:
            raise StepError(f"RUN {instruction.text}\n{finished.stdout[-4000:]}")

    def _copy(self, image, instruction, words):
        *sources, target = words
        if unknown := [name for name, _ in instruction.flags if name != "from"]:
            raise UnsupportedError(f"COPY --{unknown[0]}")
        into_folder = target.endswith("/") or len(sources) > 1
        dest = image.root / os.path.join(image.folder, target).lstrip("/")
        for source in sources:
            if origin := instruction.flag("from"):
                shutil.copytree(self.image(origin).root / source.strip("/"), dest, symlinks=True, dirs_exist_ok=True)
                continue
            expression = _expression(source.strip("/"))
            copied = 0
            for path in self.files:
                # A folder contributes its contents, a file itself.
                heads = [path, *path.parents]
                top = next((head for head in heads if expression.fullmatch(head.as_posix())), None)
                if top is None:
                    continue
                copied += 1
                inner = path.relative_to(top) if top != path else Path(path.name if into_folder else "")
                (dest / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.context / path, dest / inner, follow_symlinks=False)
            if not copied:
                raise StepError(f"COPY {source}: no such file in the context")


def _configure(image, word, text):
    if word == "ENV":
        image.environment |= _pairs(text)
    elif word == "LABEL":
        image.labels |= _pairs(text)
    elif word == "WORKDIR":
        image.folder = os.path.join(image.folder, text)
        (image.root / image.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "USER":
        image.user = text
    elif word == "ENTRYPOINT":
        image.entrypoint, image.command = json.loads(text), []
    elif word == "CMD":
        image.command = json.loads(text)
    elif word == "HEALTHCHECK":
        image.healthcheck = json.loads(text.removeprefix("CMD"))
    elif word != "EXPOSE":  # which is documentation, and changes nothing
        raise UnsupportedError(word)


def _pairs(text):
    return dict(word.split("=", 1) for word in shlex.split(text))


def inside(image, command, *, binds=(), environment=None, user=None, sealed=False):
    """The command line that runs `command` in the image, as process 1, without this process's environment.

    sealed: as the service runs, with read-only files except for a tmpfs at /tmp, and no network except loopback.
    """
    script = ["set -eu", f"root={shlex.quote(str(image.root))}", MOUNTS]
    for source, target in [*((path, str(path)) for path in NAMES), *binds]:
        place = f'"$root"{shlex.quote(target)}'
        make = (
            f"mkdir -p {place}" if source.is_dir() else f'mkdir -p "$(dirname {place})"; [ -e {place} ] || : > {place}'
        )
        script.append(f"{make}\nmount --bind -o ro {shlex.quote(str(source))} {place}")
    if sealed:
        script.append("ip link set lo up")
        script.append('mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/tmp"\nmount -o remount,bind,ro "$root"')
    variables = [f"{key}={value}" for key, value in (environment or image.environment).items()]
    started = ["env", "-i", *variables, "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", image.folder, *command]
    script.append(f'exec chroot --groups= --userspec={user or image.user} "$root" {shlex.join(started)}')
    namespaces = ["--mount", "--pid", "--ipc", "--uts", *(["--net"] if sealed else [])]
    return ["unshare", *namespaces, "--fork", "sh", "-c", "\n".join(script)]


def debian(name, root):
    """Approximates the root of the image debian:SUITE-slim: Debian's essential packages, from this machine's mirror."""
    suite = re.fullmatch(r"debian:(\w+)-slim", name)
    if not suite:
        raise UnsupportedError(f"FROM {name}")
    fields = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
    lines = run("apt-get", "indextargets", "--format", fields, "Created-By: Packages").splitlines()
    sources = sorted({line for line in lines if line.split()[1].split("-")[0] == suite[1]})  # including security's
    mirror = next((uri for uri, codename, _ in map(str.split, sources) if codename == suite[1]), None)
    if mirror is None:
        raise StepError(f"this machine's apt knows no mirror of {suite[1]}")
    run("debootstrap", "--variant=minbase", suite[1], root, mirror)
    (root / "etc/apt/sources.list").write_text("".join(f"deb {source}\n" for source in sources))


def pip_configuration(file):
    """Writes this machine's pip configuration as a pip.conf; returns it with the local files and folders it names."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = [line.split("=", 1) for line in lines]
    config = configparser.RawConfigParser()
    config["global"] = {key.split(".", 1)[1]: ast.literal_eval(value) for key, value in pairs}
    with file.open("w") as out:
        config.write(out)
    words = " ".join(config["global"].values()).split()
    paths = {Path(word.removeprefix("file://")) for word in words if word.removeprefix("file://").startswith("/")}
    roots = {path.parent if path.name == "simple" else path for path in paths}  # an index's files are next to its pages
    return file, sorted(path for path in roots if path.exists())


def run(*command):
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if finished.returncode:
        raise StepError(f"{shlex.join(map(str, command))}\n{(finished.stdout + finished.stderr)[-4000:]}")
    return finished.stdout
