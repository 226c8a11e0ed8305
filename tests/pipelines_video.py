"""Small random pipelines: video."""

from tests.pipeline_case import Case


CASES: dict[str, Case] = {}
