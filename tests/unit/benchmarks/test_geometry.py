"""Synthetic models: the graph in ONNX Runtime, agreement with the peers, the document, the errors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES, build, model_bytes
from losa_deploy.benchmarks.synthetic.linears import OrtFp32, OrtInt2, OrtInt4, OrtInt8, Ours, quantize_blocks
from losa_deploy.benchmarks.synthetic.peers import OURS_DENSE, Load, build_contenders, measure_contenders
from losa_deploy.benchmarks.synthetic.tensors import Pruning, RandomWeight, Storage, repeat_rows
from losa_deploy.cli.main import main
from losa_deploy.errors import InputError, LosaError
from losa_deploy.exporters.onnx import functions
from losa_deploy.layouts import LAYOUTS, sliding
from losa_deploy.runtimes.ort.session import OrtRuntime
from losa_deploy.structure import parse_structure
from losa_deploy.verify.stored import check_sliding

TINY = GEOMETRIES["tiny"]
TOKENS = tuple(range(3, 40))
HALF = Pruning(0.5)
QUICK = ("--prompt-tokens", "8", "--decode-tokens", "4", "--prefill-tokens", "16", "--repetitions", "2")


def portable(folder: Path, kind: Ours) -> Path:
    """Add the operators' definitions, so that ONNX Runtime opens the model without our library."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.functions.extend(
        functions.function(use.packed, use.weights, gated=use.gated) for use in kind.operators.values()
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def logits(folder: Path) -> NDArray[np.float32]:
    session = OrtRuntime(native=False).open(folder, threads=1)
    everything = session.logits(TOKENS)
    session.prefill(TOKENS[:-1])
    assert np.abs(session.step(TOKENS[-1]) - everything[-1]).max() < 0.5
    session.close()
    return everything


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("geometry") / "fp32"
    build(TINY, OrtFp32(), folder, HALF)
    return folder


@pytest.mark.parametrize(
    "storage",
    [
        Storage("bitmask", "i4", 0.5, group_size=32),
        Storage("bitmask", "i8", 0.5),
        Storage("bitmask", "i3", 0.5),
        Storage("nm", "i8", 0.5, (2, 4)),
        Storage("tiled", "i4", 0.5, (2, 4)),
        Storage("sliding", "i8", 0.5, stride=2),
        Storage("bitmask", "i4", 0.6, stride=2.5),
        Storage("bitmask", "i8", 0.6, paired=True),
    ],
    ids=lambda storage: storage.label,
)
@pytest.mark.parametrize("tied", [False, True])
def test_ours_computes_what_the_dense_peer_computes(
    storage: Storage, tied: bool, dense: Path, tmp_path: Path
) -> None:
    pruning = storage.pruning()
    geometry, head = replace(TINY, tied=tied), "i4" if storage.value_type == "i4" else "i8"
    kind, folder = Ours(storage, Storage("dense", head)), tmp_path / "ours"  # type: ignore[arg-type]
    assert build(geometry, kind, folder, pruning) == model_bytes(folder) <= TINY.estimate(kind)
    if pruning != HALF:
        dense = tmp_path / "dense"
        build(TINY, OrtFp32(), dense, pruning)
    found, expected = logits(portable(folder, kind)), logits(dense)
    assert found.shape == (len(TOKENS), TINY.vocab)
    agreement = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    assert agreement > {"i8": 0.999, "i4": 0.95, "i3": 0.8}[storage.value_type]


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tied = replace(TINY, tied=True)
    sizes, found = [], []
    for geometry in (TINY, tied):
        kind, folder = (
            Ours(Storage("bitmask", "i8", 0.5), Storage("dense", "i8")),
            tmp_path / str(geometry.tied),
        )
        sizes.append(build(geometry, kind, folder, HALF))
        found.append(logits(portable(folder, kind)))
    assert sizes[0] - sizes[1] > TINY.vocab * TINY.hidden * 0.9
    assert np.array_equal(*found)


