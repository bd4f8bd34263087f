"""What `import pipeline` provides, and what it costs."""

import subprocess
import sys

import pytest

import pipeline


def modules_after(statement):
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_import_of_the_package_loads_no_client_library():
    assert not modules_after("import pipeline") & {"aiokafka", "asyncpg", "confluent_kafka", "faust"}


def test_import_of_the_doors_does_not_load_faust():
    modules = modules_after("from pipeline import Change, MetadataListener, MetadataProducer")
    assert {"asyncpg", "confluent_kafka"} <= modules
    assert not modules & {"aiokafka", "faust"}


def test_every_exported_name_is_a_class_and_any_other_name_an_attribute_error():
    assert all(isinstance(getattr(pipeline, name), type) for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = pipeline.nonesuch
