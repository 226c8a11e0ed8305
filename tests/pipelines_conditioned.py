"""Small random pipelines: conditioned."""

from tests.pipeline_case import Case


CASES: dict[str, Case] = {}
