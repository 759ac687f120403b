"""Writes one GGUF file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy import __version__, layouts
from losa_deploy.gguf.dense import VALUE_TYPES, scale_group
from losa_deploy.gguf.names import PREFIX
from losa_deploy.gguf.packed import mark_packed
from losa_deploy.gguf.types import WeightType
from losa_deploy.interfaces import PlannedTensor
from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.blob import to_blob
from losa_deploy.manifest import SCHEMA, TensorRecord
from losa_deploy.model import WeightGrid
from losa_deploy.planned import storing
from losa_deploy.progress import Progress

from .architectures import Rope, head_dim, write_keys
from .naming import model_name
from .plan import ROPE, Entry, Job
from .values import encode
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

Provenance = Mapping[str, str | float]
"""Keys below `losa.`, and `license`."""
CHUNK = 1 << 22
"""Weights that are rounded at once."""
FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
"""`general.file_type`: all or mostly of this type."""


def write_file(
    job: Job,
    tensors: Iterable[PlannedTensor],
    vocabulary: Vocabulary,
    provenance: Provenance,
    folder: Path,
    progress: Progress,
) -> tuple[TensorRecord, ...]:
    """Write `folder/<job.file>`, its matrices as planned; the records of its linears, then of the tables."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(folder / job.file, job.architecture.name)
    _write_keys(writer, job, vocabulary, provenance)
    entries = job.entries({tensor.name: tensor for tensor in tensors})
    for entry in entries:
        shape = (entry.bytes,) if entry.options else entry.shape
        kind = GGMLQuantizationType(entry.type.id)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.int8), entry.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    records: dict[str, TensorRecord] = {}
    for done, entry in enumerate(entries):
        progress(done, len(entries), f"writing {job.file}")
        data, record = _tensor(job, entry)
        writer.write_tensor_data(data)
        if record is not None:
            records[record.name] = record
    writer.close()
    progress(len(entries), len(entries), f"writing {job.file}")
    linears = [records[name] for name in job.checkpoint.linears]
    return (*linears, *(r for name, r in records.items() if name not in job.checkpoint.linears))


def _tensor(job: Job, entry: Entry) -> tuple[NDArray[np.generic], TensorRecord | None]:
    """The bytes of a tensor, and the record of a matrix."""
    if entry.name == ROPE:
        factors = Rope.of(job.checkpoint.config).factors(head_dim(job.checkpoint.config))
        assert factors is not None
        return factors, None
    weight = job.checkpoint.array(entry.source)
    order = job.order(entry.module, entry.shape[0])
    planned = entry.planned
    if planned is None:
        vector = job.architecture.vector(entry.name, weight if order is None else weight[order])
        return np.ascontiguousarray(vector, np.float32), None
    linear = entry.module in job.checkpoint.linears
    mask, grid = (job.mask(entry.module), job.grid(entry.module)) if linear else (None, None)
    grid = None if grid is None else grid.rows(order)
    if order is not None:
        weight, mask = weight[order], None if mask is None else mask[order]
    with storing(planned):
        if entry.options is not None and mask is not None:
            return _packed(planned, entry.options, weight, mask, grid)
        return _dense(entry, planned, weight, mask, grid)


def _packed(
    planned: PlannedTensor,
    options: PackOptions,
    weight: NDArray[np.float32],
    mask: NDArray[np.bool_],
    grid: WeightGrid | None,
) -> tuple[NDArray[np.generic], TensorRecord]:
    options = options if grid is None else grid.fitted(options, weight.shape[1])
    packed = LAYOUTS[planned.layout].pack(weight, mask, options)
    record = TensorRecord.of(planned.name, packed, planned.reason)
    return np.frombuffer(to_blob(packed), np.int8), record


def _dense(
    entry: Entry,
    planned: PlannedTensor,
    weight: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    grid: WeightGrid | None,
) -> tuple[NDArray[np.generic], TensorRecord]:
    """Row after row, because rounding takes several copies and a table can have a billion weights."""
    assert isinstance(entry.type, WeightType)  # only blobs have another
    rows, columns = weight.shape
    data = np.empty((rows, entry.bytes // rows), np.uint8)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        kept = weight[part] if mask is None else np.where(mask[part], weight[part], np.float32(0))
        of_part = None if grid is None else replace(grid, scales=grid.scales[part])
        data[part] = encode(kept, entry.type, of_part)
    record = TensorRecord.of_dense(
        planned.name,
        (rows, columns),
        VALUE_TYPES[entry.type],
        weight.size if mask is None else int(mask.sum()),
        data.data,
        planned.reason,
        scale_group(entry.type),
    )
    return data, record


def _write_keys(writer: GGUFWriter, job: Job, vocabulary: Vocabulary, provenance: Provenance) -> None:
    from gguf.constants import GGML_QUANT_VERSION

    name = model_name(job.model, job.parameters)
    writer.add_type("model")
    writer.add_name(name.full)
    writer.add_basename(name.base)
    writer.add_finetune(name.fine)
    writer.add_version(name.version)
    writer.add_size_label(name.size)
    writer.add_organization(name.organization)
    writer.add_quantized_by(f"losa-deploy {__version__}")
    writer.add_license(str(provenance.get("license", "")))
    if name.repository:
        url = f"https://huggingface.co/{name.repository}"
        writer.add_source_url(url)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name.full)
        writer.add_base_model_organization(0, name.organization)
        writer.add_base_model_repo_url(0, url)
    write_keys(writer, job.architecture.keys(job.checkpoint))
    writer.add_file_type(FILE_TYPES[layouts.VALUE_TYPES[job.recipe.value_type].ggml])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    vocabulary.write(writer)
    for key, value in provenance.items():
        if isinstance(value, float):
            writer.add_float32(f"{PREFIX}{key}", value)
        elif key != "license":
            writer.add_string(f"{PREFIX}{key}", value)
    writer.add_string(f"{PREFIX}schema", SCHEMA)
    writer.add_string(f"{PREFIX}tool_version", __version__)
    if job.kind == "packed":
        mark_packed(writer)
