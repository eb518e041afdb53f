"""Histograms of weights over one grid, and the section's pictures."""

from __future__ import annotations

import numpy as np
import torch

from dist_rec.reporting.folders import RunFolder
from dist_rec.reporting.weights import on_one_grid, weights
from dist_rec.training.weights import describe


def recorded(values: torch.Tensor) -> dict:
    return {"name": "dense.top", **describe(values, 0.001)}


def folder(name: str, records: list[torch.Tensor]) -> RunFolder:
    lines = [{"step": i, "examples": 100 * i, "parameters": [recorded(v)]} for i, v in enumerate(records)]
    return RunFolder(name, name, {"report": {"weights": {"near_zero": 0.001}}}, 3, {}, [], lines)


def test_one_grid_moves_no_value_out_of_its_bin() -> None:
    draws = [scale * torch.randn(5000, generator=torch.Generator().manual_seed(1)).double() for scale in (1.0, 9.0)]
    edges, shares = on_one_grid([describe(values, 0.1)["histogram"] for values in draws])
    for values, share in zip(draws, shares, strict=True):
        expected, _ = np.histogram(values.numpy(), edges)
        np.testing.assert_allclose(share, expected / 5000, atol=1e-12)


def test_few_values_get_few_bins() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(1))
    edges, (share,) = on_one_grid([describe(values, 0.1)["histogram"]])
    assert 4 <= len(edges) - 1 <= 12 and np.isclose(share.sum(), 1)


def test_the_section_draws_every_run_and_grey_for_the_start() -> None:
    draw = torch.Generator().manual_seed(0)
    sets = [[torch.randn(8, 6, generator=draw) * (1 + i) for i in range(6)] for _ in range(2)]
    section = weights([folder("base", sets[0]), folder("new", sets[1]), folder("silent", [])])
    text = "".join(section.content)
    for words in ("dense.top, 8 x 6", "base, 500 examples", "new, 500 examples", "at 0 examples", "Effective rank",
                  "Kurtosis", "Standard deviation", "Share |w| &lt; 0.001"):  # fmt: skip
        assert words in text, words
    assert "silent, " not in text


def test_what_was_not_recorded_is_said() -> None:
    (text,) = weights([folder("base", [])]).content
    assert "set report.weights.parameters" in text


def test_a_parameter_that_is_not_finite_has_curves_but_no_histogram() -> None:
    bad = torch.full((3, 3), float("nan"))
    text = "".join(weights([folder("base", [bad, bad])]).content)
    assert "dense.top, 3 x 3" in text and "At the end" not in text
