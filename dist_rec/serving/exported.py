"""A folder that `dist-rec export` wrote, read again: its config and its tensors, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dist_rec.serving.tensor_file import TensorFileError, read

TENSORS, CONFIG, REPORT = "model.safetensors", "config.yaml", "report.json"

_SCORING = ("schema", "data", "model", "embeddings")


def check_folder(folder: Path) -> None:
    """Raises TensorFileError if the folder lacks a file of an export."""
    missing = [name for name in (TENSORS, CONFIG, REPORT) if not (folder / name).is_file()]
    if missing:
        text = f"{folder} is no export, or not a whole one: {', '.join(missing)} is missing"
        raise TensorFileError(f"{text}; name the folder that dist-rec export wrote")


def scoring_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Of a config's mapping what scores depend on; the rest may name a GPU or an optimiser that is not here."""
    kept = {key: value for key, value in values.items() if key in _SCORING}
    precision = {key: value for key, value in values.get("train", {}).items() if key == "precision"}
    return {**kept, "train": precision}


def load_tensors(folder: Path, model: nn.Module) -> None:
    """Gives every parameter of `model`, those on the meta device too, the exported values: mapped memory, no copies.

    Raises:
        TensorFileError: the file is damaged or does not hold exactly the tensors of the model.
    """
    tensors, wanted = read(folder / TENSORS), model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not the model's" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        found, expected = (f"{list(t.shape)} {t.dtype}" for t in (tensors[name], wanted[name]))
        if found != expected:
            problems.append(f"{name} is {found}, the model has {expected}")
    if problems:
        listing = "; ".join(sorted(problems)[:5])
        raise TensorFileError(f"{folder / TENSORS} does not fit {CONFIG} beside it: {listing}; export the model again")
    model.load_state_dict(tensors, strict=True, assign=True)
