"""The errors a user can meet, each with a code, an exit code, a place and a fix.

Codes in use (a number keeps its meaning for ever):

    BF-BUG-001     anything unforeseen
    BF-USE-001     wrong argument              BF-USE-002     the output exists already
    BF-USE-003     unknown plug-in
    BF-RECIPE-001  not valid YAML              BF-RECIPE-002  unknown key
    BF-RECIPE-003  wrong value                 BF-RECIPE-004  no such recipe
    BF-RECIPE-005  keys contradict each other  BF-RECIPE-006  newer recipe format
    BF-ENV-001     no such device              BF-ENV-002     a package is missing
    BF-ENV-003     two plug-ins of one name    BF-ENV-004     a plug-in that does not load
    BF-ENV-010     disk full                   BF-ENV-011     not writable
    BF-ENV-012     the disk fails
    BF-ENV-020     model not reachable         BF-ENV-021     gated, no token
    BF-ENV-022     licence not accepted        BF-ENV-023     offline and not cached
    BF-ENV-024     the hub failed              BF-ENV-030     weights of a metric
    BF-ENV-031     a process of the job lost   BF-ENV-032     processes cannot meet
    BF-DATA-001    no images                   BF-DATA-002    captions
    BF-DATA-003    a bad image                 BF-DATA-004    too many bad images
    BF-DATA-005    the source's own list       BF-DATA-006    two samples with one key
    BF-DATA-007    a prompt                    BF-DATA-008    too few images
    BF-DATA-009    statistics that are none
    BF-ART-001     missing or not an artifact  BF-ART-002     made by a newer bifrost
    BF-ART-003     a draft of something else   BF-ART-004     two artifacts do not fit
    BF-ART-005     corrupt                     BF-ART-006     locked by another process
    BF-ART-007     weights that do not fit     BF-ART-008     not a safetensors file
    BF-ART-009     a model of no known family  BF-ART-010     a model that lacks parts
    BF-ART-011     another artifact needs it
    BF-STORE-001   not a latents store         BF-STORE-003   a store of other latents
    BF-STORE-005   corrupt shard               BF-STORE-006   rows are missing
    BF-SERVE-001   no token, or a wrong one    BF-SERVE-002   the queue is full
    BF-SERVE-003   a body is too long          BF-SERVE-004   a body comes too slowly
    BF-SERVE-005   no such model               BF-SERVE-006   no such address or method
    BF-SERVE-007   a request of another site   BF-SERVE-008   cannot listen there
    BF-SERVE-009   the server is stopping
    BF-MEM-001     out of memory               BF-NAN-001     not finite
    BF-FIND-001    problems found              BF-STOP-001    stopped on request
    BF-STOP-002    interrupted
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are no UTF-8, line and paragraph separators
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder what stands beside them
# User and password of an address (for Azure, the name of a container), and its query.
_USER = re.compile(r"(?<=://)(?<!abfs://)(?<!az://)[^\s/?#\"<>]*@")
_QUERY = re.compile(r"(://[^\s?\"<>]*)\?[^\s\"<>]*?(?='?[),;]*(:\d+)?:?([\s\"<>]|$))")
_NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "bad_alloc",  # torch, the CUDA driver, the system, C++
    "out_of_memory", "errormemoryallocation", "failed to cuda calloc",  # CUDA_ERROR_OUT_OF_MEMORY, NCCL
    "status_alloc_failed", "device_allocation_failed",  # cuBLAS, cuDNN, cuSPARSE, cuSOLVER
    "can't start new thread", "failed to map segment",  # no room for a stack, or for a library under `ulimit -v`
)  # fmt: skip


class BifrostError(Exception):
    """`message` says what, `at` where or what differs, `fix` what to type next."""

    code = "BF-BUG-001"
    exit_code = 1
    elsewhere = False  # True: another process of the same job says it, so this one need not
    in_result = False  # True: the JSON object that was printed holds it already

    def __init__(self, message: str, *, at: str | None = None, fix: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.at, self.fix = message, at, fix
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return render(self)


class UsageError(BifrostError):
    code, exit_code = "BF-USE-001", 2  # a wrong argument or combination


class RecipeError(BifrostError):
    code, exit_code = "BF-RECIPE-003", 2  # a recipe that cannot be used


class EnvironmentProblem(BifrostError):
    code, exit_code = "BF-ENV-001", 3  # GPU, dependency, token, licence, disk


class DiskFull(EnvironmentProblem):
    code = "BF-ENV-010"  # no room, or nowhere to write


class DataError(BifrostError):
    code, exit_code = "BF-DATA-001", 4  # images, captions, prompts


class ArtifactError(BifrostError):
    code, exit_code = "BF-ART-001", 5  # missing, corrupt or incompatible

    @classmethod
    def newer(cls, what: str, found: object, known: int) -> ArtifactError:
        """BF-ART-002: `what` is whole as far as we can tell, and of a format that only a later program knows."""
        message = f"{what} of format {found}; this bifrost reads up to {known}"
        return cls(message, fix="update bifrost", code="BF-ART-002")


class StoreError(ArtifactError):
    code = "BF-STORE-001"  # the same, for a latents store


class OutOfMemory(BifrostError):
    code, exit_code = "BF-MEM-001", 6  # main or GPU memory


class Diverged(BifrostError):
    code, exit_code = "BF-NAN-001", 7  # a loss or a gradient that is not finite


class Findings(BifrostError):
    code, exit_code = "BF-FIND-001", 8  # finished, and something was found


class Stopped(BifrostError):
    code, exit_code = "BF-STOP-001", 75  # stopped on request, can be continued


class Interrupted(BifrostError):
    code, exit_code = "BF-STOP-002", 130  # interrupted before anything could be saved


def is_out_of_memory(error: BaseException) -> bool:
    """True for main or GPU memory that could not be had, in the words of Python, the system, torch or CUDA."""
    text = str(error).lower()
    said = any(words in text for words in _NO_MEMORY)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or said


@contextmanager
def memory_errors(what: str, fix: str) -> Iterator[None]:
    """OutOfMemory (6), naming `what` was done and the setting that needs less, for any lack of memory inside."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BifrostError) or not is_out_of_memory(error):
            raise
        line = (str(error).splitlines() or [""])[0]
        raise OutOfMemory(f"{what} needs more memory than there is", at=line or None, fix=fix) from error


def render(error: BifrostError) -> str:
    """The error as its user reads it: one line, then `at:` and `fix:` where there is something to say."""
    lines = [f"error[{error.code}]: {printable(public(error.message))}"]
    for label, text in (("at: ", error.at), ("fix:", error.fix)):
        if text:
            lines.append(f"  {label} " + "\n       ".join(map(printable, public(str(text)).split("\n"))))
    return "\n".join(lines)


def as_json(error: BifrostError) -> dict[str, Any]:
    """The error as --json prints it."""
    return public({name: getattr(error, name) for name in ("code", "message", "at", "fix", "exit_code")})


def public(value: Any) -> Any:
    """A JSON value without what an address in its texts may hold of secrets: user and password, and the query."""
    if isinstance(value, str):
        return _QUERY.sub(r"\1?***", _USER.sub("***@", value)) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items()}
    return [public(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def printable(text: str) -> str:
    """One line for a terminal: characters that would break it, colour it or move the cursor are escaped."""
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode()
        if char in _DIRECTION or unicodedata.category(char) in _HIDDEN
        else char
        for char in text
    )
