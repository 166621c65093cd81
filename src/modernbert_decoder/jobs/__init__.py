"""Labels, scores, vectors and rankings for files of any size, here or on a Ray cluster; see docs/jobs.md."""

from __future__ import annotations

from modernbert_decoder.jobs.inputs import Columns
from modernbert_decoder.jobs.job import EngineOptions, Summary
from modernbert_decoder.jobs.map_over_files import map_files
from modernbert_decoder.jobs.ray_workers import RayOptions
from modernbert_decoder.jobs.tasks import Classify, Embed, Rank, Rerank, ScoreTexts

__all__ = [
    "Classify",
    "Columns",
    "Embed",
    "EngineOptions",
    "Rank",
    "RayOptions",
    "Rerank",
    "ScoreTexts",
    "Summary",
    "map_files",
]
