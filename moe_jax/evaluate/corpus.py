"""Text every machine has: the source of Python's standard library, with a part never trained on.

Knows no tokens and no model.

Whether a file is held out depends on its module's name alone, so the answer is the same on every
Python version. The tests of a module, its C accelerator's Python twin and its helpers count as
that module: `test/test_re.py`, `re/_parser.py` and the older `sre_parse.py` all belong to `re`.
"""

import hashlib
import io
import pathlib
import re
import sysconfig
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

# A tenth of the modules: those whose hashed name leaves this remainder.
_PARTS, _HELD_OUT_PART = 10, 3
_NO_SOURCE = "holds no Python source file; give a standard library's folder"
_SKIPPED = re.compile(r"(^|/)(site-packages|__pycache__|lib-dynload)/|^(config-|_sysconfigdata)")
# Names that do not lead to their module by the rules of `module_name`.
_ALIASES = {
    "dom": "xml",
    "httplib": "http",
    "httpservers": "http",
    "idle": "idlelib",
    "import": "importlib",
    "minidom": "xml",
    "pulldom": "xml",
    "robotparser": "urllib",
    "sax": "xml",
    "sre": "re",
    "ttk": "tkinter",
    "turtledemo": "turtle",
    "urlparse": "urllib",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One source file.

    Attributes:
      path: where it lies under the library folder, with forward slashes.
      text: its content; line ends as in the file.
    """

    path: str
    text: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


def module_name(path: str) -> str:
    """The module a file belongs to, as far as leaking text from one file to another goes.

    The first folder or file name (the second below `test`), without `test_`, leading underscores,
    `_tests`, what follows the first underscore, and digits at the end.
    """
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    inside_tests = parts[0] == "test" and len(parts) > 1 and parts[1] != "__init__"
    name = parts[1] if inside_tests else parts[0]
    name = re.sub(r"^test_|^_py(?=[a-z])", "", name.lower().removeprefix("_test_"))
    name = re.sub(r"(_tests?|tester)$", "", name.lstrip("_"))
    name = re.sub(r"(?<=[a-z])\d+$", "", name.split("_")[0]) or name
    return _ALIASES.get(name, name)


def is_held_out(path: str) -> bool:
    """Whether a file of the library belongs to the modules that are never trained on."""
    digest = hashlib.sha256(module_name(path).encode()).hexdigest()
    return int(digest, 16) % _PARTS == _HELD_OUT_PART


def read_library(source: pathlib.Path | None = None) -> list[Document]:
    """Reads every usable source file, in order of path.

    Left out are installed packages, files that are not UTF-8, empty files, tables made by gencodec
    (a hundred near-copies of one another) and the build's own configuration.

    Args:
      source: a library folder or an archive made by `pack_library`; None: the library of the
        running Python.

    Raises:
      ValueError: the source holds no usable file.
    """
    source = source or pathlib.Path(sysconfig.get_path("stdlib"))
    files = _read_folder(source) if source.is_dir() else _read_archive(source)
    documents = []
    for path, content in sorted(files.items()):
        if b"gencodec.py" in content[:400]:
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(Document(path=path, text=text))
    if not documents:
        raise ValueError(f"{source} {_NO_SOURCE}")
    return documents


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Returns the documents for training and those held out, each in the order given."""
    held_out = [d for d in documents if is_held_out(d.path)]
    return [d for d in documents if not is_held_out(d.path)], held_out


def pack_library(folders: Sequence[pathlib.Path], archive: pathlib.Path) -> int:
    """Writes several library folders as one compressed tar file; returns its bytes.

    A later folder adds only the modules that the earlier ones lack.

    Raises ValueError, before anything is written, for a folder without Python source files.
    """
    files: dict[str, bytes] = {}
    for folder in folders:
        known = {module_name(path) for path in files}
        new = _read_folder(folder)
        if not new:
            raise ValueError(f"{folder} {_NO_SOURCE}")
        files |= {path: new[path] for path in new if module_name(path) not in known}
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path, content in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.stat().st_size


def _read_folder(folder: pathlib.Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.py") if p.is_file()}
    return {path: found[path].read_bytes() for path in found if not _SKIPPED.search(path)}


def _read_archive(archive: pathlib.Path) -> dict[str, bytes]:
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                files[member.name] = content.read()
    return files
