"""The error tree: its form, its exit codes, and that every code in the source is in its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bifrost_cli.errors as errors
from bifrost_cli.errors import ArtifactError, BifrostError, DiskFull, StoreError, as_json, public, render

PACKAGE = Path(errors.__file__).parent
EXIT_CODES = {
    "BifrostError": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "EnvironmentProblem": 3,
    "DiskFull": 3,
    "DataError": 4,
    "ArtifactError": 5,
    "StoreError": 5,
    "OutOfMemory": 6,
    "Diverged": 7,
    "Findings": 8,
    "Stopped": 75,
    "Interrupted": 130,
}


def test_the_form_is_what_where_fix():
    error = StoreError("runs/latents already holds others", at="weights 8f3c -> 21aa", fix="-o b", code="BF-STORE-003")
    assert render(error) == (
        "error[BF-STORE-003]: runs/latents already holds others\n  at:  weights 8f3c -> 21aa\n  fix: -o b"
    )


def test_empty_parts_are_left_out_and_lines_are_aligned():
    assert render(BifrostError("what")) == "error[BF-BUG-001]: what"
    assert render(BifrostError("what", at="one\ntwo")).splitlines()[1:] == ["  at:  one", "       two"]


@pytest.mark.parametrize("name", EXIT_CODES)
def test_exit_codes(name):
    assert getattr(errors, name).exit_code == EXIT_CODES[name]


def test_the_table_of_exit_codes_is_complete():
    classes = {n for n, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BifrostError)}
    assert classes == set(EXIT_CODES)


def test_a_store_error_is_an_artifact_error_and_a_full_disk_is_the_environment():
    assert issubclass(StoreError, ArtifactError)
    assert issubclass(DiskFull, errors.EnvironmentProblem)


def test_a_code_given_at_the_raise_stays_with_that_error():
    assert BifrostError("x", code="BF-ENV-020").code == "BF-ENV-020"
    assert BifrostError.code == "BF-BUG-001"


def test_every_code_in_the_source_is_in_the_table():
    table = set(re.findall(r"BF-[A-Z]+-\d{3}", errors.__doc__ or ""))
    used = {code for path in PACKAGE.rglob("*.py") for code in re.findall(r"BF-[A-Z]+-\d{3}", path.read_text())}
    assert used - table == set()


@pytest.mark.parametrize("words", [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error: unhandled cuda error\nncclUnhandledCudaError: Cuda failure 2 'out of memory'",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
    "unable to mmap 1024 bytes from file: Cannot allocate memory (12)",
    "std::bad_alloc",
    "can't start new thread",
    "libtorch_cpu.so: failed to map segment from shared object",
])  # fmt: skip
def test_a_lack_of_memory_is_known_by_its_words(words):
    with pytest.raises(errors.OutOfMemory) as caught, errors.memory_errors("a step", "--set x=1"):
        raise RuntimeError(words)
    assert caught.value.exit_code == 6 and caught.value.at == words.splitlines()[0]


@pytest.mark.parametrize("words", ["CUDA error: device-side assert triggered", "CUBLAS_STATUS_EXECUTION_FAILED",
                                   "a tensor of memory format channels_last"])  # fmt: skip
def test_other_troubles_are_no_lack_of_memory(words):
    assert not errors.is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://alice:S@host/t.csv?sig=S", "https://***@host/t.csv?***"),
        ("https://token@host/t.csv", "https://***@host/t.csv"),
        ("https://u:p@S@host/", "https://***@host/"),
        ("bifrost data check 'https://host/t.csv?sig=S' -q", "bifrost data check 'https://host/t.csv?***' -q"),
        ("https://host/t.csv?sig=S:12: not text", "https://host/t.csv?***:12: not text"),
        (
            "403, url='https://host/a?S', and (https://host/b?S)",
            "403, url='https://host/a?***', and (https://host/b?***)",
        ),
        ("s3://key:S@bucket/x#y?S", "s3://***@bucket/x#y?***"),
        ("zip://a::https://u:S@host/a?S", "zip://a::https://***@host/a?***"),
        ("https://host/t?q='S'&y=S end", "https://host/t?*** end"),
        ("abfs://container@account/x", "abfs://container@account/x"),
        ("hf://datasets/me/data@main/a.csv", "hf://datasets/me/data@main/a.csv"),
        ("is it https://host/page. Or mail@host?", "is it https://host/page. Or mail@host?"),
    ],
)
def test_an_address_is_shown_without_its_secrets(text, shown):
    error = StoreError(text, at=text, fix=text)
    assert public(text) == shown and public({"a": [text, 5, None]}) == {"a": [shown, 5, None]}
    assert str(error).count(shown) == 3 and "".join(map(str, as_json(error).values())).count(shown) == 3
