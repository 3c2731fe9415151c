"""What a person types: this program's name, a command quoted for a shell, flags for Python, what to install; and the
version to tell."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vqvae.errors import InputError
from vqvae.storage.shipped import HOME

PACKAGE = "vqvae-pixelcnn-mnist"
QUOTES = ("'", '"')
# In a message: a name, a call, or a name with a value, which may be a string in quotes.
PYTHON = re.compile(r"""`([\w\[\]]+)(\(\))?(?:=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^`]*))?`""")


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library, with the Python in its backticks turned into what is typed.

    Args:
        flags: those of the command line, by the names of the arguments that they give.
    """

    def typed(match: re.Match[str]) -> str:
        name, call, value = match.groups()
        if call:
            return f"{program()} {name.replace('_', '-')}"
        if name not in flags:
            return match[0].strip("`")  # a setting that only a recipe has
        if value in (None, "True", "False"):  # a bare name, or a switch such as --resume or --no-download
            return flags[name]
        return f"{flags[name]} {command_line(ast.literal_eval(value) if value[0] in QUOTES else value)}"

    return re.sub(PYTHON, typed, message)


def program() -> str:
    """What to type to start this program again, in this installation of several."""
    started = sys.argv[0]
    if started.endswith(".py"):
        return f"{_by_name('python', sys.executable)} {command_line(started)}"
    return _by_name(Path(started).name, started)


def command_line(*words: object) -> str:
    """A command as it is typed into the user's shell: PowerShell or cmd on Windows, or else one such as bash."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else " ".join(map(_quoted, texts))


def require_extra(extra: str, *modules: str) -> None:
    """Refuse to go on without the packages of an extra (pyproject.toml). None of them is imported.

    Args:
        modules: the names that its packages are imported by.
    Raises:
        InputError: some are not installed. It says what to type.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        clone = "." if HOME.samefile(os.curdir) else HOME
        where = ("-e", f"{clone}[{extra}]") if (HOME / "pyproject.toml").is_file() else (f"{PACKAGE}[{extra}]",)
        raise InputError(
            f"expected the packages of the extra {extra}, found no {', '.join(missing)}; install them with: "
            f"{command_line('pip', 'install', *where)}"
        )


def tell_version(asked: bool) -> None:
    """Print the version of the code that runs, if it is asked for, and end the program."""
    if asked:
        project = HOME / "pyproject.toml"  # a clone has it; another version may be installed beside the clone
        if project.is_file():
            version = tomllib.loads(project.read_text("utf-8"))["project"]["version"]
        else:
            installed = metadata.distributions(name=PACKAGE, path=[str(HOME.parent)])
            version = next((found.version for found in installed), "(not installed)")
        print(PACKAGE, version)
        raise SystemExit


def _by_name(name: str, file: str) -> str:
    """A program's name where the shell finds the one in the same folder by it, or else the path of its file."""
    found = shutil.which(name)
    if found and os.path.realpath(Path(found).parent) == os.path.realpath(Path(file).parent):
        return command_line(name)
    return command_line(file if os.path.dirname(file) else os.path.join(os.curdir, file))  # noqa: PTH118, PTH120  # Path drops ./


def _quoted(word: str) -> str:
    """A word for the shell. One that standard output cannot show is spelled byte by byte, as $'caf\\303\\251'."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if word.isprintable() and word.encode(encoding, "ignore").decode(encoding) == word:
        return shlex.quote(word)
    spelled = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"$'{''.join(spelled)}'"
