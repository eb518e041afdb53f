"""What a user gets for a bad input: a message that names it and the fix, no traceback, and nothing half-made left.

Each input goes through the real entry. `pytest tests/test_bad_inputs.py -s` prints every message.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec import train
from dist_rec.training.checkpoint import find
from tests.ranks import run_ranks
from tests.runs import table, values, write

ROWS = 100
ROOT = Path(__file__).parents[1]

Values = dict[str, Any]


def _enter(rank: int, world_size: int, arguments: list[str]) -> tuple[str, str]:
    """(exit status or message of the entry, everything the process wrote) as the interpreter would end it."""
    out = io.StringIO()
    status = "0"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            train.main(arguments)
        except SystemExit as end:
            status = str(end.code or 0)  # the interpreter prints a message that is no number, and exits with 1
        except BaseException:  # noqa: BLE001 - what a user would see
            status = traceback.format_exc()
    return status, out.getvalue()


def _set(folder: Path, column: str, change: Callable[[pa.ChunkedArray], Any]) -> None:
    """Writes one column of b.parquet anew."""
    old = pq.read_table(folder / "b.parquet")
    index = old.column_names.index(column)
    new = pa.array(change(old.column(column).to_pylist()))
    pq.write_table(old.set_column(index, column, new), folder / "b.parquet", row_group_size=13)


def _replace(at: int, value: Any) -> Callable[[list], list]:
    return lambda old: [*old[:at], value, *old[at + 1 :]]


def _missing_column(data: Path, config: Values) -> None:
    old = pq.read_table(data / "b.parquet")
    pq.write_table(old.rename_columns(["userr" if n == "user" else n for n in old.column_names]), data / "b.parquet")


def _string_ids(data: Path, config: Values) -> None:
    _set(data, "user", lambda ids: [f"u{i}" for i in ids])


def _null_label(data: Path, config: Values) -> None:
    _set(data, "click", _replace(4, None))


def _label_of_two(data: Path, config: Values) -> None:
    _set(data, "click", _replace(4, 2.0))


def _id_too_large(data: Path, config: Values) -> None:
    _set(data, "user", _replace(20, 203))


def _negative_id(data: Path, config: Values) -> None:
    _set(data, "tags", _replace(3, [5, -7]))


def _nan_dense(data: Path, config: Values) -> None:
    _set(data, "d0", _replace(7, float("nan")))


def _infinite_dense(data: Path, config: Values) -> None:
    _set(data, "d0", _replace(7, float("inf")))


def _empty_file(data: Path, config: Values) -> None:
    (data / "b.parquet").write_bytes(b"")


def _truncated_file(data: Path, config: Values) -> None:
    whole = (data / "b.parquet").read_bytes()
    (data / "b.parquet").write_bytes(whole[: len(whole) // 2])


def _no_parquet(data: Path, config: Values) -> None:
    (data / "b.parquet").write_text("click,user\n1,2\n")


def _damaged_pages(data: Path, config: Values) -> None:
    whole = bytearray((data / "b.parquet").read_bytes())
    whole[4:400] = b"\xff" * 396
    (data / "b.parquet").write_bytes(whole)


def _damaged_footer(data: Path, config: Values) -> None:
    whole = bytearray((data / "b.parquet").read_bytes())
    size = int.from_bytes(whole[-8:-4], "little")
    whole[-8 - size : -8] = b"\xff" * size
    (data / "b.parquet").write_bytes(whole)


def _unwritable_synthetic(data: Path, config: Values) -> None:
    config["data"]["synthetic"] = {"path": "/proc/synthetic"}


def _zero_row_groups(data: Path, config: Values) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.ParquetWriter(data / name, table(1).schema).close()


def _fewer_rows_than_ranks(data: Path, config: Values) -> None:
    (data / "b.parquet").unlink()
    pq.write_table(table(1), data / "a.parquet")


def _unknown_key(data: Path, config: Values) -> None:
    config["train"]["stpes"] = 3


def _folder_below_a_file(data: Path, config: Values) -> None:
    config["run"]["dir"] = str(data / "a.parquet" / "run")


def _folder_that_refuses(data: Path, config: Values) -> None:
    config["run"]["dir"] = "/proc/run"  # root may write anywhere else


def _scalar_for_list(data: Path, config: Values) -> None:
    config["schema"]["sparse"]["user"] = {"num_ids": 203, "multi": True}


def _list_for_scalar(data: Path, config: Values) -> None:
    config["schema"]["sparse"]["tags"] = {"num_ids": 57}


def _no_such_data(data: Path, config: Values) -> None:
    config["data"]["train"] = str(data / "2024-*.parquet")


def _no_validation(data: Path, config: Values) -> None:
    config["data"]["validation"] = str(data / "nowhere")


def _duplicate_column(data: Path, config: Values) -> None:
    old = pq.read_table(data / "b.parquet")
    pq.write_table(old.append_column("user", old.column("user")), data / "b.parquet")


def _negative_weight(data: Path, config: Values) -> None:
    config["schema"]["weight"] = {"column": "d0"}
    _set(data, "d0", lambda old: [abs(x) for x in old])
    first = pq.read_table(data / "a.parquet")
    d0 = pc.abs(first.column("d0"))
    pq.write_table(first.set_column(first.column_names.index("d0"), "d0", d0), data / "a.parquet")
    _set(data, "d0", _replace(2, -0.5))


CASES = {
    # input: what its message must have
    _missing_column: ("column 'user' (sparse) is missing", "did you mean 'userr'?", "b.parquet"),
    _string_ids: ("column 'user' (sparse) is string", "encode as int64", "b.parquet"),
    _null_label: ("column 'click' (label): null or NaN at row 4 of", "b.parquet", "on_null: fill"),
    _label_of_two: ("column 'click' (label): 2.0 is neither 0 nor 1 at row 4 of", "b.parquet", "kind: real"),
    _id_too_large: ("'user'", "id 203 is outside 0..202 at row 20 of", "b.parquet (row group 1)", "raise num_ids"),
    _negative_id: ("'tags'", "id -7 is outside 0..56 at row 3 of", "b.parquet", "out_of_range"),
    _nan_dense: ("column 'd0' (dense): null or NaN at row 7 of", "b.parquet", "on_null: fill"),
    _infinite_dense: ("column 'd0' (dense): inf is not finite", "at row 7 of", "b.parquet", "correct the value"),
    _empty_file: ("b.parquet: is empty (0 bytes)", "write it again or remove it"),
    _truncated_file: ("b.parquet: is not Parquet or is cut short", "write it again or remove it"),
    _no_parquet: ("b.parquet: is not Parquet or is cut short", "write it again or remove it"),
    _damaged_pages: ("b.parquet", "row group 0 cannot be read", "write it again or remove it"),
    _damaged_footer: ("b.parquet: cannot be read (", "thrift", "write it again or remove it"),
    _unwritable_synthetic: ("data.synthetic.path: '/proc/synthetic' cannot be written", "choose another folder"),
    _zero_row_groups: ("data", "hold no rows at all", "point it to a data set with rows"),
    _fewer_rows_than_ranks: ("data.train has 1 rows for 2 ranks", "use at most 1 ranks or more data"),
    _unknown_key: ("train.stpes: is not a known key; did you mean 'steps'?",),
    _folder_below_a_file: ("run.dir: is '", "a.parquet' is a file; name a folder"),
    _folder_that_refuses: ("run.dir: is '/proc/run'", "'/proc' cannot be written", "choose another folder"),
    _scalar_for_list: ("column 'user' (sparse) is int64; expected a list", "set multi: false", "a.parquet"),
    _list_for_scalar: ("column 'tags' (sparse) is list<", "expected one integer", "set multi: true", "a.parquet"),
    _no_such_data: ("2024-*.parquet: the pattern matches no file", "correct the path"),
    _no_validation: ("nowhere: there is no such file or folder", "correct the path"),
    _duplicate_column: ("column 'user' (sparse) is there 2 times", "b.parquet"),
    _negative_weight: ("column 'd0' (sample weight): -0.5 is negative at row 2 of", "b.parquet"),
}
ON_TWO_RANKS = {_fewer_rows_than_ranks, _missing_column, _damaged_footer}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__[1:])
def test_a_bad_input_gets_a_message_and_leaves_nothing_that_is_in_the_way(spoil, tmp_path):
    data, folder = write(tmp_path / "data", ROWS, row_group=13), tmp_path / "run"
    # the tables of other splits must not hide what is wrong with the training data
    config = values(data, folder, data={"validation": None}, train={"epochs": 1}, checkpoint={"every": 2})
    spoil(data, config)
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump(config))
    world_size = 2 if spoil in ON_TWO_RANKS else 1
    ends = run_ranks(_enter, world_size, [str(card)], timeout=100)
    said = [status for status, _ in ends if status not in ("0", "1")]
    assert [status == "0" for status, _ in ends] == [False] * world_size
    assert len(said) == 1, "one rank says it, the others are silent"
    print(f"\n{spoil.__name__[1:]}\n{said[0]}")
    assert said[0].startswith("error: ")
    for part in CASES[spoil]:
        assert part in said[0]
    assert all("Traceback" not in text for end in ends for text in end)
    # what was wrong is mended; nothing in the folder keeps the same run from going through, from its start
    for left in data.iterdir():
        left.unlink()
    write(data, ROWS, row_group=13)
    card.write_text(yaml.safe_dump(values(data, folder, checkpoint={"every": 2})))
    assert [status for status, _ in run_ranks(_enter, world_size, [str(card)])] == ["0"] * world_size
    assert find(folder / "checkpoints")[-1].meta["progress"]["examples"] == ROWS


def test_another_seed_than_the_checkpoints_is_said_once(tmp_path):
    data = write(tmp_path / "data", ROWS, row_group=13)
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump(values(data, tmp_path / "run", train={"steps": 2}, checkpoint={"every": 1})))
    assert [status for status, _ in run_ranks(_enter, 2, [str(card)])] == ["0", "0"]
    (first, _), (second, text) = run_ranks(_enter, 2, [str(card), "run.seed=7"])
    assert first.startswith("error: the checkpoint's data order was drawn with seed 0, the config has 7")
    assert second == "1" and "error:" not in text and "Traceback" not in text


def _broken_reader(rank: int, world_size: int, arguments: list[str]) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_rec.job.read_footers", lambda path: 1 // 0)
        return _enter(rank, world_size, arguments)


def test_what_nobody_expects_on_rank_0_has_its_traceback_and_the_others_leave(tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump(values(write(tmp_path / "data", ROWS), tmp_path / "run")))
    (first, _), (second, text) = run_ranks(_broken_reader, 2, [str(card)], timeout=60)
    assert "Traceback" in first and "ZeroDivisionError" in first
    assert second == "1" and "error:" not in text and "Traceback" not in text


def test_what_one_rank_finds_ends_the_job_with_its_message(tmp_path):
    """Values are read by one rank only: the others wait for it in a collective until the launcher ends them."""
    data, folder = write(tmp_path / "data", ROWS, row_group=13), tmp_path / "run"
    config = values(data, folder, data={"shuffle": False, "batch_size": 4})
    _id_too_large(data, config)  # in the last file, which rank 1 reads
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "dist_rec.train", str(tmp_path / "card.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, cwd=ROOT)
    print(done.stdout, done.stderr)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "id 203 is outside 0..202 at row 20 of" in errors[0]
    # torchrun's own report names the rank that failed first and repeats its error
    report = done.stderr[done.stderr.index("FAILED") :]
    assert "rank      : 1" in report and "id 203 is outside" in report
