"""The shape of a registry file as pydantic models: a file is untrusted, so types are strict and sizes bounded."""

from __future__ import annotations

import typing

import pydantic

from flashgen.errors import ConfigError, InputError, RegistryError
from flashgen.registry.codec import entry_from_dict
from flashgen.registry.contents import shortened
from flashgen.registry.entry import Origin, RegistryEntry, digest_of
from flashgen.spec import Phase

FORMAT = 1
MAX_ENTRIES = 10_000
MAX_RUNNERS_UP = 16
MAX_TEXT = 200
MAX_CODE = 20_000
"""Characters of a mask or score_mod, which may hold a function."""
MAX_FEATURES = 16
MAX_CONFIG_FIELDS = 32


class EntryError(RegistryError):
    """A part of a file that the schema refuses.

    Attributes:
        where: field names (and list positions) from the validated mapping down to the culprit.
        reason: what was got and what is allowed, without the path.
    """

    def __init__(self, reason: str, where: tuple[int | str, ...] = ()) -> None:
        # A name may be anything that a file holds.
        place = ".".join(str(step)[:MAX_TEXT] for step in where)
        super().__init__(f"{place}: {reason}" if where else reason)
        self.where = where
        self.reason = reason


def _printable(text: str) -> str:
    # Text of a foreign file ends up in terminals: no escape sequences.
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


Text = typing.Annotated[str, pydantic.Field(min_length=1, max_length=MAX_TEXT), pydantic.AfterValidator(_printable)]
Code = typing.Annotated[str, pydantic.Field(min_length=1, max_length=MAX_CODE), pydantic.AfterValidator(_printable)]
Count = typing.Annotated[int, pydantic.Field(ge=0, lt=2**63)]
# Far beyond any measurement, and far from where sums and ratios of two become infinite.
Number = typing.Annotated[float, pydantic.Field(ge=0, le=1e30, allow_inf_nan=False)]
Bounds = typing.Annotated[list[Count], pydantic.Field(min_length=2, max_length=2)]
ConfigModel = typing.Annotated[dict[Text, Count | Text], pydantic.Field(max_length=MAX_CONFIG_FIELDS)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class HeaderModel(_Model):
    """What all entries of a file share."""

    format: typing.Literal[1]
    device: Text
    arch: Text
    phase: Phase


class SpecModel(_Model):
    """What an entry computes; what is absent has its default."""

    dtype: Text
    head_dim_qk: Count
    head_dim_v: Count
    mask: Code
    # Defaults are not validated: given at all, neither may be empty or null.
    score_mod: Code = ""
    features: typing.Annotated[list[Text], pydantic.Field(min_length=1, max_length=MAX_FEATURES)] = []


class RangeModel(_Model):
    """The sizes an entry was measured on, each as [lo, hi]."""

    batch: Bounds
    nheads_q: Bounds
    nheads_kv: Bounds
    seqlen_q: Bounds
    seqlen_k: Bounds


class PerformanceModel(_Model):
    """How fast the winner is."""

    median_us: Number
    spread: Number
    tflops: Number
    baseline: Text
    baseline_us: Number | None
    timing: Text


class AccuracyModel(_Model):
    """How exact the winner is."""

    max_error: Number
    allowed_error: Number


class ResourcesModel(_Model):
    """What the winner takes."""

    registers: Count
    spills: Count
    smem_bytes: Count


class RunnerUpModel(_Model):
    """A config that came close."""

    median_us: Number
    config: ConfigModel


class ProvenanceModel(_Model):
    """How an entry came to be."""

    template_digest: Text
    flashgen: Text
    triton: Text
    torch: Text
    driver: Text
    date: Text
    trials: Count
    seed: Count


class EntryModel(_Model):
    """One entry of a file; device, arch and phase stand in the file's header."""

    spec: SpecModel
    range: RangeModel
    origin: Origin
    config: ConfigModel
    performance: PerformanceModel
    accuracy: AccuracyModel
    resources: ResourcesModel
    runners_up: typing.Annotated[list[RunnerUpModel], pydantic.Field(max_length=MAX_RUNNERS_UP)]
    provenance: ProvenanceModel
    digest: Text


class FileModel(HeaderModel):
    """A registry file of flashgen: the tuned attention kernels of one GPU and phase."""

    entries: typing.Annotated[list[EntryModel], pydantic.Field(max_length=MAX_ENTRIES)]


def json_schema() -> dict[str, object]:
    """Return what a registry file must look like as a JSON schema (draft 2020-12), YAML read as JSON.

    What no schema can say is checked beside it: digests, texts that must be a mask, a config that a template has.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **FileModel.model_json_schema()}


def read_header(content: object) -> HeaderModel:
    """Return the validated head of a file, given every top-level field but `entries`.

    Raises:
        EntryError: if the file is of another format, or a field is missing, unknown or of the wrong type.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise EntryError(
            f"not a registry file of format {FORMAT}: format is {shortened(found)}; "
            "another version of flashgen may read it",
            ("format",),
        )
    return _validate(HeaderModel, content)


def read_entry(header: HeaderModel, content: object) -> RegistryEntry:
    """Return the entry that the untrusted `content` of one item of `entries` describes.

    Raises:
        EntryError: if a field is missing, unknown, of the wrong type or out of range, or if the digest does not fit.
    """
    model = _validate(EntryModel, content)
    body = {"device": header.device, "arch": header.arch, "phase": header.phase}
    body |= {name: value for name, value in typing.cast("dict[str, str]", content).items() if name != "digest"}
    # Over what stands in the file, not over the entry made of it: a field added with a default keeps old digests valid.
    actual = digest_of(body)
    if actual != model.digest:
        raise EntryError(f"the content has digest {actual}, not {model.digest}: edited by hand or damaged", ("digest",))
    try:
        return entry_from_dict(body)
    except (InputError, ConfigError) as error:
        raise EntryError(str(error)) from error


_ModelT = typing.TypeVar("_ModelT", bound=_Model)


def _validate(model: type[_ModelT], content: object) -> _ModelT:
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        got = "" if first["type"] == "missing" else f", got {shortened(first['input'])}"
        raise EntryError(f"{first['msg']}{got}", first["loc"]) from None
