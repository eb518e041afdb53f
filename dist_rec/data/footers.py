"""Which Parquet files a data set has and what their footers say: rows per row group and column types. Reads no rows."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from dist_rec.data.schema import Schema

_FOOTER_THREADS = 16  # a footer is one or two small reads; on an object store their latency is all the cost
_SUFFIX = ".parquet"
_PASSWORD = r"://[^/@?#]*:(?!\d*([/?#]|$))[^@]+@"  # after an account's name; no port. It may hold a /
_SECRET_OPTION = r"[?&][^=&]*(secret|password|token|key)[^=&]*="
_WILD = "*?["
_UNQUOTED = "/!$&'()*+,;=:@"  # what a path in a URI may hold as it is, besides letters, digits and -._~


class DataError(ValueError):
    """The files do not hold what the schema says; the message names the place, the rule and the fix."""


@dataclass(frozen=True)
class FileFooter:
    """What one file's footer says.

    Attributes:
        path: local path or file system URI, as `open_file` takes it.
        row_group_rows: rows of each row group.
        arrow_schema: columns and their Arrow types.
    """

    path: str
    row_group_rows: tuple[int, ...]
    arrow_schema: pa.Schema


def open_file(path: str) -> pq.ParquetFile:
    """The file at a local path or URI. One that cannot be read or is not whole Parquet raises DataError."""
    filesystem, inner = _file_system(path)
    # no memory map: a file cut short under a running job would then kill the process instead of raising
    with _reading(path):
        if filesystem.get_file_info(inner).size == 0:
            raise DataError(f"{path}: is empty (0 bytes); write it again or remove it")
        source = filesystem.open_input_file(inner)
        return pq.ParquetFile(source, pre_buffer=not isinstance(filesystem, pafs.LocalFileSystem))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns what pyarrow raises for a path that it cannot read into DataErrors."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is not Parquet or is cut short ({error}); write it again or remove it") from error
    except (pa.ArrowException, OSError) as error:  # permissions and credentials, but also a damaged footer
        raise DataError(
            f"{path}: cannot be read ({' '.join(str(error).split())}); correct the path, permissions or credentials, "
            "or, if the file is damaged, write it again or remove it"
        ) from error


def read_footers(path: str) -> list[FileFooter]:
    """The footers of all files that `path` names, in the order of their paths.

    path: a file, a folder (every *.parquet under it), a glob, or any of these as a URI (s3://bucket/train).
    Raises DataError if nothing matches, a file is broken, or there is not one row in all of them.
    """
    files = find_files(path)
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as pool:
        footers = list(pool.map(_read_footer, files))
    if not any(rows for footer in footers for rows in footer.row_group_rows):
        raise DataError(f"{path}: its {len(files)} file(s) hold no rows at all; point it to a data set with rows")
    return footers


def _read_footer(path: str) -> FileFooter:
    with open_file(path) as file, _reading(path):
        metadata = file.metadata
        rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return FileFooter(path, rows, file.schema_arrow)


def find_files(path: str) -> list[str]:
    """The files that `path` names, sorted; DataError if there are none."""
    filesystem, inner = _file_system(path)
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    with _reading(path):
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.File:
            return [inner if is_local else path]
        if info.type == pafs.FileType.Directory:
            files = [name for name in _list(filesystem, inner) if name.endswith(_SUFFIX)]
            problem = f"the folder has no *{_SUFFIX} file in it"
        elif any(c in inner for c in _WILD):
            files = _glob(filesystem, inner, is_local)
            problem = "the pattern matches no file"
        else:
            files, problem = [], "there is no such file or folder"
    if not files:
        here = f" (looked from {os.getcwd()})" if is_local and not os.path.isabs(path) else ""
        raise DataError(f"{path}: {problem}{here}; correct the path")
    return sorted(files) if is_local else [_uri(path, inner, name) for name in sorted(files)]


def split_options(path: str) -> tuple[str, str]:
    """(path, options) of a URI: what is before its ?, and the rest, such as ?region=x; of a local path: all and ""."""
    cut = path.find("?") if "://" in path else -1
    return (path, "") if cut < 0 else (path[:cut], path[cut:])


def _uri(path: str, inner: str, name: str) -> str:
    """The URI of a file that was found by the URI `path`, with its account, host and options.

    inner: what the file system calls `path`, name: the file; they may have other names for the place than the URI has.
    """
    base, options = split_options(path)
    if any(c in inner for c in _WILD):
        base, inner = _folder(base), _folder(inner)
    inside = name[len(inner.rstrip("/")) :]
    return f"{base.rstrip('/')}{urllib.parse.quote(inside, safe=_UNQUOTED)}{options}"


def _folder(pattern: str) -> str:
    """The innermost folder that a pattern names without a wildcard."""
    return re.split(f"[{re.escape(_WILD)}]", pattern)[0].rpartition("/")[0]


def _list(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    """Files under a folder, without those in names that begin with . or _ (temporary and bookkeeping files)."""
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    names = [info.path for info in infos if info.type == pafs.FileType.File]
    inside = len(folder.rstrip("/"))
    return [name for name in names if not re.search(r"(^|/)[._]", name[inside:])]


def _glob(filesystem: pafs.FileSystem, pattern: str, is_local: bool) -> list[str]:
    if is_local:
        return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    return [name for name in _list(filesystem, _folder(pattern)) if fnmatch.fnmatchcase(name, pattern)]


def secret_problem(path: str) -> str | None:
    """What is wrong with a URI that holds a secret, in words that do not repeat it; None if it holds none."""
    options = urllib.parse.unquote(split_options(path)[1])
    if not (re.search(_PASSWORD, path) or re.search(_SECRET_OPTION, options, re.IGNORECASE)):
        return None
    return (
        "is a URI with a secret in it, which config.yaml, logs and messages would show; leave it out, and give it as "
        "the store's tools take it: in the environment (for s3 in AWS_SECRET_ACCESS_KEY), in their files, or by a role"
    )


def _file_system(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    if problem := secret_problem(path):
        raise DataError(f"the path of the data {problem}")
    try:
        return pafs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a URI that pyarrow can open ({error}); use a path or e.g. s3://") from error


def fingerprint(footers: Sequence[FileFooter]) -> dict[str, int | str]:
    """What must not change under a cursor: file names, rows and row groups in order (not where the folder lies)."""
    names = "\n".join(os.path.basename(split_options(footer.path)[0]) for footer in footers)
    sizes = repr([footer.row_group_rows for footer in footers])
    return {
        "files": len(footers),
        "rows": sum(sum(footer.row_group_rows) for footer in footers),
        "row_groups": sum(len(footer.row_group_rows) for footer in footers),
        "file_names": hashlib.sha256(names.encode()).hexdigest()[:16],
        "row_group_sizes": hashlib.sha256(sizes.encode()).hexdigest()[:16],
    }


def content_key(footers: Sequence[FileFooter]) -> str:
    """A digest that changes when a file does: paths, sizes, times of writing. Names what was derived from the files."""
    stamps = []
    for footer in footers:
        filesystem, inner = _file_system(footer.path)
        info = filesystem.get_file_info(inner)
        place = os.path.realpath(inner) if isinstance(filesystem, pafs.LocalFileSystem) else footer.path
        stamps.append(f"{place} {info.size} {info.mtime_ns} {footer.row_group_rows}")
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]


def check_columns(footers: Sequence[FileFooter], schema: Schema) -> None:
    """Compares every file with the schema; one DataError has all that is missing or of the wrong type."""
    problems: dict[str, list[str]] = {}
    seen: dict[pa.Schema, list[str]] = {}
    for footer in footers:
        if footer.arrow_schema not in seen:
            seen[footer.arrow_schema] = list(_problems(footer.arrow_schema, schema))
        for problem in seen[footer.arrow_schema]:
            problems.setdefault(problem, []).append(footer.path)
    if not problems:
        return
    lines = []
    for problem, paths in problems.items():
        others = f" and {len(paths) - 1} more of {len(footers)} files" if len(paths) > 1 else ""
        lines.append(f"  {problem} (in {paths[0]}{others})")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise DataError("\n".join([f"the files do not fit the schema, {count}:", *lines]))


def _problems(arrow: pa.Schema, schema: Schema) -> Iterator[str]:
    for name, what, judge in _expectations(schema):
        if name not in arrow.names:
            close = difflib.get_close_matches(name, arrow.names, n=1)
            has = ", ".join(arrow.names[:20]) + (", ..." if len(arrow.names) > 20 else "")
            hint = f"did you mean '{close[0]}'?" if close else f"the file has {has}"
            yield f"column '{name}' ({what}) is missing; {hint}"
        elif arrow.names.count(name) > 1:
            yield f"column '{name}' ({what}) is there {arrow.names.count(name)} times; give each column its own name"
        elif (complaint := judge(arrow.field(name).type)) is not None:
            yield f"column '{name}' ({what}) is {arrow.field(name).type}; {complaint}"


_Judge = Callable[[pa.DataType], "str | None"]


def _expectations(schema: Schema) -> Iterator[tuple[str, str, _Judge]]:
    for name in schema.labels:
        yield name, "label", _number
    for name in schema.dense:
        yield name, "dense", _number
    for name, column in schema.sparse.items():
        yield name, "sparse", _id_list if column.multi else _id
        if column.weights is not None:
            yield column.weights, f"weights of '{name}'", _number_list
    for name, group in schema.groups.items():
        yield group.column, f"group '{name}'", _integer if group.scale is None else _number
    if schema.weight is not None:
        yield schema.weight.column, "sample weight", _number


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list whose offsets and values `parquet.convert` can read."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _number(kind: pa.DataType) -> str | None:
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return None
    if is_list(kind):
        return "expected one number per row; a list is only read as a sparse column with multi: true"
    return "expected a float, integer or bool; cast it when the files are written, e.g. to float32"


def _integer(kind: pa.DataType) -> str | None:
    if pa.types.is_floating(kind):
        return "expected an integer; set scale, e.g. scale: 100 to group by floor(x * 100)"
    return None if pa.types.is_integer(kind) else "expected an integer; encode it as int64 when the files are written"


def _id(kind: pa.DataType) -> str | None:
    if is_list(kind):
        return "expected one integer per row; set multi: true for a list of ids"
    return _id_value(kind)


def _id_list(kind: pa.DataType) -> str | None:
    if not is_list(kind):
        return "expected a list of integers, as multi is true; set multi: false for one id per row"
    return _id_value(kind.value_type)


def _id_value(kind: pa.DataType) -> str | None:
    if pa.types.is_integer(kind):
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return "ids are integers; encode as int64, e.g. a 64-bit hash, and declare out_of_range: hash"
    return "ids are integers; cast to int64 when the files are written"


def _number_list(kind: pa.DataType) -> str | None:
    if is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        return None
    return "expected list<float>, one weight for each id"
