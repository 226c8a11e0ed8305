"""Small random pipelines: image."""

from tests.pipeline_case import Case


CASES: dict[str, Case] = {}
