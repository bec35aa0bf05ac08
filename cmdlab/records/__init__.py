"""What a run leaves, and where it comes from."""

from cmdlab.records.provenance import collect_provenance, gpu_names, source_sha256
from cmdlab.records.records import (
    SCHEMA,
    Run,
    Runs,
    load_records,
    read_record,
    read_result,
    write_json,
    write_listing,
    write_record,
)

__all__ = [
    "SCHEMA",
    "Run",
    "Runs",
    "collect_provenance",
    "gpu_names",
    "load_records",
    "read_record",
    "read_result",
    "source_sha256",
    "write_json",
    "write_listing",
    "write_record",
]