@pytest.mark.parametrize(("kind", "agreement"), [(OrtInt4, 0.95), (OrtInt8, 0.99), (OrtInt2, 0.3)])
def test_peers_agree_with_the_dense_model(
    kind: type[OrtInt4] | type[OrtInt8], agreement: float, dense: Path, tmp_path: Path
) -> None:
    peer = kind()
    size = build(TINY, peer, tmp_path / peer.name, HALF)
    assert size < model_bytes(dense) / 2
    found, expected = logits(tmp_path / peer.name), logits(dense)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > agreement


@pytest.mark.parametrize("bits", [2, 4])
def test_blocks_are_codes_of_levels_low_bits_first(bits: int) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32)
    codes, scales = quantize_blocks(weight, 32, bits)
    assert codes.shape == (3, 3, 32 * bits // 8) and scales.shape == (3, 3)
    levels = np.stack([codes >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)], axis=-1)
    found = (levels.reshape(3, 3, 32).astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    padded = np.pad(weight, ((0, 0), (0, 26))).reshape(3, 3, 32)
    largest = np.take_along_axis(found, np.abs(padded).argmax(axis=2)[..., None], axis=2)
    assert np.allclose(np.abs(largest[..., 0]), np.abs(padded).max(axis=2), rtol=1e-6)
    kept = found * np.sign(scales)[..., None] <= 0  # towards the lowest level there is no clipping
    assert (np.abs(found - padded)[kept] <= 0.501 * np.abs(scales)[..., None].repeat(32, 2)[kept]).all()


def test_our_dense_peers_keep_every_weight_in_our_operators(dense: Path, tmp_path: Path) -> None:
    storage = Storage("tiled", "i3", 0.5, (2, 4))
    made = build_contenders(TINY, storage, list(OURS_DENSE), tmp_path, OrtRuntime())
    assert [contender.name for contender in made] == ["ours", "ours-dense-i4", "ours-dense-i3"]
    build(TINY, OrtFp32(), tmp_path / "fp32", Pruning(0.0))
    expected = logits(tmp_path / "fp32")
    for contender, operator, agreement in zip(made[1:], ("I4", "I3"), (0.85, 0.65), strict=True):
        model = onnx.load(contender.folder / "model.onnx", load_external_data=False)
        counts = Counter(node.op_type for node in model.graph.node if node.domain == "ai.losa")
        assert {f"DenseMatMul{operator}x3", f"DenseMatMul{operator}x2SwiGLU"} <= set(counts)
        session = OrtRuntime().open(contender.folder, threads=1)
        found = session.logits(TOKENS)
        session.close()
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > agreement
    assert made[0].bytes < made[2].bytes < made[1].bytes < model_bytes(dense) / 3
    again = build_contenders(TINY, storage, ["ours-dense-i4"], tmp_path, OrtRuntime(), head="i4")[1]
    assert again.folder != made[1].folder and again.bytes < made[1].bytes


def test_the_int8_peer_is_what_quantize_dynamic_makes(dense: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    made = tmp_path / "quantized.onnx"
    quantize_dynamic(dense / "model.onnx", made, op_types_to_quantize=["MatMul"], extra_options=options)
    build(TINY, OrtInt8(), tmp_path / "peer", HALF)
    counts = [
        Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
        for path in (made, tmp_path / "peer" / "model.onnx")
    ]
    assert counts[0] == counts[1]


def test_every_linear_has_bytes_of_its_own(dense: Path) -> None:
    """Different ones, too: ONNX Runtime keeps one of weights with equal bytes, which then fits the caches."""
    model = onnx.load(dense / "model.onnx", load_external_data=False)
    stored = (dense / "model.onnx.data").read_bytes()
    pieces = []
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if entry:
            pieces.append(stored[int(entry["offset"]) :][: int(entry["length"])])
    assert len(set(pieces)) == len(pieces)
    weights = 4 * TINY.block_weights + 5 * TINY.vocab * TINY.hidden
    assert weights < sum(map(len, pieces)) <= len(stored) < 1.2 * weights


def test_a_kept_model_is_reused_only_if_it_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build(TINY, OrtInt8(), folder, HALF)
    before = (folder / "model.onnx.data").stat().st_mtime_ns
    build(TINY, OrtInt8(), folder, HALF)
    assert (folder / "model.onnx.data").stat().st_mtime_ns == before
    build(TINY, OrtInt8(), folder, Pruning(0.75))
    assert (folder / "model.onnx.data").stat().st_mtime_ns != before
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="no model of a benchmark"):
        build(TINY, OrtInt8(), tmp_path / "other", HALF)


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
@pytest.mark.parametrize("pattern", [None, (2, 4), (2, 8), (1, 4)])
def test_repeated_rows_are_what_packing_them_gives(value_type: str, pattern: tuple[int, int] | None) -> None:
    layout = "nm" if pattern else "bitmask"
    storage = Storage(layout, value_type, 0.6, pattern)  # type: ignore[arg-type]
    weight, mask = RandomWeight((6, 130), 0.6, pattern).rows
    once = LAYOUTS[layout].pack(weight, mask, storage.options)
    whole = LAYOUTS[layout].pack(np.tile(weight, (4, 1)), np.tile(mask, (4, 1)), storage.options)
    found = repeat_rows(once, mask, 4)
    assert (found.sha256, found.shape, found.nnz) == (whole.sha256, whole.shape, whole.nnz)


@pytest.mark.parametrize("value_type", ["f16", "i8", "i4", "i3"])
def test_repeated_pairs_of_rows_are_what_packing_them_gives(value_type: str) -> None:
    storage = Storage("bitmask", value_type, 0.6, paired=True)  # type: ignore[arg-type]
    weight, mask = storage.pruning().weight((6, 130)).rows
    once = LAYOUTS["bitmask"].pack(weight, mask, storage.options)
    assert ("rows_per_mask" in once.params) == (value_type != "f16")
    whole = LAYOUTS["bitmask"].pack(np.tile(weight, (4, 1)), np.tile(mask, (4, 1)), storage.options)
    found = repeat_rows(once, mask, 4)
    assert (found.sha256, found.shape, found.nnz) == (whole.sha256, whole.shape, whole.nnz)
    if value_type != "f16":
        odd = LAYOUTS["bitmask"].pack(weight[:5], mask[:5], storage.options)
        with pytest.raises(ValueError, match="even number of rows"):
            repeat_rows(odd, mask[:5], 2)


def test_random_masks_follow_their_pattern() -> None:
    shape = (48, 320)
    pairs = Pruning(0.6, paired=True).weight(shape).rows[1]
    assert np.array_equal(pairs[::2], pairs[1::2]) and abs(pairs.mean() - 0.4) < 0.02
    assert not np.array_equal(pairs[:2], pairs[2:4])
    assert sliding.find_slots(Pruning(0.5, stride=2).weight(shape).rows[1]) is not None
    for stride in (1.5, 2.5, 3):
        mask = Pruning(0.6, stride=stride).weight(shape).rows[1]
        assert check_sliding("q", mask, parse_structure(f"sliding:{stride:g}").stride) == []
        assert abs(mask.mean() - 1 / stride) < 0.05


@pytest.mark.parametrize(
    ("runtime", "pattern", "value_type", "layout", "sparsity"),
    [
        ("llamacpp", "sliding", "i3", "sliding", 0.5),
        ("llamacpp", "sliding:2.5", "i4", "bitmask", 0.6),
        ("llamacpp", "pair", "i4", "bitmask", 0.6),
        ("ort", "sliding", "i4", "sliding", 0.5),
        ("ort", "sliding", "f16", "bitmask", 0.5),
        ("ort", "pair", "i8", "bitmask", 0.6),
    ],
)
def test_every_pattern_is_measured(
    runtime: str,
    pattern: str,
    value_type: str,
    layout: str,
    sparsity: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["bench", "--geometry", "tiny", "--runtime", runtime, "--pattern", pattern, "--peers", "none"]
    code = main([*argv, "--value-type", value_type, "--threads", "1", *QUICK, "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    document = json.loads(streams.out)
    workload = document["workload"]
    assert (workload["layout"], workload["value_type"]) == (layout, value_type)
    assert workload["sparsity"] == pytest.approx(sparsity)
    assert (workload["stride"] > 0, workload["paired"]) == (pattern != "pair", pattern == "pair")
    (ours,) = document["results"]
    assert ours["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("room", [1 << 40, 0], ids=["together", "in turns"])
def test_contenders_are_sampled_alike(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = room

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    storage = Storage("bitmask", "i8", 0.6)
    contenders = build_contenders(TINY, storage, ["ort-int4"], tmp_path, OrtRuntime())[1:]
    load = Load(prompt_tokens=4, decode_tokens=3, prefill_tokens=9, repetitions=2)
    assert measure_contenders(contenders, load, 1) == (room > 0)
    record = contenders[0].record()
    assert list(record) == [
        "name",
        "decode_tokens_per_second",
        "prefill_tokens_per_second",
        "bytes",
        "peak_rss_bytes",
        "samples",
    ]
    assert len(contenders[0].decode_rates) == len(contenders[0].prefill_rates) == 2


def test_the_command_prints_the_document_of_the_issue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "--geometry", "tiny", "--runtime", "ort", "--value-type", "i4", "--sparsity", "0.6"]
    argv += ["--peers", "ort-int4,ort-int8,ort-fp32", "--threads", "1", "--keep", str(tmp_path), *QUICK]
    code = main([*argv, "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    document = json.loads(streams.out)
    assert document["schema"] == "losa.bench/1"
    assert document["machine"]["cores"] >= 1
    assert [result["name"] for result in document["results"]] == ["ours", "ort-int4", "ort-int8", "ort-fp32"]
    for result in document["results"]:
        rates = [sample["decode_tokens_per_second"] for sample in result["samples"]]
        assert len(rates) == 2
        assert result["decode_tokens_per_second"] == pytest.approx(np.median(rates))
        assert result["bytes"] > 0 and result["peak_rss_bytes"] > 0
    assert document["results"][0]["bytes"] < document["results"][3]["bytes"]
    assert main([*argv, "--quiet"]) == 0
    assert "ours ÷" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--geometry", "llama-1"], "Did you mean `--geometry llama-1b`"),
        (["--geometry", "tiny", "--peers", "ort-int5"], "There is no peer 'ort-int5'"),
        (["--geometry", "tiny", "--peers", "ort-int4,ort-int4"], "twice"),
        (["some/model", "--geometry", "tiny"], "makes its own models"),
        (["--geometry", "tiny", "--pattern", "2:4", "--sparsity", "0.5"], "Leave out --sparsity"),
        (["--geometry", "tiny", "--pattern", "4:2"], "no pattern N:M"),
        (["--geometry", "tiny", "--pattern", "sliding:4"], "a stride above 1 and at most 3"),
        (["--geometry", "tiny", "--pattern", "slide"], "is none of 'unstructured', 'pair', 'sliding'"),
        (["--geometry", "tiny", "--pattern", "sliding", "--sparsity", "0.5"], "Leave out --sparsity"),
        (["--geometry", "tiny", "--pattern", "sliding", "--layout", "nm"], "needs a pattern N:M"),
        (["--geometry", "tiny", "--layout", "nm"], "needs a pattern"),
        (["--geometry", "tiny", "--sparsity", "0.5", "0.6"], "one --sparsity"),
        (["--geometry", "tiny", "--sparsity", "60"], "no fraction"),
        (["--geometry", "tiny", "--runtime", "llamacpp", "--head", "i4"], "computes its own"),
        (["some/model", "--head", "i4"], "--head says nothing about model folders"),
        (["--geometry", "tiny", "--prefill-tokens", "9999"], "do not fit the models' context"),
        (["--geometry", "tiny", "--plot", "x.svg"], "--plot says nothing about --geometry"),
        (["some/model", "--output", "x"], "--output says nothing about model folders"),
        (["some/model", "--peers", "q4_0", "--plot", "x.png"], "E.g. --plot x.svg"),
        (["some/model", "--value-type", "i4"], "--value-type says nothing about model folders"),
        (["kernels", "some/model"], "takes no model folders"),
        ([], "nothing to measure"),
    ],
)
def test_errors_say_what_to_type_next(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losa_deploy.output.free_bytes", lambda path: 1000)
    with pytest.raises(LosaError, match=r"needs .* MB on the disk"):
        build_contenders(TINY, Storage("bitmask", "i8", 0.6), ["ort-fp32"], tmp_path, OrtRuntime())
    assert list(tmp_path.iterdir()) == []
