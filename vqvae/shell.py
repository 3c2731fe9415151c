"""What a person types: this program's name, a command quoted for a shell, flags for Python; and the version to tell."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

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
    """What to type to start this program again."""
    started = Path(sys.argv[0])
    if started.suffix == ".py":
        return f"python {command_line(started)}"
    return started.stem if shutil.which(started.stem) else command_line(started)


def command_line(*words: object) -> str:
    """A command as it is typed into the user's shell: PowerShell or cmd on Windows, or else one such as bash."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else " ".join(map(_quoted, texts))


def tell_version(asked: bool) -> None:
    """Print the version, if it is asked for, and end the program."""
    if asked:
        installed = (found.version for found in metadata.distributions(name=PACKAGE))
        print(PACKAGE, next(installed, "(not installed)"))
        raise SystemExit


def _quoted(word: str) -> str:
    """A word for the shell. One that standard output cannot show is spelled byte by byte, as $'caf\\303\\251'."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if word.isprintable() and word.encode(encoding, "ignore").decode(encoding) == word:
        return shlex.quote(word)
    spelled = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"$'{''.join(spelled)}'"
